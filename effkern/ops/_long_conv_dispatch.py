"""The long convolution at the dispatcher: fakes, gradients, flops, and what runs where there is no kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
_ARGUMENTS = 8  # of the forward op
DOUBLE_BACKWARD = "long_conv: second derivatives are only available with backend='reference'"


def _fake_forward(
    u: Tensor,
    k: Tensor,
    spectrum: Tensor | None = None,
    skip: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    history: int = 0,
    causal: bool = True,
) -> Tensor:
    check_convolution(u, k, skip, pre_gate, post_gate, history, causal)
    return u.new_empty((u.shape[0], u.shape[1], u.shape[2] - history))


def _fake_backward(
    grad_out: Tensor,
    u: Tensor,
    k: Tensor,
    spectrum: Tensor | None = None,
    skip: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    history: int = 0,
    causal: bool = True,
    *needed: bool,
    **named: bool,
) -> tuple[Tensor, ...]:
    return tuple(
        t.new_empty(t.shape if wanted else (0,))
        for t, wanted in _wanted((u, k, skip, pre_gate, post_gate), needed, named)
    )


def _wanted(
    arguments: tuple[Tensor | None, ...], needed: tuple[bool, ...], named: dict[str, bool]
) -> list[tuple[Tensor, bool]]:
    """The arguments with gradients, and whether each is wanted; one that is not there counts as an unwanted u."""
    u = arguments[0]
    assert u is not None
    flags = [named.get(f"need_{name}", True) for name in ("u", "k", "skip", "pre", "post")]
    flags[: len(needed)] = needed
    return [(u, False) if t is None else (t, flag) for t, flag in zip(arguments, flags, strict=True)]


def _fake_spectrum(k: Tensor, length: int, causal: bool = True) -> Tensor:
    check_kernel(k, None, causal)
    check_dtype("k", k)
    numbers: int | torch.SymInt = reference.transform_length(length, k.shape[-1]) + 2
    if k.device.type == "cpu" and isinstance(k, FakeTensor):  # the kernel's own affair
        numbers = torch.library.get_ctx().new_dynamic_size()
    return k.new_empty((k.shape[0], numbers), dtype=torch.float32)


def _composed_forward(
    u: Tensor,
    k: Tensor,
    spectrum: Tensor | None = None,
    skip: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    history: int = 0,
    causal: bool = True,
) -> Tensor:
    """The key CUDA of `long_conv` until the Triton kernels have run on hardware: PyTorch's FFTs."""
    check_convolution(u, k, skip, pre_gate, post_gate, history, causal)
    backends.record("long_conv:reference")
    ready = None
    if spectrum is not None:
        numbers = 2 * (spectrum.shape[1] // 2 - 1)  # of the real transform
        fits = spectrum.shape[0] == u.shape[1] and numbers >= reference.transform_length(
            u.shape[2], k.shape[-1]
        )
        if not fits or spectrum.dtype != torch.float32:
            raise RuntimeError(
                "long_conv: spectrum was prepared for another kernel or for fewer positions than u has"
            )
        ready = torch.view_as_complex(spectrum.unflatten(1, (-1, 2)))
    return reference.convolve(u, k, skip, pre_gate, post_gate, history, causal, ready)


def _composed_spectrum(k: Tensor, length: int, causal: bool = True) -> Tensor:
    check_kernel(k, None, causal)
    check_dtype("k", k)
    n = reference.transform_length(length, k.shape[-1])
    return torch.view_as_real(reference.kernel_spectrum(k.float(), n, causal)).flatten(1)


def _composed_backward(
    grad_out: Tensor,
    u: Tensor,
    k: Tensor,
    spectrum: Tensor | None = None,
    skip: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    history: int = 0,
    causal: bool = True,
    *needed: bool,
    **named: bool,
) -> tuple[Tensor, ...]:
    backends.record("long_conv_backward:reference")
    wanted = _wanted((u, k, skip, pre_gate, post_gate), needed, named)
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


def _triton_forward(
    u: Tensor,
    k: Tensor,
    spectrum: Tensor | None = None,
    skip: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    history: int = 0,
    causal: bool = True,
) -> Tensor:
    """Has spectra of its own: `spectrum` goes unused, here and in the backward."""
    check_convolution(u, k, skip, pre_gate, post_gate, history, causal)
    backends.select("long_conv", u.device.type, u.dtype, {"positions": u.shape[2]}, "triton")
    from effkern._triton import long_conv as launcher

    backends.record("long_conv:triton")
    return launcher.long_conv(u, k, skip, pre_gate, post_gate, history, causal)


def _triton_backward(
    grad_out: Tensor,
    u: Tensor,
    k: Tensor,
    spectrum: Tensor | None = None,
    skip: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    history: int = 0,
    causal: bool = True,
    *needed: bool,
    **named: bool,
) -> tuple[Tensor, ...]:
    backends.select("long_conv", u.device.type, u.dtype, {"positions": u.shape[2]}, "triton")
    from effkern._triton import long_conv as launcher

    backends.record("long_conv_backward:triton")
    given = grad_out, u, k, skip, pre_gate, post_gate, history, causal
    return launcher.long_conv_backward(*given, *needed, **named)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.count = len(inputs)
    given = (*inputs, *(None, None, None, None, 0, True)[len(inputs) - 2 :])
    ctx.save_for_backward(*given[:6])
    ctx.history, ctx.causal = given[6:]


def _gradient(backward: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    def gradient(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        u, k, spectrum, skip, pre_gate, post_gate = ctx.saved_tensors
        needs = (*ctx.needs_input_grad[: ctx.count], *(False,) * (_ARGUMENTS - ctx.count))
        needed = [bool(needs[i]) for i in (0, 1, 3, 4, 5)]
        grads = backward(
            grad_out, u, k, spectrum, skip, pre_gate, post_gate, ctx.history, ctx.causal, *needed
        )
        grad_u, grad_k, *others = (g if wanted else None for g, wanted in zip(grads, needed, strict=True))
        return (grad_u, grad_k, None, *others, None, None)[: ctx.count]

    return gradient


def _refuse(ctx: Any, *grads: Any) -> Any:
    raise NotImplementedError(DOUBLE_BACKWARD)


for _op in ("long_conv", "long_conv_triton"):
    _backward = f"{_op}_backward"
    torch.library.register_fake(f"effkern::{_op}", _fake_forward)
    torch.library.register_fake(f"effkern::{_backward}", _fake_backward)
    register_gradient(_op, _setup_context, _gradient(getattr(_OPS, _backward)))
    torch.library.register_autograd(f"effkern::{_backward}", _refuse)
    register_flops(_op, op_flops)
    register_flops(_backward, lambda grad_out, *args, **named: op_flops(*args, backward=True, **named))
torch.library.register_fake("effkern::long_conv_spectrum", _fake_spectrum)
register_kernel("long_conv", _composed_forward, "CUDA")
register_kernel("long_conv_backward", _composed_backward, "CUDA")
register_kernel("long_conv_spectrum", _composed_spectrum, "CUDA")
register_kernel("long_conv_triton", _triton_forward, "CPU", "CUDA")
register_kernel("long_conv_triton_backward", _triton_backward, "CPU", "CUDA")
