"""Plain PyTorch couplings, as the kernels round them: every product and every sum by itself."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def result_dtype(f: Tensor, y: Tensor | None, x: Tensor | None, q: int | None) -> torch.dtype:
    """That of a sum of the arguments; with a grid always float32."""
    if q is not None:
        return torch.float32
    return functools.reduce(torch.promote_types, [t.dtype for t in (f, y, x) if t is not None])


def _plus(a: Tensor, b: Tensor, scale: float, wide: torch.dtype) -> Tensor:
    """a + scale b in the dtype `wide`; where one of them has it, PyTorch widens the other on the way."""
    if scale != 1 and not b.is_cuda:
        # torch.add would round the product in some places of a tensor and not in others.
        return a + b.to(wide) * scale
    a = a if wide in (a.dtype, b.dtype) else a.to(wide)
    return a + b if scale == 1 else torch.add(a, b, alpha=scale)


def couple(
    f: Tensor,
    y: Tensor | None = None,
    x: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    subtract: bool = False,
    q: int | None = None,
    keep: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, kept and largest; those of the last two that were not asked for have shape (0,)."""
    dtype = result_dtype(f, y, x, q)
    wide = torch.promote_types(dtype, torch.float32)
    kept = f.new_empty(0) if keep is None or x is None else x * keep
    if q is not None:
        f, y, x = (t.float() if t is not None and t.dtype == torch.float64 else t for t in (f, y, x))  # type: ignore[assignment]
    out = f if x is None else _plus(f, x, alpha, wide)
    if q is not None:
        out = (out.to(wide) * 2.0**q).round_().mul_(2.0**-q)
    if y is not None and subtract:
        out = (y if beta == 1 else y.to(wide) * beta) - out
    elif y is not None:
        out = _plus(out, y, beta, wide)
    if q is None:
        return out.to(dtype), kept, f.new_empty(0, dtype=torch.float32)
    largest = out.abs().amax() if out.numel() else out.new_zeros(())
    return out, kept, largest


def coupling(
    f: Tensor,
    y: Tensor | None = None,
    x: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    subtract: bool = False,
    q: int | None = None,
    keep: float | None = None,
) -> Tensor | tuple[Tensor, ...]:
    return asked(couple(f, y, x, alpha, beta, subtract, q, keep), q, keep)


def asked(
    found: tuple[Tensor, Tensor, Tensor], q: int | None, keep: float | None
) -> Tensor | tuple[Tensor, ...]:
    """out, or a tuple of out and what else was asked for."""
    out, kept, largest = found
    more = [t for t, there in ((kept, keep is not None), (largest, q is not None)) if there]
    return (out, *more) if more else out
