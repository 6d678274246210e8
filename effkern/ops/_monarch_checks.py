"""Argument checks of the Monarch ops in Python, in the words of csrc/monarch/operands.cpp: for all but the C++ ops."""

from __future__ import annotations

import torch
from torch import Tensor

from effkern.ops._dispatch import FAST_DTYPES, dtype_name

DTYPES = (*FAST_DTYPES, torch.float64, torch.complex64, torch.complex128)


def _require(op: str, condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(f"{op}: {message}")


def check_kinds(op: str, **named: Tensor | None) -> None:
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor) and not (tensor is None and name == "bias"):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")


def _check_input(op: str, x: Tensor, blocks: int, columns: int, name: str) -> None:
    _require(
        op,
        x.dtype in DTYPES,
        f"x must be float32, bfloat16 or float16 (or complex64), got {dtype_name(x.dtype)}",
    )
    features = blocks * columns
    _require(
        op,
        x.dim() >= 1 and x.shape[-1] == features,
        f"x must have {features} features ({name} has {blocks} blocks of {columns}), got shape {tuple(x.shape)}",
    )


def _check_factor(op: str, name: str, w: Tensor, x: Tensor) -> None:
    shape = tuple(w.shape)
    _require(op, w.dim() == 3, f"{name} must have shape (blocks, rows, columns), got {shape}")
    _require(op, w.dtype == x.dtype, f"{name} is {dtype_name(w.dtype)} but x is {dtype_name(x.dtype)}")
    _require(op, w.device == x.device, f"{name} is on another device than x")
    _require(op, all(n >= 1 for n in shape), f"{name} must not be empty, got {shape}")


def check_block_diag(op: str, x: Tensor, w: Tensor) -> None:
    _check_factor(op, "w", w, x)
    _check_input(op, x, w.shape[0], w.shape[2], "w")


def check_factors(op: str, w1: Tensor, w2: Tensor) -> None:
    """Two factors that belong together."""
    for name, w in (("w1", w1), ("w2", w2)):
        _check_factor(op, name, w, w)
    _require(op, w2.dtype == w1.dtype, f"w2 is {dtype_name(w2.dtype)} but w1 is {dtype_name(w1.dtype)}")
    _require(op, w2.device == w1.device, "w2 is on another device than w1")
    (k, q, _), (l, _, r) = w1.shape, w2.shape
    _require(op, l * r == k * q, f"w2 reads {l} * {r} numbers, w1 gives {k} * {q}")


def check_monarch(op: str, x: Tensor, w1: Tensor, w2: Tensor, bias: Tensor | None) -> None:
    _check_factor(op, "w1", w1, x)
    _check_factor(op, "w2", w2, x)
    check_factors(op, w1, w2)
    (k, _, p), (l, s, _) = w1.shape, w2.shape
    _check_input(op, x, k, p, "w1")
    if bias is not None:
        _require(
            op, tuple(bias.shape) == (l * s,), f"bias must have shape ({l * s},), got {tuple(bias.shape)}"
        )
        _require(
            op, bias.dtype == x.dtype, f"bias is {dtype_name(bias.dtype)} but x is {dtype_name(x.dtype)}"
        )
        _require(op, bias.device == x.device, "bias is on another device than x")
