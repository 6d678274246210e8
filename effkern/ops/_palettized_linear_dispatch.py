"""Products with palettised weights at the dispatcher: fakes, gradient, flops, and what runs on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effkern import backends
from effkern.ops import _palette_layout as layout
from effkern.ops._cluster_checks import DIMS, require
from effkern.ops._dispatch import (
    FAST_DTYPES,
    dtype_name,
    register_flops,
    register_gradient,
    register_kernel,
    without_autocast,
)
from effkern.ops.palettize import Palette
from effkern.reference import palettized_linear as reference

_OPS = torch.ops.effkern
NAME = "palettized_linear"
DOUBLE_BACKWARD = f"{NAME}: second derivatives are only available with backend='reference'"


# The arguments of the ops. The dispatcher leaves trailing defaults out.
class _Call(NamedTuple):
    x: Tensor
    indices: Tensor
    lut: Tensor
    bits: int
    groups: int = 1
    dim: int = 1
    bias: Tensor | None = None
    wide: bool = False


class _BackwardCall(NamedTuple):
    grad_out: Tensor
    x: Tensor
    indices: Tensor
    lut: Tensor
    bits: int
    groups: int = 1
    dim: int = 1
    need_x: bool = True
    need_lut: bool = True


def _palette_of(call: _Call | _BackwardCall) -> Palette:
    shape = call.indices.shape[0], call.x.shape[-1]
    return Palette(call.indices, call.lut, shape, call.bits, call.groups, call.dim)


def _fake(*args: Any) -> Tensor:
    call = _Call(*args)
    shape = (*call.x.shape[:-1], call.indices.shape[0])
    return call.x.new_empty(shape, dtype=torch.float32 if call.wide else call.x.dtype)


def _fake_backward(*args: Any) -> tuple[Tensor, Tensor]:
    call = _BackwardCall(*args)
    x, lut = call.x, call.lut
    return x.new_empty(x.shape if call.need_x else (0,)), lut.new_empty(lut.shape if call.need_lut else (0,))


def _composed(*args: Any) -> Tensor:
    """The key CUDA: the dense weight, then PyTorch's matmul."""
    call = _Call(*args)
    backends.record(f"{NAME}:reference")
    return reference.palettized_linear(call.x.float() if call.wide else call.x, _palette_of(call), call.bias)


def _composed_backward(*args: Any) -> tuple[Tensor, Tensor]:
    call = _BackwardCall(*args)
    backends.record(f"{NAME}_backward:reference")
    with torch.enable_grad(), without_autocast(call.x):
        leaves = [t.detach().requires_grad_() for t in (call.x, call.lut)]
        palette = _palette_of(call._replace(lut=leaves[1]))
        out = reference.palettized_linear(leaves[0].float(), palette)
        grads = torch.autograd.grad(out, leaves, call.grad_out.float())
    needs = call.need_x, call.need_lut
    return tuple(g if need else g.new_empty(0) for g, need in zip(grads, needs))  # type: ignore[return-value]


def _check_packed(call: _Call | _BackwardCall) -> None:
    """In the words of csrc/palettized_linear/cpu.cpp."""
    x, indices, lut = call.x, call.indices, call.lut
    bits, groups, dim = call.bits, call.groups, call.dim
    for name, t in (("x", x), ("lut", lut)):
        found = dtype_name(t.dtype)
        require(NAME, t.dtype in FAST_DTYPES, f"{name} must be float32, bfloat16 or float16, got {found}")
    shape = tuple(indices.shape)
    packed = indices.dtype == torch.uint8 and len(shape) == 2 and indices.numel() > 0
    require(NAME, packed, f"indices must be a uint8 matrix, got shape {shape}")
    same = indices.device == x.device and lut.device == x.device
    require(NAME, same, "indices or lut is on another device than x")
    require(NAME, bits in layout.BITS, f"bits must be 1, 2, 3, 4, 6 or 8, got {bits}")
    require(NAME, dim in DIMS, f"dim must be 1, 2 or 4, got {dim}")
    rows, features = shape[0], x.shape[-1] if x.dim() else 0
    require(NAME, groups >= 1 and rows % groups == 0, f"groups {groups} does not divide the {rows} rows")
    fits = features > 0 and features % dim == 0 and layout.row_bytes(features // dim, bits) == shape[1]
    require(NAME, fits, f"x has shape {tuple(x.shape)}, which does not fit indices of shape {shape}")
    clusters = lut.numel() // (groups * dim)
    require(
        NAME,
        1 <= clusters <= 2**bits and clusters * groups * dim == lut.numel(),
        f"lut has shape {tuple(lut.shape)}, which does not fit {groups} groups, dim {dim} and {bits} bits",
    )


def _triton(*args: Any) -> Tensor:
    call = _Call(*args)
    _check_packed(call)
    x, indices, bias = call.x, call.indices, call.bias
    if bias is not None:
        known = bias.shape == indices.shape[:1] and bias.is_floating_point() and bias.device == x.device
        shape = tuple(bias.shape)
        require(NAME, known, f"bias must be floating, of shape ({indices.shape[0]},), got {shape}")
    backends.select(NAME, x.device.type, x.dtype, {"dim": call.dim}, "triton")
    from effkern._triton import palettized_linear as launcher

    backends.record(f"{NAME}:triton")
    return launcher.palettized_linear(x, indices, call.lut, call.bits, call.groups, bias, call.wide)


def _triton_backward(*args: Any) -> tuple[Tensor, Tensor]:
    call = _BackwardCall(*args)
    _check_packed(call)
    grad_out, x, indices = call[:3]
    fits = grad_out.shape == (*x.shape[:-1], indices.shape[0]) and grad_out.dtype in FAST_DTYPES
    require(
        NAME,
        fits and grad_out.device == x.device,
        f"grad_out has shape {tuple(grad_out.shape)}, which does not match x and the weight, or another dtype or "
        "device",
    )
    backends.select(NAME, x.device.type, x.dtype, {"dim": call.dim}, "triton")
    from effkern._triton import palettized_linear as launcher

    backends.record(f"{NAME}_backward:triton")
    return launcher.palettized_linear_backward(*call[:6], call.need_x, call.need_lut)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, indices, lut, *settings = inputs
    ctx.count = len(inputs)
    ctx.settings = [*settings[:3], 1, 1][:3]  # trailing defaults are missing
    bias = settings[3] if len(settings) > 3 else None
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, indices, lut)


def _gradient_of(op: str) -> Callable[..., tuple[Tensor | None, ...]]:
    backward = getattr(_OPS, f"{op}_backward")

    def gradient(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, indices, lut = ctx.saved_tensors
        need_x, _, need_lut = ctx.needs_input_grad[:3]
        found: list[Tensor | None] = [None] * ctx.count
        if need_x or need_lut:
            grads = backward(grad_out, x, indices, lut, *ctx.settings, need_x, need_lut)
            found[0], found[2] = (g if need else None for g, need in zip(grads, (need_x, need_lut)))
        if ctx.bias_dtype is not None and ctx.needs_input_grad[6]:
            found[6] = grad_out.reshape(-1, len(indices)).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return tuple(found)

    return gradient


def _refuse(ctx: Any, *grads: Any) -> Any:
    raise NotImplementedError(DOUBLE_BACKWARD)


def _dispatched_flops(x: Tensor, indices: Tensor, *_: Any, **__: Any) -> int:
    return 2 * x.numel() * indices.shape[0]


for _op in (NAME, f"{NAME}_triton"):
    torch.library.register_fake(f"effkern::{_op}", _fake)
    torch.library.register_fake(f"effkern::{_op}_backward", _fake_backward)
    register_gradient(_op, _setup_context, _gradient_of(_op))
    torch.library.register_autograd(f"effkern::{_op}_backward", _refuse)
    register_flops(_op, _dispatched_flops)
    register_flops(f"{_op}_backward", lambda grad_out, *args, **_: 2 * _dispatched_flops(*args))
register_kernel(NAME, _composed, "CUDA")
register_kernel(f"{NAME}_backward", _composed_backward, "CUDA")
register_kernel(f"{NAME}_triton", _triton, "CPU", "CUDA")
register_kernel(f"{NAME}_triton_backward", _triton_backward, "CPU", "CUDA")
