"""The long convolution at the dispatcher: fakes, gradients, flops, and what runs where there is no kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from effkern import backends
from effkern.ops._dispatch import (
    register_flops,
    register_gradient,
    register_kernel,
)
from effkern.ops._long_conv_checks import check_convolution, check_dtype, check_kernel
from effkern.ops._long_conv_cost import op_flops
from effkern.reference import long_conv as reference

_OPS = torch.ops.effkern
DOUBLE_BACKWARD = "long_conv: second derivatives are only available with backend='reference'"


class _Call(NamedTuple):
    """The arguments of the forward op."""

    u: Tensor
    k: Tensor
    spectrum: Tensor | None = None
    skip: Tensor | None = None
    pre_gate: Tensor | None = None
    post_gate: Tensor | None = None
    history: int = 0
    causal: bool = True

    def check(self) -> None:
        check_convolution(self.u, self.k, *self[3:])

    def without_spectrum(self) -> tuple[Any, ...]:
        return (*self[:2], *self[3:])


_NEEDS = ("need_u", "need_k", "need_skip", "need_pre", "need_post")


class _BackwardCall(NamedTuple):
    """The arguments of the backward op."""

    grad_out: Tensor
    call: _Call
    needs: tuple[bool, ...]

    @classmethod
    def bind(cls, grad_out: Tensor, *args: Any, **named: Any) -> _BackwardCall:
        count = len(_Call._fields)
        needs = (*args[count:], *(named.pop(name, True) for name in _NEEDS[max(0, len(args) - count) :]))
        return cls(grad_out, _Call(*args[:count], **named), needs)

    def wanted(self) -> list[tuple[Tensor, bool]]:
        """The arguments with gradients, and whether each is wanted; one that is not there counts as an unwanted u."""
        u, k, _, *others = self.call[:6]
        return [
            (u, False) if t is None else (t, need)
            for t, need in zip((u, k, *others), self.needs, strict=True)
        ]


def _fake_forward(*args: Any, **named: Any) -> Tensor:
    call = _Call(*args, **named)
    call.check()
    return call.u.new_empty((*call.u.shape[:2], call.u.shape[2] - call.history))


def _fake_backward(*args: Any, **named: Any) -> tuple[Tensor, ...]:
    bound = _BackwardCall.bind(*args, **named)
    return tuple(t.new_empty(t.shape if wanted else (0,)) for t, wanted in bound.wanted())


def _fake_spectrum(k: Tensor, length: int, causal: bool = True) -> Tensor:
    check_kernel(k, None, causal)
    check_dtype("k", k)
    numbers: int | torch.SymInt = reference.transform_length(length, k.shape[-1]) + 2
    if k.device.type == "cpu" and isinstance(k, FakeTensor):  # the kernel's own affair
        numbers = torch.library.get_ctx().new_dynamic_size()
    return k.new_empty((k.shape[0], numbers), dtype=torch.float32)


def _composed_forward(*args: Any, **named: Any) -> Tensor:
    """The key CUDA of `long_conv` until the Triton kernels have run on hardware: PyTorch's FFTs."""
    call = _Call(*args, **named)
    call.check()
    backends.record("long_conv:reference")
    spectrum, ready = call.spectrum, None
    if spectrum is not None:
        numbers = 2 * (spectrum.shape[1] // 2 - 1)  # of the real transform
        enough = reference.transform_length(call.u.shape[2], call.k.shape[-1])
        fits = spectrum.shape[0] == call.u.shape[1] and numbers >= enough
        if not fits or spectrum.dtype != torch.float32:
            raise RuntimeError(
                "long_conv: spectrum was prepared for another kernel or for fewer positions than u has"
            )
        ready = torch.view_as_complex(spectrum.unflatten(1, (-1, 2)))
    u, k, _, skip, pre_gate, post_gate, history, causal = call
    return reference.convolve(u, k, skip, pre_gate, post_gate, history, causal, ready)


def _composed_spectrum(k: Tensor, length: int, causal: bool = True) -> Tensor:
    check_kernel(k, None, causal)
    check_dtype("k", k)
    n = reference.transform_length(length, k.shape[-1])
    return torch.view_as_real(reference.kernel_spectrum(k.float(), n, causal)).flatten(1)


def _composed_backward(*args: Any, **named: Any) -> tuple[Tensor, ...]:
    bound = _BackwardCall.bind(*args, **named)
    grad_out, (u, k, _, skip, pre_gate, post_gate, history, causal), _ = bound
    backends.record("long_conv_backward:reference")
    wanted = bound.wanted()
    if grad_out.numel() == 0:
        return tuple(t.new_zeros(t.shape if flag else (0,)) for t, flag in wanted)
    wide = [None if t is None else t.float() for t in (grad_out, u, k, skip, pre_gate, post_gate)]
    sent, x, taps, scale, before, after = wide
    assert sent is not None and x is not None and taps is not None
    inputs = x if before is None else before * x
    n = reference.transform_length(u.shape[2], k.shape[-1])
    inputs_f = torch.fft.rfft(inputs, n=n)
    kernel_f = reference.kernel_spectrum(taps, n, causal)
    g = sent if after is None else after * sent
    g_f = torch.fft.rfft(torch.nn.functional.pad(g, (history, 0)), n=n)
    found: dict[int, Tensor] = {}
    if wanted[0][1] or wanted[3][1]:
        grad_x = torch.fft.irfft(g_f * kernel_f.conj_physical(), n=n)[..., : u.shape[2]]
        if scale is not None:
            grad_x[..., history:] += scale[:, None] * g
        found[0] = grad_x if before is None else before * grad_x
        if wanted[3][1]:
            found[3] = x * grad_x
    if wanted[1][1]:
        # Summed over the batch as a spectrum; taps that look ahead are those at negative lags.
        lags = (g_f * inputs_f.conj_physical()).sum(0)
        sides = [lags] if causal else [lags, lags.conj_physical()]
        found[1] = torch.stack([torch.fft.irfft(s, n=n)[:, : k.shape[-1]] for s in sides], 1).view(k.shape)
    if wanted[2][1]:
        found[2] = (g * inputs[..., history:]).sum((0, 2))
    if wanted[4][1]:
        y = torch.fft.irfft(inputs_f * kernel_f, n=n)[..., history : u.shape[2]]
        found[4] = sent * (y if scale is None else y + scale[:, None] * inputs[..., history:])
    return tuple(
        found[i].to(t.dtype).contiguous() if flag else t.new_empty(0) for i, (t, flag) in enumerate(wanted)
    )


def _triton_forward(*args: Any, **named: Any) -> Tensor:
    """Has spectra of its own: `spectrum` goes unused, here and in the backward."""
    call = _Call(*args, **named)
    call.check()
    backends.select("long_conv", call.u.device.type, call.u.dtype, {"positions": call.u.shape[2]}, "triton")
    from effkern._triton import long_conv as launcher

    backends.record("long_conv:triton")
    return launcher.long_conv(*call.without_spectrum())


def _triton_backward(*args: Any, **named: Any) -> tuple[Tensor, ...]:
    grad_out, call, needs = _BackwardCall.bind(*args, **named)
    backends.select("long_conv", call.u.device.type, call.u.dtype, {"positions": call.u.shape[2]}, "triton")
    from effkern._triton import long_conv as launcher

    backends.record("long_conv_backward:triton")
    return launcher.long_conv_backward(grad_out, *call.without_spectrum(), *needs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.count = len(inputs)
    call = _Call(*inputs)
    ctx.save_for_backward(*call[:6])
    ctx.history, ctx.causal = call[6:]


def _gradient(backward: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    def gradient(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        needs = (*ctx.needs_input_grad[: ctx.count], *(False,) * (len(_Call._fields) - ctx.count))
        needed = [bool(needs[i]) for i in (0, 1, 3, 4, 5)]
        grads = backward(grad_out, *ctx.saved_tensors, ctx.history, ctx.causal, *needed)
        grad_u, grad_k, *others = (g if wanted else None for g, wanted in zip(grads, needed, strict=True))
        return (grad_u, grad_k, None, *others, None, None)[: ctx.count]

    return gradient


def _forward_flops(*args: Any, out_val: Any = None, **named: Any) -> int:
    return _flops(_Call(*args, **named), False)


def _backward_flops(*args: Any, out_val: Any = None, **named: Any) -> int:
    return _flops(_BackwardCall.bind(*args, **named).call, True)


def _flops(call: _Call, backward: bool) -> int:
    u, k, spectrum, *_ = call
    return op_flops(u.shape, call.history, k, spectrum is not None, backward)


def _refuse(ctx: Any, *grads: Any) -> Any:
    raise NotImplementedError(DOUBLE_BACKWARD)


for _op in ("long_conv", "long_conv_triton"):
    _backward = f"{_op}_backward"
    torch.library.register_fake(f"effkern::{_op}", _fake_forward)
    torch.library.register_fake(f"effkern::{_backward}", _fake_backward)
    register_gradient(_op, _setup_context, _gradient(getattr(_OPS, _backward)))
    torch.library.register_autograd(f"effkern::{_backward}", _refuse)
    register_flops(_op, _forward_flops)
    register_flops(_backward, _backward_flops)
torch.library.register_fake("effkern::long_conv_spectrum", _fake_spectrum)
register_kernel("long_conv", _composed_forward, "CUDA")
register_kernel("long_conv_backward", _composed_backward, "CUDA")
register_kernel("long_conv_spectrum", _composed_spectrum, "CUDA")
register_kernel("long_conv_triton", _triton_forward, "CPU", "CUDA")
register_kernel("long_conv_triton_backward", _triton_backward, "CPU", "CUDA")
