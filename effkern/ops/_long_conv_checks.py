"""Argument checks of the long convolutions: what the public functions alone know, and what csrc/long_conv/cpu.cpp
checks, for every other path."""

from __future__ import annotations

import torch
from torch import Tensor

from effkern.ops._dispatch import FAST_DTYPES, dtype_name

_OP = "long_conv"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(f"{_OP}: {message}")


def check_kinds(**named: Tensor | None) -> None:
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor) and not (tensor is None and name not in ("u", "k")):
            raise TypeError(f"{_OP}: {name} must be a tensor, got {type(tensor).__name__}")


def check_kernel(k: Tensor, channels: int | None, causal: bool) -> None:
    """The shape of k, alone or beside inputs of so many channels."""
    rows = "channels" if channels is None else channels
    expected = f"({rows}, taps)" if causal else f"({rows}, 2, taps)"
    fits = k.dim() == (2 if causal else 3) and (causal or k.shape[1] == 2)
    fits = fits and (channels is None or k.shape[0] == channels)
    _require(fits, f"k must have shape {expected} with causal={causal}, got {tuple(k.shape)}")
    _require(k.shape[-1] >= 1, f"k must have at least one tap, got shape {tuple(k.shape)}")


def check_dtype(name: str, tensor: Tensor) -> None:
    allowed = (*FAST_DTYPES, torch.float64)
    _require(
        tensor.dtype in allowed,
        f"{name} must be float32, bfloat16 or float16, got {dtype_name(tensor.dtype)}",
    )


def check_convolution(
    u: Tensor,
    k: Tensor,
    skip: Tensor | None,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    history: int,
    causal: bool,
) -> None:
    """The arguments of the dispatcher's op."""
    check_dtype("u", u)
    _require(u.dim() == 3, f"u must have shape (B, H, L), got {tuple(u.shape)}")
    _require(0 <= history <= u.shape[2], f"history is {history}, u has {u.shape[2]} positions")
    _require(causal or history == 0, "only a causal convolution has a history")
    _require(pre_gate is None or history == 0, "pre_gate does not go with a history, which is gated already")
    batch, channels, positions = u.shape
    check_kernel(k, channels, causal)
    if skip is not None:
        _require(
            skip.dim() == 1 and skip.shape[0] == channels,
            f"skip must have shape ({channels},), got {tuple(skip.shape)}",
        )
    for name, weight in (("k", k), ("skip", skip)):
        if weight is not None:
            _require(
                weight.dtype in (u.dtype, torch.float32),
                f"{name} must be float32 or of u's dtype {dtype_name(u.dtype)}, got {dtype_name(weight.dtype)}",
            )
            _require(weight.device == u.device, f"{name} is on another device than u")
    for name, gate in (("pre_gate", pre_gate), ("post_gate", post_gate)):
        if gate is not None:
            _check_like(name, gate, u, (batch, channels, positions - history))


def _check_like(name: str, tensor: Tensor, u: Tensor, shape: tuple[int, ...]) -> None:
    _require(tuple(tensor.shape) == shape, f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    _require(tensor.dtype == u.dtype, f"{name} is {dtype_name(tensor.dtype)} but u is {dtype_name(u.dtype)}")
    _require(tensor.device == u.device, f"{name} is on another device than u")


def check_stream(
    u: Tensor,
    k: Tensor,
    pre_gate: Tensor | None,
    causal: bool,
    state: Tensor | None,
    return_state: bool,
) -> None:
    """The arguments that only the public function has, and those that it joins for the op."""
    _require(u.dim() == 3, f"u must have shape (B, H, L), got {tuple(u.shape)}")
    batch, channels, length = u.shape
    check_kernel(k, channels, causal)
    if state is None and not return_state:
        _require(
            k.shape[-1] <= length or length == 0,
            f"k has {k.shape[-1]} taps, u only {length} positions; cut k, or, where u is part of a longer input, "
            f"give state or ask for return_state",
        )
        return
    if not causal:
        raise ValueError(f"{_OP}: state and return_state are for causal=True")
    if state is not None:
        _check_like("state", state, u, (batch, channels, k.shape[-1] - 1))
        if pre_gate is not None:
            _check_like("pre_gate", pre_gate, u, (batch, channels, length))
