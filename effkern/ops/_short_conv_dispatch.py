"""The short convolution at the dispatcher: fakes, gradient, autocast, flops, and what runs on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effkern import backends
from effkern.ops._dispatch import (
    register_autocast,
    register_flops,
    register_gradient,
    register_kernel,
)
from effkern.ops._short_conv_checks import check_short_conv
from effkern.reference import short_conv as reference

_OPS = torch.ops.effkern
Gradients = tuple[Tensor, Tensor, Tensor, Tensor]
DOUBLE_BACKWARD = "short_conv: second derivatives are only available with backend='reference'"


def short_conv_flops(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    backward: bool = False,
    **_: Any,
) -> int:
    """2 W a position forward; backward 2 W each for x and the weight, and with SiLU the sums once more."""
    products = (3 if activation == "silu" else 2) if backward else 1
    return 2 * products * x.numel() * weight.shape[1]


def short_conv_bytes(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    state: Tensor | None = None,
    backward: bool = False,
    **_: Any,
) -> int:
    """x and out once, and the parameters; backward reads x and grad_out and writes a gradient of everything."""
    rest = weight.nbytes + (0 if bias is None else bias.nbytes) + (0 if state is None else state.nbytes)
    return 3 * x.nbytes + 2 * rest if backward else 2 * x.nbytes + rest


def _fake_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, state: Tensor | None = None, silu: bool = False
) -> Tensor:
    check_short_conv(x, weight, bias, state)
    return x.new_empty(x.shape)


def _fake_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    silu: bool = False,
    need_x: bool = True,
    need_weight: bool = True,
    need_bias: bool = True,
    need_state: bool = True,
) -> tuple[Tensor, ...]:
    check_short_conv(x, weight, bias, state)
    wanted = (x, need_x), (weight, need_weight), (bias, need_bias), (state, need_state)
    return tuple(
        (x if t is None else t).new_empty(t.shape if t is not None and needed else (0,))
        for t, needed in wanted
    )


def _composed_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, state: Tensor | None = None, silu: bool = False
) -> Tensor:
    """The key CUDA: PyTorch's own convolution."""
    check_short_conv(x, weight, bias, state)
    backends.record("short_conv:reference")
    out = reference.short_conv(x, weight, bias, state=state, activation="silu" if silu else None)
    assert isinstance(out, Tensor)
    return out.contiguous()


def _composed_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    silu: bool = False,
    need_x: bool = True,
    need_weight: bool = True,
    need_bias: bool = True,
    need_state: bool = True,
) -> Gradients:
    backends.record("short_conv_backward:reference")
    tensors = (x, weight, bias, state)
    needed = [
        t is not None and n
        for t, n in zip(tensors, (need_x, need_weight, need_bias, need_state), strict=True)
    ]
    grads: list[Tensor | None] = [None] * 4
    if x.numel() == 0:
        grads = [t if t is None else torch.zeros_like(t) for t in tensors]
    else:
        (channels, taps), compute = weight.shape, torch.float32
        line, taps_of_channels = (
            reference.past_inputs(x, taps, state).to(compute),
            weight.to(compute)[:, None],
        )
        grad = grad_out.to(compute)
        if silu:
            sums = F.conv1d(
                line, taps_of_channels, None if bias is None else bias.to(compute), groups=channels
            )
            share = sums.sigmoid()
            grad = grad * share * (1 + sums * (1 - share))
        grad_line, grad_weight, _ = torch.ops.aten.convolution_backward(
            *(grad, line, taps_of_channels, None, [1], [0], [1], False, [0], channels),
            [needed[0] or needed[3], needed[1], False],
        )
        if grad_line is not None:
            # Copies: outputs of an op share no memory.
            grads[0], grads[3] = grad_line[..., taps - 1 :].clone(), grad_line[..., : taps - 1].clone()
        if grad_weight is not None:
            grads[1] = grad_weight[:, 0]
        if needed[2]:
            grads[2] = grad.sum((0, 2))
    found = [
        (x if t is None else t).new_empty(0)
        if g is None or t is None or not n
        else g.to(t.dtype).contiguous()
        for t, g, n in zip(tensors, grads, needed, strict=True)
    ]
    return found[0], found[1], found[2], found[3]


def _triton_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, state: Tensor | None = None, silu: bool = False
) -> Tensor:
    check_short_conv(x, weight, bias, state)
    backends.select("short_conv", x.device.type, x.dtype, {}, "triton")
    from effkern._triton import short_conv as launcher

    backends.record("short_conv:triton")
    return launcher.short_conv(x, weight, bias, state, silu)


def _triton_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    silu: bool = False,
    *needed: bool,
    **named: bool,
) -> Gradients:
    check_short_conv(x, weight, bias, state)
    backends.select("short_conv", x.device.type, x.dtype, {}, "triton")
    from effkern._triton import short_conv as launcher

    backends.record("short_conv_backward:triton")
    return launcher.short_conv_backward(grad_out, x, weight, bias, state, silu, *needed, **named)


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.count = len(inputs)
    ctx.silu = len(inputs) > 4 and inputs[4]
    ctx.save_for_backward(*(*inputs[:4], None, None)[:4])


def _gradient(backward: Callable[..., Gradients]) -> Callable[..., tuple[Tensor | None, ...]]:
    def gradient(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        needed = [bool(n) for n in (*ctx.needs_input_grad[: min(4, ctx.count)], False, False)[:4]]
        grads = backward(grad_out, *ctx.saved_tensors, ctx.silu, *needed)
        found = [g if wanted else None for g, wanted in zip(grads, needed, strict=True)]
        return (*found, None)[: ctx.count]

    return gradient


def _refuse(ctx: Any, *grads: Any) -> Any:
    raise NotImplementedError(DOUBLE_BACKWARD)


def _flops_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Any = None,
    state: Any = None,
    silu: bool = False,
    *_: Any,
    **__: Any,
) -> int:
    return short_conv_flops(x, weight, activation="silu" if silu else None, backward=True)


for _op in ("short_conv", "short_conv_triton"):
    _backward = f"{_op}_backward"
    torch.library.register_fake(f"effkern::{_op}", _fake_forward)
    torch.library.register_fake(f"effkern::{_backward}", _fake_backward)
    register_gradient(_op, _context, _gradient(getattr(_OPS, _backward)))
    torch.library.register_autograd(f"effkern::{_backward}", _refuse)
    register_autocast(_op, 3)  # a state keeps its dtype
    register_flops(_op, lambda x, weight, *_, **__: short_conv_flops(x, weight))
    register_flops(_backward, _flops_backward)
register_kernel("short_conv", _composed_forward, "CUDA")
register_kernel("short_conv_backward", _composed_backward, "CUDA")
register_kernel("short_conv_triton", _triton_forward, "CPU", "CUDA")
register_kernel("short_conv_triton_backward", _triton_backward, "CPU", "CUDA")
