"""Launcher of the Triton coupling. Unverified on hardware: runs and timings there are still due."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton

from . import coupling_kernels as kernels
from .attention import supports as _device_supports
from .rows import on

_BLOCK = 1024  # numbers a program
_WARPS = 4


def supports(device: torch.device, dtype: torch.dtype, sizes: Mapping[str, int]) -> str | None:
    """None when the launcher takes such a request, else the reason it does not."""
    return _device_supports(device, dtype, {})


def couple(f, y=None, x=None, alpha=1.0, beta=1.0, subtract=False, q=None, keep=None, dtype=torch.float32):
    """(out, kept, largest) as `effkern.coupling` has them, out in `dtype`; what was not asked for has shape (0,)."""
    f, y, x = (t if t is None else t.contiguous() for t in (f, y, x))
    count = f.numel()
    programs = triton.cdiv(count, _BLOCK)
    out = torch.empty(f.shape, dtype=dtype, device=f.device)
    kept = torch.empty(0 if keep is None else f.shape, dtype=f.dtype if keep is None else x.dtype, device=f.device)
    largest = torch.empty(0 if q is None else programs, dtype=torch.int32, device=f.device)
    step = 2.0 ** (q or 0)
    if count:
        with on(f.device):
            kernels.coupling_kernel[(programs,)](
                f, y, x, out, kept, largest, count, float(alpha), float(beta), float(keep or 0), step, 1 / step,
                HAS_Y=y is not None, HAS_X=x is not None, SUBTRACT=subtract, GRID=q is not None,
                KEEP=keep is not None, BLOCK=_BLOCK, num_warps=_WARPS, enable_fp_fusion=False)
    if q is None:
        return out, kept, torch.empty(0, dtype=torch.float32, device=f.device)
    return out, kept, largest.amax().view(torch.float32) if count else largest.new_zeros((), dtype=torch.float32)
