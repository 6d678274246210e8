"""Generators of convolution kernels that are compositions: smoothing, and sums of exponentials."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from effkern import backends
from effkern.ops._dispatch import FAST_DTYPES, dtype_name, require_dense, without_autocast
from effkern.reference.long_conv_kernels import zero_order_hold

__all__ = ["smooth_kernel", "vandermonde_bytes", "vandermonde_flops", "vandermonde_kernel"]


def smooth_kernel(k: Tensor, squash: float = 0.1, width: int = 7) -> Tensor:
    """Smooths a learned convolution kernel: small numbers become 0, then a moving average.

        s[j] = sign(k[j]) max(|k[j]| - squash, 0)          out[j] = 1/width sum_(|i - j| <= width // 2) s[i]

    Args:
        k: (..., Lk), zeros around it. float32, bfloat16, float16 or float64; any strides.
        squash: how far every number moves towards 0, at least 0; 0 only averages.
        width: how many numbers an average is over, odd; those outside the kernel count as zeros. 1 only squashes.

    Returns:
        out, k's shape and dtype, contiguous; differentiable to any order.

    Raises:
        TypeError: k is not a tensor of floating numbers, or width not an integer.
        ValueError: k has no dimension, squash is negative or not finite, or width is not odd and positive.

    Numerics:
        In float32, or float64 for float64, rounded once. Deterministic. NaN reaches the averages it is part of.
        Autocast changes nothing.

    Cost:
        width additions a number and two passes over memory.

    Source:
        Fu et al. 2023 (Simple Hardware-Efficient Long Convolutions for Sequence Modeling), section 3.
    """
    if not isinstance(k, Tensor) or not k.is_floating_point():
        what = dtype_name(k.dtype) if isinstance(k, Tensor) else type(k).__name__
        raise TypeError(f"smooth_kernel: k must be a tensor of floating numbers, got {what}")
    if not isinstance(width, int):
        raise TypeError(f"smooth_kernel: width must be an integer, got {type(width).__name__}")
    require_dense("smooth_kernel", k=k)
    if k.dim() == 0:
        raise ValueError("smooth_kernel: k must have shape (..., Lk), got a number")
    if not (squash >= 0 and math.isfinite(squash)):
        raise ValueError(f"smooth_kernel: squash must be finite and at least 0, got {squash}")
    if width < 1 or width % 2 == 0:
        raise ValueError(f"smooth_kernel: width must be odd and at least 1, got {width}")
    backends.record("smooth_kernel:composition")
    if k.numel() == 0:
        return k.clone(memory_format=torch.contiguous_format)
    rows = k.reshape(-1, k.shape[-1]).to(torch.float64 if k.dtype == torch.float64 else torch.float32)
    shrunk = torch.nn.functional.softshrink(rows, min(squash, torch.finfo(rows.dtype).max))
    smooth = torch.nn.functional.avg_pool1d(shrunk, width, stride=1, padding=width // 2)
    return smooth.to(k.dtype).view(k.shape)


def _tile(length: int) -> tuple[int, int]:
    """Positions l = i T + j: T, a power of two near sqrt(length), and how many i there are. A compiler, for which the
    length may have no value, gets the same T for all."""
    if torch.compiler.is_compiling():
        return 64, -(-length // 64)
    tile = 1
    while tile * tile < length:
        tile *= 2
    return tile, -(-length // tile)


def _exponentials(z: Tensor, count: int, stride: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Real and imaginary parts of exp(z stride i), (H, N, count). `z` is complex128.

    Every exponent is a product, not a running sum: in float64, and for float32 results reduced to a turn before it is
    rounded, so that the phase is right however far out.
    """
    steps = torch.arange(count, dtype=torch.float64, device=z.device) * stride
    size = (z.real[..., None] * steps).to(dtype).exp()
    # Subnormal numbers would slow products down a hundredfold on some CPUs.
    size = torch.nn.functional.threshold(size, torch.finfo(dtype).tiny, 0.0)
    if dtype == torch.float64:
        angle = z.imag[..., None] * steps
    else:
        turns = (z.imag / (2 * math.pi))[..., None] * steps
        angle = ((turns - turns.round()) * (2 * math.pi)).to(dtype)
    return size * angle.cos(), size * angle.sin()


def _groups(z: Tensor, length: int) -> list[slice]:
    """Channels whose factors stay in a cache, together. A compiler, which fuses what it can, gets all of them."""
    channels, states = z.shape
    if torch.compiler.is_compiling():
        return [slice(0, channels)]
    numbers = (1 << 24) if z.device.type == "cuda" else 1 << 17
    group = max(1, numbers // max(1, states * sum(_tile(length))))
    return [slice(begin, begin + group) for begin in range(0, max(1, channels), group)]


def _kernel(w: Tensor, z: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """K[h, i T + j] = sum_n 2 Re(w exp(z i T)) Re(exp(z j)) - 2 Im(w exp(z i T)) Im(exp(z j))."""
    tile, count = _tile(length)
    real, imaginary = _exponentials(z, count, tile, dtype)  # (H, N, I)
    first, second = (2 * w.real.to(dtype))[..., None], (2 * w.imag.to(dtype))[..., None]
    cosines = torch.addcmul(real * first, imaginary, second, value=-1)
    sines = torch.addcmul(imaginary * -first, real, second, value=-1)
    far = torch.cat([cosines, sines], 1)  # (H, 2 N, I)
    near = torch.cat(_exponentials(z, tile, 1, dtype), 1)  # (H, 2 N, T)
    return (far.mT @ near).flatten(1)[:, :length]


def _moments(grad: Tensor, z: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """sum_l grad[l] exp(z l) and sum_l grad[l] l exp(z l), (H, N)."""
    tile, count = _tile(length)
    grad = torch.nn.functional.pad(grad, (0, tile * count - length)).unflatten(1, (count, tile))  # (H, I, T)
    near = torch.cat(_exponentials(z, tile, 1, dtype), 1).mT  # (H, T, 2 N)
    far = torch.complex(*_exponentials(z, count, tile, dtype)).mT  # (H, I, N)

    def inner(values: Tensor) -> Tensor:
        real, imaginary = (values @ near).chunk(2, -1)
        return torch.complex(real, imaginary) * far

    by_tile = inner(grad)
    steps = torch.arange(tile, dtype=dtype, device=z.device)
    starts = torch.arange(count, dtype=dtype, device=z.device)[:, None] * tile
    return by_tile.sum(1), (by_tile * starts + inner(grad * steps)).sum(1)


class _SumOfExponentials(torch.autograd.Function):
    """K[h, l] = 2 Re sum_n w[h, n] exp(z[h, n] l) with l = i T + j as one real product of inner size 2 N a channel, and
    two backward. What is kept is w and z; the factors are computed again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(w: Tensor, z: Tensor, length: int, dtype: torch.dtype) -> Tensor:
        parts = [_kernel(w[part], z[part], length, dtype) for part in _groups(z, length)]
        return torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        w, z, ctx.length, ctx.dtype = inputs
        ctx.save_for_backward(w, z)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        w, z = ctx.saved_tensors
        with without_autocast(w):
            parts = [
                _moments(grad_out[part], z[part], ctx.length, ctx.dtype) for part in _groups(z, ctx.length)
            ]
        zeroth, first = (torch.cat(moment).to(z.dtype) for moment in zip(*parts, strict=True))
        grad_w = (2 * zeroth).conj() if ctx.needs_input_grad[0] else None
        grad_z = (2 * w * first).conj() if ctx.needs_input_grad[1] else None
        return grad_w, grad_z, None, None


def vandermonde_flops(C: Tensor, A: Tensor, dt: Tensor, length: int, *, backward: bool = False) -> int:
    """4 N products and sums a number; backward twice that."""
    return (8 if backward else 4) * C.numel() * length


def vandermonde_bytes(C: Tensor, A: Tensor, dt: Tensor, length: int, *, backward: bool = False) -> int:
    """Parameters in and the kernel out; backward reads the kernel's gradient and writes those of the parameters."""
    out = dt.element_size() * C.shape[0] * length
    return out + (2 if backward else 1) * (C.nbytes + A.nbytes + dt.nbytes)


def _check_vandermonde(C: Tensor, A: Tensor, dt: Tensor, length: int) -> None:
    def require(condition: bool, message: str) -> None:
        if not condition:
            raise RuntimeError(f"vandermonde_kernel: {message}")

    for name, t in (("C", C), ("A", A), ("dt", dt)):
        if not isinstance(t, Tensor):
            raise TypeError(f"vandermonde_kernel: {name} must be a tensor, got {type(t).__name__}")
    require_dense("vandermonde_kernel", C=C, A=A, dt=dt)
    if not isinstance(length, int | torch.SymInt):
        raise TypeError(f"vandermonde_kernel: length must be an integer, got {type(length).__name__}")
    if length < 1:
        raise ValueError(f"vandermonde_kernel: length must be at least 1, got {length}")
    kinds = (torch.complex64, torch.complex128)
    require(C.dtype in kinds, f"C must be complex64 or complex128, got {dtype_name(C.dtype)}")
    require(C.dim() == 2, f"C must have shape (channels, states), got {tuple(C.shape)}")
    require(A.shape == C.shape, f"A has shape {tuple(A.shape)}, C has {tuple(C.shape)}")
    require(A.dtype == C.dtype, f"A is {dtype_name(A.dtype)} but C is {dtype_name(C.dtype)}")
    require(
        dt.shape == C.shape[:1], f"dt must have shape ({C.shape[0]},), one a channel, got {tuple(dt.shape)}"
    )
    allowed = (torch.float64,) if C.dtype == torch.complex128 else FAST_DTYPES
    require(
        dt.dtype in allowed,
        f"dt must be {dtype_name(C.real.dtype)} beside {dtype_name(C.dtype)}, got {dtype_name(dt.dtype)}",
    )
    for name, t in (("A", A), ("dt", dt)):
        require(t.device == C.device, f"{name} is on another device than C")


def vandermonde_kernel(C: Tensor, A: Tensor, dt: Tensor, length: int) -> Tensor:
    """The kernel of a diagonal state space, a channel each: a sum of exponentials.

        K[h, l] = 2 Re sum_n C[h, n] (exp(dt[h] A[h, n]) - 1) / A[h, n] exp(dt[h] A[h, n] l)

    with the input held for dt (zero-order hold; the factor is dt where A is 0) and states in conjugate pairs, of which
    one each is given. Real states count twice, too: give half of their C.

    Args:
        C: (H, N), output times input weights. complex64 or complex128; any strides.
        A: (H, N), C's dtype, the poles. Re A < 0 where the kernel decays; any other value works.
        dt: (H,), the step of each channel. float32, bfloat16 or float16 beside complex64, float64 beside complex128.
        length: L, how many numbers of the kernel, at least 1.

    Returns:
        K (H, L), contiguous, float32 for complex64 and float64 for complex128; differentiable in C, A and dt to any
        order. (Forward-mode derivatives: `effkern.reference.long_conv_kernels`.)

    Raises:
        TypeError: an argument is not a tensor, or length not an integer.
        ValueError: length is below 1.
        RuntimeError: shapes, dtypes or devices do not fit; the message names the argument, what was expected and what
            came.

    Numerics:
        Exponents dt A l are products in float64, of which complex64 keeps the phase modulo a turn: the error of a term
        stays near one float32 rounding up to l = 10^6 and beyond, where phases computed in float32 are noise.
        Factors and sums in the dtype of the result. The hold is exact for small dt A. Autocast changes nothing.
        Deterministic.

    Cost:
        `vandermonde_flops`, `vandermonde_bytes`: one batched real product (L/T, 2 N) x (2 N, T) with T near sqrt(L),
        two backward, and about 2 H N sqrt(L) exponentials each way, for a group of channels at a time: memory is K
        twice and little more. Kept for backward are a few tensors (H, N).

    Source:
        Gu et al. 2022 (On the Parameterization and Initialization of Diagonal State Space Models), section 3.
    """
    _check_vandermonde(C, A, dt, length)
    backends.record("vandermonde_kernel:composition")
    with without_autocast(C):
        wide, step = A.to(torch.complex128), dt.to(torch.float64)
        weights = C.to(torch.complex128) * zero_order_hold(wide, step)
        return _SumOfExponentials.apply(weights, step[:, None] * wide, length, C.real.dtype)
