"""The short convolution: depthwise, causal, few taps, with SiLU and a state for decoding in the same pass."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from effkern import backends
from effkern.ops import registry
from effkern.ops._dispatch import (
    FAST_DTYPES,
    autocast_dtype,
    refuse_all_but_fast,
    refuse_all_but_floating,
    refuse_forward_mode,
    triton_refusal,
    without_autocast,
)
from effkern.ops._short_conv_checks import check_kinds, check_short_conv
from effkern.ops._short_conv_dispatch import (
    DOUBLE_BACKWARD,
    short_conv_bytes,
    short_conv_flops,
)
from effkern.ops._short_conv_samples import bad_samples, calls, samples
from effkern.reference import short_conv as reference

__all__ = ["short_conv", "short_conv_bytes", "short_conv_flops"]

_OPS = torch.ops.effkern


def _kernel(x: Tensor, asked: str | None) -> Any:
    """The dispatcher op for a request, None for the reference."""
    name = backends.forced() if asked is None else asked
    if name is not None:
        backends.check_name(name)
    if name is None:
        usable = x.dtype in FAST_DTYPES and x.device.type in ("cpu", "cuda", "meta")
        return _OPS.short_conv.default if usable else None
    if name == "reference":
        return None
    backends.select("short_conv", x.device.type, x.dtype, {}, name)
    return _OPS.short_conv_triton.default if name == "triton" else _OPS.short_conv.default


@overload
def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = ...,
    *,
    activation: str | None = ...,
    state: Tensor | None = ...,
    return_state: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = ...,
    *,
    activation: str | None = ...,
    state: Tensor | None = ...,
    return_state: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = ...,
    *,
    activation: str | None = ...,
    state: Tensor | None = ...,
    return_state: bool,
    backend: str | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    state: Tensor | None = None,
    return_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolves every channel with its own few taps, causally: the convolution in front of Mamba, H3 and Hyena.

        out[b, h, t] = act(bias[h] + sum_w weight[h, w] x[b, h, t - (W-1) + w])

    So weight[:, W-1] meets the current position, as in F.conv1d(F.pad(x, (W-1, 0)), weight[:, None], bias, groups=H).
    Positions before x come from `state`. A long sequence can so be evaluated in chunks, down to single steps (L = 1):

        out, state = effkern.short_conv(chunk, weight, bias, state=state, return_state=True)

    Args:
        x: (B, H, L). float32, bfloat16 or float16; float64 through the reference. Any strides; positions that are not
            adjacent are copied once.
        weight: (H, W), 1 to 256 taps, x's dtype or float32.
        bias: (H), x's dtype or float32.
        activation: None, or "silu", x sigmoid(x), of the sum.
        state: (B, H, W-1), x's dtype or float32: the last W-1 inputs before x. None means zeros.
        return_state: whether to return the state for the inputs that follow x.
        backend: "cpu", "triton" or "reference"; None leaves the choice to `effkern.backends`.

    Returns:
        out (B, H, L), contiguous, in x's dtype; with `return_state` the pair (out, state), state (B, H, W-1) in the
        dtype of the one given, else x's. Both are differentiable in x, weight, bias and state.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: activation or backend is unknown.
        RuntimeError: shapes, dtypes or devices do not fit; the message names the argument, what was expected and what
            came.
        effkern.backends.Unavailable: the backend asked for cannot run.
        NotImplementedError: differentiated twice or in forward mode, on any backend but the reference.

    Numerics:
        Sums and SiLU in float32, rounded once. Gradients of weight and bias are summed over batch and positions in
        float32. Deterministic: the bits do not depend on the number of threads. NaN stays in its channel and batch.
        Under autocast x, weight and bias are cast to the autocast dtype.

    Cost:
        `short_conv_flops`, `short_conv_bytes`: one pass over x and out, backward one over x, grad_out and grad_x. The
        backward keeps the inputs only and computes the sums before SiLU again.

    Source:
        Gu and Dao 2023 (Mamba), section 3.4; Fu et al. 2023 (H3), the shift convolution of section 3.1.
    """
    check_kinds(activation, x=x, weight=weight, bias=bias, state=state)
    kernel = _kernel(x, backend)
    if kernel is None:
        if x.dtype != torch.float64:
            x, weight, bias = (t if t is None else t.to(autocast_dtype(t)) for t in (x, weight, bias))  # type: ignore[assignment]
        check_short_conv(x, weight, bias, state)
        backends.record("short_conv:reference")
        with without_autocast(x):
            return reference.short_conv(
                x, weight, bias, activation=activation, state=state, return_state=return_state
            )
    refuse_forward_mode("short_conv", x, weight, bias, state)
    out = kernel(x, weight, bias, state, activation == "silu")
    if not return_state:
        return out
    # x as the kernel has seen it, under autocast too.
    return out, reference.next_state(x.to(out.dtype), weight.shape[1], state)


registry.register(
    registry.OpSpec(
        name="short_conv",
        family="long_conv",
        public=short_conv,
        reference=reference.short_conv,
        schemas=("short_conv", "short_conv_backward", "short_conv_triton", "short_conv_triton_backward"),
        backends=(
            registry.Backend("cpu", ("cpu",), refuse_all_but_fast),
            registry.Backend(
                "triton", (), triton_refusal("short_conv"), note="unverified on hardware", automatic=False
            ),
            registry.Backend("reference", (), refuse_all_but_floating, note="plain PyTorch"),
        ),
        dtypes=(*FAST_DTYPES, torch.float64),
        sizes={},
        samples=samples,
        bad_samples=bad_samples,
        calls=calls,
        flops=short_conv_flops,
        bytes=short_conv_bytes,
        double_backward=DOUBLE_BACKWARD,
        batched=(0,),
    )
)
