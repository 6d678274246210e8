"""Generators of convolution kernels in plain PyTorch, differentiable to any order."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def smooth_kernel(k: Tensor, squash: float = 0.1, width: int = 7) -> Tensor:
    """Shapes as `effkern.smooth_kernel`, in k's dtype throughout."""
    shrunk = k.sign() * (k.abs() - squash).clamp(min=0)
    padded = torch.nn.functional.pad(shrunk, (width // 2, width // 2))
    return padded.unfold(-1, width, 1).sum(-1) / width


def zero_order_hold(A: Tensor, dt: Tensor) -> Tensor:
    """(exp(dt A) - 1) / A, which is dt where A is 0: what an input held for dt adds to a state, (H, N).

    Near 0, where the difference would cancel, by its power series, so that its derivatives are right there too.
    """
    z = dt[:, None] * A
    small = z.abs() < 0.5
    near, far = torch.where(small, z, 0), torch.where(small, 1, z)
    series = torch.ones_like(near)
    for n in range(16, 1, -1):  # 1 + z/2 (1 + z/3 (1 + ...)): the first term left out is below 1e-19
        series = 1 + near / n * series
    return dt[:, None] * torch.where(small, series, torch.expm1(far) / far)


def vandermonde_kernel(C: Tensor, A: Tensor, dt: Tensor, length: int) -> Tensor:
    """Shapes as `effkern.vandermonde_kernel`, in C's dtype throughout, through a tensor (H, N, length)."""
    steps = torch.arange(length, dtype=dt.dtype, device=dt.device)
    powers = torch.exp((dt[:, None] * A)[..., None] * steps)
    return 2 * torch.einsum("hn,hnl->hl", C * zero_order_hold(A, dt), powers).real


def _advance(a: Tensor, x: Tensor) -> Tensor:
    """A x for columns x (H, d, columns): a shift, and the last component times a."""
    last = x[:, -1:]
    return torch.cat([torch.zeros_like(last), x[:, :-1]], 1) + a[..., None] * last


def _retreat(a: Tensor, x: Tensor) -> Tensor:
    """A^T x for columns x (H, d, columns)."""
    return torch.cat([x[:, 1:], (a[..., None] * x).sum(1, keepdim=True)], 1)


def _walk(a: Tensor, b: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """A^j b (H, d, steps), the last row of A^j [b, I] (H, steps, 1 + d), and A^steps (H, d, d)."""
    identity = torch.eye(a.shape[1], dtype=a.dtype, device=a.device).expand(*a.shape, a.shape[1])
    x = torch.cat([b[..., None], identity], 2)
    states, lasts = [], []
    for _ in range(steps):
        states.append(x[..., :1])
        lasts.append(x[:, -1:])
        x = _advance(a, x)
    return torch.cat(states, 2), torch.cat(lasts, 1), x[..., 1:]


def _leap(c: Tensor, stride: Tensor, steps: int) -> Tensor:
    """c^T A^(i T) (H, steps, d)."""
    rows = [c[:, None]]
    for _ in range(steps - 1):
        rows.append(rows[-1] @ stride)
    return torch.cat(rows, 1)


def _split(length: int) -> tuple[int, int]:
    small = math.isqrt(length - 1) + 1
    return small, -(-length // small)


def companion_kernel(a: Tensor, b: Tensor, c: Tensor, length: int) -> Tensor:
    """Shapes as `effkern.companion_kernel`.

    K[i T + j] = (c^T A^(i T)) (A^j b): about sqrt(length) small steps from b and from the identity, and as many large
    ones from c. float64 is computed in float64, everything else in float32.
    """
    dtype = a.dtype
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    a, b, c = (t.to(compute) for t in (a, b, c))
    small, large = _split(length)
    states, _, stride = _walk(a, b, small)
    out = _leap(c, stride, large) @ states  # (H, large, small)
    return out.flatten(1)[:, :length].to(dtype).contiguous()


def companion_kernel_backward(
    grad_out: Tensor, a: Tensor, b: Tensor, c: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, b and c, written out, for devices whose kernel is the composition above."""
    channels, length = grad_out.shape
    small, large = _split(length)
    states, lasts, stride = _walk(a, b, small)
    rows = _leap(c, stride, large)
    grad = torch.nn.functional.pad(grad_out, (0, small * large - length)).view(channels, large, small)
    grad_rows, grad_states = grad @ states.mT, rows.mT @ grad  # (H, large, d), (H, d, small)
    grad_stride, row = torch.zeros_like(stride), torch.zeros_like(grad_rows[:, :1])
    for i in range(large - 1, -1, -1):
        row = grad_rows[:, i : i + 1] + row @ stride.mT
        if i > 0:
            grad_stride = grad_stride + rows[:, i - 1 : i].mT @ row
    # The small steps, those of b and of the identity together, from their end.
    x = torch.cat([torch.zeros_like(b)[..., None], grad_stride], 2)
    grad_a = torch.zeros_like(a)
    for j in range(small - 1, -1, -1):
        grad_a = grad_a + (x * lasts[:, j : j + 1]).sum(2)
        x = _retreat(a, x)
        x = torch.cat([x[..., :1] + grad_states[..., j : j + 1], x[..., 1:]], 2)
    return grad_a, x[..., 0].contiguous(), row[:, 0].contiguous()
