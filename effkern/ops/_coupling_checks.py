"""Argument checks of the coupling in Python, in the words of csrc/coupling/cpu.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from effkern.ops._dispatch import FAST_DTYPES, dtype_name

FINEST = 23  # a float32 has 24 bits


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(f"coupling: {message}")


def check_kinds(f: object, y: object, x: object, q: object) -> None:
    for name, t in (("f", f), ("y", y), ("x", x)):
        if not isinstance(t, Tensor) and (t is not None or name == "f"):
            raise TypeError(f"coupling: {name} must be a tensor, got {type(t).__name__}")
    if q is not None and (isinstance(q, bool) or not isinstance(q, int)):
        raise TypeError(f"coupling: q must be None or a whole number, got {q!r}")


def check_coupling(
    f: Tensor, y: Tensor | None, x: Tensor | None, subtract: bool, q: int | None, keep: float | None
) -> None:
    for name, t in (("f", f), ("y", y), ("x", x)):
        if t is None:
            continue
        allowed = (*FAST_DTYPES, torch.float64)
        _require(
            t.dtype in allowed, f"{name} must be float32, bfloat16 or float16, got {dtype_name(t.dtype)}"
        )
        _require(t.shape == f.shape, f"{name} has shape {tuple(t.shape)}, f has {tuple(f.shape)}")
        _require(t.device == f.device, f"{name} is on another device than f")
    _require(not (y is None and x is None and q is None), "expected y, x or q beside f")
    _require(not subtract or y is not None, "subtract needs y")
    _require(keep is None or x is not None, "keep needs x")
    if q is not None and not 0 <= q <= FINEST:
        raise RuntimeError(f"coupling: q must be from 0 to {FINEST}, got {q}")
