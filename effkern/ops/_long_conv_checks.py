"""Argument checks of the long convolutions: what the public functions alone know, and what
csrc/long_conv/operands.cpp checks, for every other path."""

from __future__ import annotations

import torch
from torch import Tensor

from effkern.ops._dispatch import FAST_DTYPES, dtype_name, require_dense

_OP = "long_conv"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(f"{_OP}: {message}")


def check_kinds(**named: Tensor | None) -> None:
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor) and not (tensor is None and name not in ("u", "k")):
            raise TypeError(f"{_OP}: {name} must be a tensor, got {type(tensor).__name__}")
    require_dense(_OP, **named)


def check_kernel(k: Tensor, channels: int | None, causal: bool) -> None:
    """The shape of k, alone or beside inputs of so many channels."""
    rows = "H" if channels is None else channels
    expected = f"({rows}, Lk)" if causal else f"({rows}, 2, Lk)"
    fits = k.dim() == (2 if causal else 3) and (causal or k.shape[1] == 2)
    fits = fits and (channels is None or k.shape[0] == channels)
    _require(fits, f"k must have shape {expected} with causal={causal}, got {tuple(k.shape)}")
    _require(k.shape[-1] >= 1, f"k has no taps, got shape {tuple(k.shape)}")


def check_dtype(name: str, tensor: Tensor) -> None:
    allowed = (*FAST_DTYPES, torch.float64)
    _require(
        tensor.dtype in allowed,
        f"{name} must be float32, bfloat16 or float16, got {dtype_name(tensor.dtype)}",
    )


def check_like(name: str, tensor: Tensor, u: Tensor, shape: tuple[int, ...], any_float: bool = False) -> None:
    """An argument that belongs to u; `any_float`: or float32, whatever u is."""
    _require(
        tuple(tensor.shape) == shape,
        f"{name} has shape {tuple(tensor.shape)}, which does not fit u's {tuple(u.shape)}: expected {shape}",
    )
    _require(
        tensor.dtype == u.dtype or (any_float and tensor.dtype == torch.float32),
        f"{name} must have u's dtype{' or float32' if any_float else ''}, got {dtype_name(tensor.dtype)} beside "
        f"{dtype_name(u.dtype)}",
    )
    _require(tensor.device == u.device, f"{name} is on another device than u")


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
    batch, channels, positions = u.shape
    _require(
        0 <= history <= positions,
        f"history must be between 0 and the {positions} positions of u, got {history}",
    )
    _require(causal or history == 0, f"history must be 0 where taps look ahead, got {history}")
    _require(pre_gate is None or history == 0, "pre_gate cannot be given with a history")
    check_kernel(k, channels, causal)
    check_like("k", k, u, tuple(k.shape), any_float=True)
    if skip is not None:
        check_like("skip", skip, u, (channels,), any_float=True)
    for name, gate in (("pre_gate", pre_gate), ("post_gate", post_gate)):
        if gate is not None:
            check_like(name, gate, u, (batch, channels, positions - history))


def check_parts(
    u: Tensor,
    k: Tensor,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    causal: bool,
    state: Tensor | None,
    return_state: bool,
) -> None:
    """What only the public function has, and what it joins for the op."""
    _require(u.dim() == 3, f"u must have shape (B, H, L), got {tuple(u.shape)}")
    batch, channels, length = u.shape
    check_kernel(k, channels, causal)
    if state is None and not return_state:
        _require(
            k.shape[-1] <= length or length == 0,
            f"k has {k.shape[-1]} taps, u only {length} positions; cut k, or, where u is part of a longer input, "
            f"give state or ask for return_state",
        )
    elif not causal:
        raise ValueError(f"{_OP}: state and return_state are for causal=True")
    if state is not None:
        check_like("state", state, u, (batch, channels, k.shape[-1] - 1))
        for name, gate in (("pre_gate", pre_gate), ("post_gate", post_gate)):
            if gate is not None:
                check_like(name, gate, u, (batch, channels, length))
