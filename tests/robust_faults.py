"""The faults that the fuzzers put into the arguments of valid calls."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

Arguments = dict[str, Any]
Draw = Callable[..., Any]

_DTYPES = (
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    *(torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64),
)


def _axis(draw: Draw, tensor: Tensor) -> int:
    return draw(st.integers(0, tensor.dim() - 1), label="axis")


def _one_less(draw: Draw, tensor: Tensor) -> Tensor:
    if tensor.dim() == 0:
        return tensor
    axis = _axis(draw, tensor)
    return tensor.narrow(axis, 0, max(0, tensor.shape[axis] - 1))


def _one_more(draw: Draw, tensor: Tensor) -> Tensor:
    if tensor.numel() == 0 or tensor.dim() == 0:
        return tensor
    axis = _axis(draw, tensor)
    return torch.cat([tensor, tensor.narrow(axis, 0, 1)], axis)


def _empty(draw: Draw, tensor: Tensor) -> Tensor:
    return tensor.narrow(_axis(draw, tensor), 0, 0) if tensor.dim() else tensor


def _one_axis_more(draw: Draw, tensor: Tensor) -> Tensor:
    return tensor.unsqueeze(draw(st.integers(0, tensor.dim()), label="axis"))


def _one_axis_less(draw: Draw, tensor: Tensor) -> Tensor:
    if tensor.dim() == 0:
        return tensor
    axis = _axis(draw, tensor)
    return tensor.select(axis, 0) if tensor.shape[axis] else tensor.squeeze(axis)


def _swapped(draw: Draw, tensor: Tensor) -> Tensor:
    if tensor.dim() < 2:
        return tensor
    first, second = draw(st.permutations(range(tensor.dim())), label="axes")[:2]
    return tensor.transpose(first, second)


def _another_dtype(draw: Draw, tensor: Tensor) -> Tensor:
    return tensor.to(draw(st.sampled_from(_DTYPES), label="dtype"))


def _no_tensor(draw: Draw, tensor: Tensor) -> object:
    return draw(st.sampled_from([[1.0], 1.5, "x", (), {}, object]), label="value")


def _sparse(draw: Draw, tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta else tensor.detach().to_sparse()


def _another_device(draw: Draw, tensor: Tensor) -> Tensor:
    return tensor.to("meta")


def _entry(*values: float) -> Callable[[Draw, Tensor], Tensor]:
    def put(draw: Draw, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.is_meta:
            return tensor
        changed = tensor.detach().clone(memory_format=torch.contiguous_format)
        place = draw(st.integers(0, tensor.numel() - 1), label="place")
        changed.view(-1)[place] = draw(st.sampled_from(values), label="value")
        return changed

    return put


def _wild_integer(draw: Draw, tensor: Tensor) -> Tensor:
    if tensor.is_floating_point() or tensor.is_complex() or tensor.numel() == 0 or tensor.is_meta:
        return tensor
    changed = tensor.clone(memory_format=torch.contiguous_format)
    place = draw(st.integers(0, tensor.numel() - 1), label="place")
    values = [-(2**31), -1, 0, 1, 7, 2**31 - 1] if tensor.dtype in (torch.int32, torch.int64) else [0, 1]
    changed.view(-1)[place] = draw(st.sampled_from(values), label="value")
    return changed


def _other_strides(draw: Draw, tensor: Tensor) -> Tensor:
    """The same numbers behind every second, or the reverse order of, places; NaN between them."""
    if tensor.dim() == 0 or tensor.is_meta:
        return tensor
    if draw(st.booleans(), label="reversed axes"):
        axes = tuple(range(tensor.dim()))[::-1]
        return tensor.permute(axes).contiguous().permute(axes)
    steps = [draw(st.integers(1, 3), label="step") for _ in tensor.shape]
    room = tensor.new_zeros([step * n + 2 for step, n in zip(steps, tensor.shape, strict=True)])
    if room.is_floating_point():
        room.fill_(math.nan)
    view = room[tuple(slice(1, 1 + step * n, step) for step, n in zip(steps, tensor.shape, strict=True))]
    return view.copy_(tensor)


def _one_place(draw: Draw, tensor: Tensor) -> Tensor:
    """Every entry along an axis in the same place of memory: stride 0."""
    if tensor.dim() == 0 or tensor.numel() == 0:
        return tensor
    axis = _axis(draw, tensor)
    return tensor.narrow(axis, 0, 1).expand(tensor.shape)


def _overlapping(draw: Draw, tensor: Tensor) -> Tensor:
    """Windows on one row of memory: neighbours along every axis share all but one entry."""
    if tensor.dim() == 0 or tensor.numel() == 0 or tensor.is_meta:
        return tensor
    line = tensor.detach().reshape(-1)
    return line.as_strided(tensor.shape, [1] * tensor.dim())


def _lazily_negated(draw: Draw, tensor: Tensor) -> Tensor:
    """A real tensor whose sign PyTorch has yet to change (its negative bit is set)."""
    if not tensor.is_floating_point() or tensor.is_meta:
        return tensor
    return torch._neg_view(tensor.detach())


def _trained(draw: Draw, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return torch.nn.Parameter(tensor.detach().clone())


def _of_inference(draw: Draw, tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


FAULTS: dict[str, Callable[[Draw, Any], Any]] = {
    "a size one less": _one_less,
    "a size one more": _one_more,
    "an axis of size 0": _empty,
    "an axis more": _one_axis_more,
    "an axis less": _one_axis_less,
    "two axes swapped": _swapped,
    "another dtype": _another_dtype,
    "no tensor": _no_tensor,
    "a sparse tensor": _sparse,
    "another device": _another_device,
    "NaN": _entry(math.nan),
    "infinity": _entry(math.inf, -math.inf),
    "subnormal numbers, -0": _entry(1e-40, -1e-42, 6e-8, -0.0),
    "large numbers": _entry(1e4, -3e4),
    "a wild integer": _wild_integer,
    "other strides": _other_strides,
    "stride 0": _one_place,
    "overlapping memory": _overlapping,
    "lazy negation": _lazily_negated,
    "requires a gradient": _trained,
    "an inference tensor": _of_inference,
}

OUT_OF_RANGE = "a number out of its range"
_REALS = (math.nan, math.inf, -math.inf, 1e300, -1.0, 0.0)
_SIZES = (-(2**40), -1, 0, 257, 2**31, 2**62)
# Numbers that these arguments may get; some of them are in range.
SCALARS: dict[tuple[str, str], tuple[Any, ...]] = {
    ("attention", "scale"): (*_REALS[:4], 0.0, -0.25),
    ("attention", "softcap"): (*_REALS, 1e-3),
    ("attention", "dropout_p"): (math.nan, math.inf, -0.1, 1.0, 1.5),
    ("attention_decode", "scale"): (*_REALS[:4], 0.0),
    ("attention_decode", "softcap"): (*_REALS, 1e-3),
    ("dkm", "temperature"): (*_REALS, 1e-300),
    ("dkm", "tolerance"): (*_REALS, 1e300),
    ("dkm", "iterations"): (-(2**40), -1, 0, 7),
    ("dkm", "groups"): _SIZES,
    ("dkm", "dim"): (*_SIZES, 2, 3, 4),
    ("kmeans_init", "clusters"): (*_SIZES, 1, 256),
    ("kmeans_init", "groups"): _SIZES,
    ("kmeans_init", "dim"): (*_SIZES, 2, 3, 4),
    ("palettize", "groups"): _SIZES,
    ("palettize", "dim"): (*_SIZES, 2, 3, 4),
    ("coupling", "q"): (-(2**40), -1, 0, 23, 24, 2**31),
    ("companion_kernel", "length"): (-(2**40), -1, 0, 1),
    ("vandermonde_kernel", "length"): (-(2**40), -1, 0, 1),
    ("smooth_kernel", "width"): (*_SIZES[:3], 2, 4, 5),
    ("smooth_kernel", "squash"): (*_REALS, 1e300),
    ("monarch_project", "nblocks"): _SIZES,
    ("monarch_project", "rank"): _SIZES,
}
