"""Argument checks of the short convolution in Python, in the words of csrc/short_conv/cpu.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from effkern.ops._dispatch import FAST_DTYPES, dtype_name

DTYPES = (*FAST_DTYPES, torch.float64)
MAX_TAPS = 256
ACTIVATIONS = (None, "silu")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(f"short_conv: {message}")


def check_kinds(activation: object, **named: Tensor | None) -> None:
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor) and not (tensor is None and name in ("bias", "state")):
            raise TypeError(f"short_conv: {name} must be a tensor, got {type(tensor).__name__}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"short_conv: activation must be None or 'silu', got {activation!r}")


def check_short_conv(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None) -> None:
    _require(x.dtype in DTYPES, f"x must be float32, bfloat16 or float16, got {dtype_name(x.dtype)}")
    _require(x.dim() == 3, f"x must have shape (batch, channels, length), got {tuple(x.shape)}")
    batch, channels, _ = x.shape
    _require(
        weight.dim() == 2 and weight.shape[0] == channels,
        f"weight must have shape ({channels}, taps), got {tuple(weight.shape)}",
    )
    taps = weight.shape[1]
    _require(1 <= taps <= MAX_TAPS, f"weight has {taps} taps, expected 1 to {MAX_TAPS}")
    _check_kind("weight", weight, x)
    if bias is not None:
        _require(
            bias.dim() == 1 and bias.shape[0] == channels,
            f"bias must have shape ({channels},), got {tuple(bias.shape)}",
        )
        _check_kind("bias", bias, x)
    if state is not None:
        _require(
            state.dim() == 3
            and state.shape[0] == batch
            and state.shape[1] == channels
            and state.shape[2] == taps - 1,
            f"state must have shape ({batch}, {channels}, {taps - 1}), got {tuple(state.shape)}",
        )
        _check_kind("state", state, x)


def _check_kind(name: str, tensor: Tensor, x: Tensor) -> None:
    _require(
        tensor.dtype in (x.dtype, torch.float32),
        f"{name} is {dtype_name(tensor.dtype)}, expected {dtype_name(x.dtype)} as x or float32",
    )
    _require(tensor.device == x.device, f"{name} is on another device than x")
