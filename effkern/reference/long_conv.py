"""Long convolutions in plain PyTorch, differentiable to any order: real FFTs of at least twice the length."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def transform_length(positions: int, taps: int) -> int:
    """The next power of two from which on nothing wraps around."""
    return 1 << (positions + taps - 1).bit_length()


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 is computed in float64, everything else in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def kernel_spectrum(k: Tensor, n: int, causal: bool) -> Tensor:
    """(H, n / 2 + 1) of k (H, Lk), or of k (H, 2, Lk): taps that look ahead are taps at negative lags."""
    if causal:
        return torch.fft.rfft(k, n=n)
    # A lazy conj() would be lost in kernels under a compiled graph, where nothing resolves it.
    return torch.fft.rfft(k[:, 0], n=n) + torch.fft.rfft(k[:, 1], n=n).conj_physical()


def convolve(
    u: Tensor,
    k: Tensor,
    skip: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    history: int = 0,
    causal: bool = True,
    spectrum: Tensor | None = None,
) -> Tensor:
    """The dispatcher's op: outputs for u[..., history:]. `spectrum` is a `kernel_spectrum`, in place of k's."""
    compute = compute_dtype(u.dtype)
    x = u.to(compute) if pre_gate is None else u.to(compute) * pre_gate.to(compute)
    if (
        x[..., history:].numel() == 0
    ):  # MKL has no FFT of no rows; the result is empty, but depends on u and k
        y = x[..., history:] * k.to(compute).flatten(1).sum(1)[:, None]
    else:
        n = 2 * (spectrum.shape[1] - 1) if spectrum is not None else transform_length(u.shape[2], k.shape[-1])
        if spectrum is None:
            spectrum = kernel_spectrum(k.to(compute), n, causal)
        y = torch.fft.irfft(torch.fft.rfft(x, n=n) * spectrum, n=n)[..., history : u.shape[2]]
    if skip is not None:
        y = y + skip.to(compute)[:, None] * x[..., history:]
    if post_gate is not None:
        y = y * post_gate.to(compute)
    return y.to(u.dtype).contiguous()


def with_state(u: Tensor, pre_gate: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor | None, int]:
    """What the op reads: u and its gate, or the state and the gated inputs after it, and the length of the state."""
    if state is None:
        return u, pre_gate, 0
    return torch.cat([state, u if pre_gate is None else u * pre_gate], 2), None, state.shape[2]


def next_state(x: Tensor, pre_gate: Tensor | None, taps: int) -> Tensor:
    """The last taps - 1 gated inputs, zeros before the first; `x` and its gate are what `with_state` made."""
    kept = min(taps - 1, x.shape[2])
    last = x.narrow(2, x.shape[2] - kept, kept)
    if pre_gate is not None:
        last = last * pre_gate.narrow(2, x.shape[2] - kept, kept)
    return F.pad(last, (taps - 1 - kept, 0)).clone(memory_format=torch.contiguous_format)


def long_conv(
    u: Tensor,
    k: Tensor,
    *,
    skip: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    causal: bool = True,
    state: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Shapes as `effkern.long_conv`."""
    x, gate, history = with_state(u, pre_gate, state)
    out = convolve(x, k, skip, gate, post_gate, history, causal)
    return (out, next_state(x, gate, k.shape[-1])) if return_state else out
