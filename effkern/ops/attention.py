"""Exact attention: the public function, its gradients, fakes, autocast and the Python side of its backends."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any, Literal, overload

import torch
from torch import Tensor

from effkern import _lib, backends
from effkern.ops import registry
from effkern.ops._attention_checks import FAST_DTYPES, MAX_HEAD_DIM, check_arguments, check_offsets, check_tensors
from effkern.ops._attention_cost import attention_bytes, attention_flops, backward_formula, forward_formula
from effkern.ops._attention_samples import bad_samples, calls, samples
from effkern.ops._dispatch import (
    autocast_dtype,
    refuse_forward_mode,
    register_autocast,
    register_flops,
    register_kernel,
)
from effkern.reference import attention as reference

__all__ = ["attention", "attention_bytes", "attention_flops"]

_OPS = torch.ops.effkern
_FORWARD, _FORWARD_TRITON, _FORWARD_CUDA = (
    _OPS.attention.default,
    _OPS.attention_triton.default,
    _OPS.attention_cuda.default,
)


# ---- which backend ----------------------------------------------------------------------------------------


def _cpu_refusal(device: str, dtype: torch.dtype, sizes: Mapping[str, int]) -> str | None:
    if dtype not in FAST_DTYPES:
        return f"it takes float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if not (1 <= sizes["head_dim"] <= MAX_HEAD_DIM and 1 <= sizes["value_dim"] <= MAX_HEAD_DIM):
        return f"head dims go from 1 to {MAX_HEAD_DIM}, got {sizes['head_dim']} and {sizes['value_dim']}"
    return None


def _triton_refusal(device: str, dtype: torch.dtype, sizes: Mapping[str, int]) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    from effkern._triton import attention as launcher

    return launcher.supports(torch.device(device), dtype, sizes["head_dim"], sizes["value_dim"])


def _cuda_refusal(device: str, dtype: torch.dtype, sizes: Mapping[str, int]) -> str | None:
    if _CUDA_MISSING:
        return f"the CUDA library is not loaded: {_lib.status().cuda.reason}"
    return _cpu_refusal(device, dtype, sizes)


def _reference_refusal(device: str, dtype: torch.dtype, sizes: Mapping[str, int]) -> str | None:
    return None if dtype.is_floating_point else f"it takes floating dtypes, not {dtype}"


def _sizes(q: Tensor, v: Tensor) -> dict[str, int]:
    return {"head_dim": q.shape[-1], "value_dim": v.shape[-1]}


def _kernel_for(q: Tensor, v: Tensor, name: str | None) -> Any:
    """The dispatcher op for a request, None for the reference. Traceable: looks at nothing but the arguments."""
    device = q.device.type
    if name is None:
        if device == "cpu":
            usable = _cpu_refusal(device, q.dtype, _sizes(q, v)) is None
        else:
            usable = device in ("cuda", "meta") and q.dtype in FAST_DTYPES
        return _FORWARD if usable else None
    if name == "reference":
        return None
    if name == "cpu":
        reason = f"tensors are on {device}, it runs on cpu" if device != "cpu" else None
        reason = reason or _cpu_refusal(device, q.dtype, _sizes(q, v))
        if reason is not None:
            raise backends.Unavailable(
                "attention", "cpu", reason, backends.would_work("attention", device, q.dtype, _sizes(q, v))
            )
        return _FORWARD
    # These two say themselves, when they run, what is in their way.
    return _FORWARD_TRITON if backends.check_name(name) == "triton" else _FORWARD_CUDA


# ---- public function --------------------------------------------------------------------------------------


@overload
def attention(q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = ..., **options: Any) -> Tensor: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **options: Any
) -> tuple[Tensor, Tensor]: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    align: str = "bottom_right",
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact softmax attention with grouped heads, in memory linear in the sequence length.

        out = softmax(scale * q k^T) v          lse = log(sum_j exp(scale * q k_j^T))

    Args:
        q: (B, Hq, Sq, D), or packed (Hq, Tq, D) with cu_seqlens. float32, bfloat16 or float16; float64 through
            the reference. Any strides; a last dimension that is not dense is copied once.
        k: (B, Hkv, Sk, D), packed (Hkv, Tk, D). Hkv divides Hq: query head h reads key head h // (Hq / Hkv).
        v: (B, Hkv, Sk, Dv), packed (Hkv, Tk, Dv). D and Dv from 1 to 256, and not necessarily equal; the reference
            takes larger ones.
        causal: key j is visible to the query at position p when j <= p.
        align: where the queries stand when Sq != Sk. "bottom_right": p = i + Sk - Sq, the last query sees the last
            key (decoding, FlashAttention). "top_left": p = i (scaled_dot_product_attention).
        scale: finite factor of the scores; None is D ** -0.5.
        cu_seqlens_q: int32 (N + 1,) on q's device, rising from 0 to Tq: sequence n owns tokens cu[n] to cu[n + 1].
            Sequences may be empty. Positions count inside each sequence. On a GPU the values are not read back, and
            wrong ones give wrong numbers.
        cu_seqlens_k: the same for k and v; given together with cu_seqlens_q.
        return_lse: also return lse.
        backend: "cpu", "cuda", "triton" or "reference"; None leaves the choice to `effkern.backends`.

    Returns:
        out (B, Hq, Sq, Dv) or (Hq, Tq, Dv), contiguous, in q's dtype; with `return_lse` also lse (B, Hq, Sq) or
        (Hq, Tq), natural logarithm, float32 (float64 for float64). Both are differentiable. A row that sees no key
        gives out 0, lse -inf and zero gradients.

    Raises:
        TypeError: q, k or v is not a tensor.
        ValueError: `align` or `backend` is not one of the names above.
        RuntimeError: rank, heads, sizes, dtypes or devices do not fit, scale is not finite, or cu_seqlens does not
            rise from 0 to the number of tokens; the message names the argument, what was expected and what came.
        effkern.backends.Unavailable: the backend asked for cannot run; says why and what would work.
        NotImplementedError: differentiated twice or in forward mode, on any backend but the reference.

    Numerics:
        Scores, sums and gradients accumulate in float32. The error stays within twice that of the same computation
        in PyTorch in the same dtype. Deterministic: the same inputs give the same bits, forward and backward,
        for any number of threads. Under autocast q, k and v are cast to the autocast dtype.

    Cost:
        `attention_flops`: 2 (D + Dv) a visible pair forward, 2 (3 D + 2 Dv) backward. `attention_bytes`: every
        tensor once. Beyond its outputs a call needs memory linear in Sq + Sk.

    Source:
        Dao et al. 2022 (FlashAttention), algorithm 1; Dao 2023 (FlashAttention-2), algorithms 1 and 2.
    """
    if align != "bottom_right" and align != "top_left":
        raise ValueError(f"attention: align must be 'bottom_right' or 'top_left', got {align!r}")
    check_tensors(q, k, v)
    if q.dim() < 3 or v.dim() < 3:
        check_arguments(q, k, v, cu_seqlens_q, cu_seqlens_k, scale)
    kernel = _kernel_for(q, v, backends.forced() if backend is None else backend)
    if kernel is not None:
        refuse_forward_mode("attention", q, k, v)
        out, lse = kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, causal, align == "top_left")
    else:
        q, k, v = (tensor.to(autocast_dtype(tensor)) for tensor in (q, k, v))
        out, lse = _run_reference(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, causal, align)
    return (out, lse) if return_lse else out


def _run_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float | None,
    causal: bool,
    align: str,
) -> tuple[Tensor, Tensor]:
    check_arguments(q, k, v, cu_seqlens_q, cu_seqlens_k, scale)
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        check_offsets("cu_seqlens_q", cu_seqlens_q, q.shape[-2])
        check_offsets("cu_seqlens_k", cu_seqlens_k, k.shape[-2])
    backends.record("attention:reference")
    return reference.attention(
        q, k, v, causal=causal, align=align, scale=scale, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k
    )


# ---- shapes for the compiler ------------------------------------------------------------------------------


def _fake_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    top_left: bool = False,
) -> tuple[Tensor, Tensor]:
    check_arguments(q, k, v, cu_seqlens_q, cu_seqlens_k, scale)
    rows = q.shape[:-1]
    return q.new_empty((*rows, v.shape[-1])), q.new_empty(rows, dtype=torch.float32)


def _fake_backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


# ---- kernels that live in Python --------------------------------------------------------------------------


def _triton_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    top_left: bool = False,
) -> tuple[Tensor, Tensor]:
    check_arguments(q, k, v, cu_seqlens_q, cu_seqlens_k, scale)
    backends.select("attention", q.device.type, q.dtype, _sizes(q, v), "triton")
    from effkern._triton import attention as launcher

    backends.record("attention:triton")
    return launcher.forward(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, causal, top_left)


def _triton_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    top_left: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    backends.select("attention", q.device.type, q.dtype, _sizes(q, v), "triton")
    from effkern._triton import attention as launcher

    backends.record("attention_backward:triton")
    return launcher.backward(
        grad_out, grad_lse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, scale, causal, top_left
    )


def _cuda_forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """The key CUDA of `attention`: C++ where it was asked for, else Triton, else the reference."""
    name = backends.select("attention", q.device.type, q.dtype, _sizes(q, v))
    if name == "cuda":
        return _FORWARD_CUDA(q, k, v, *options)
    if name == "triton":
        return _triton_forward(q, k, v, *options)
    cu_seqlens_q, cu_seqlens_k, scale, causal, top_left = (*options, *(None, None, None, False, False)[len(options) :])
    align = "top_left" if top_left else "bottom_right"
    return _run_reference(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, causal, align)


def _cuda_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    top_left: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The key CUDA of `attention_backward`: Triton where it can, else the closed form in PyTorch."""
    if backends.forced() != "reference" and _triton_refusal(q.device.type, q.dtype, _sizes(q, v)) is None:
        return _triton_backward(
            grad_out, grad_lse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, scale, causal, top_left
        )
    backends.record("attention_backward:reference")
    return reference.attention_backward(
        *(grad_out, grad_lse, q, k, v, out, lse),
        causal=causal,
        align="top_left" if top_left else "bottom_right",
        scale=scale,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
    )


def _no_cuda_kernel(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    backends.select("attention", q.device.type, q.dtype, _sizes(q, v), "cuda")
    raise AssertionError("unreachable: select refuses")


# ---- gradients --------------------------------------------------------------------------------------------

_DOUBLE_BACKWARD = "attention: second derivatives are only available with backend='reference'"


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, *options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, cu_seqlens_q, cu_seqlens_k)
    ctx.options = options


def _register_gradient(op: str, backward_op: str) -> None:
    backward = getattr(_OPS, backward_op).default

    def gradient(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        rest = (None,) * (2 + len(ctx.options))
        if grad_out is None and grad_lse is None:
            return (None, None, None, *rest)
        q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
        if grad_out is None:  # only lse was used
            grad_out = torch.zeros_like(out)
        return (
            *backward(grad_out, grad_lse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, *ctx.options),
            *rest,
        )

    torch.library.register_autograd(f"effkern::{op}", gradient, setup_context=_setup_context)


def _refuse_gradient(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(_DOUBLE_BACKWARD)


# ---- registration -----------------------------------------------------------------------------------------

for _op, _backward_op in (
    ("attention", "attention_backward"),
    ("attention_triton", "attention_triton_backward"),
    ("attention_cuda", "attention_backward"),
):
    torch.library.register_fake(f"effkern::{_op}", _fake_forward)
    _register_gradient(_op, _backward_op)
    register_autocast(_op)
    register_flops(_op, forward_formula)
for _op in ("attention_backward", "attention_triton_backward"):
    torch.library.register_fake(f"effkern::{_op}", _fake_backward)
    torch.library.register_autograd(f"effkern::{_op}", _refuse_gradient)
    register_flops(_op, backward_formula)

register_kernel("attention", _cuda_forward, "CUDA")
register_kernel("attention_backward", _cuda_backward, "CUDA")
register_kernel("attention_triton", _triton_forward, "CPU", "CUDA")
register_kernel("attention_triton_backward", _triton_backward, "CPU", "CUDA")
_CUDA_MISSING = not torch._C._dispatch_has_kernel_for_dispatch_key("effkern::attention_cuda", "CUDA")
register_kernel("attention_cuda", _no_cuda_kernel, "CPU", *(("CUDA",) if _CUDA_MISSING else ()))

registry.register(
    registry.OpSpec(
        name="attention",
        family="attention",
        public=attention,
        reference=reference.attention,
        schemas=(
            *("attention", "attention_backward", "attention_triton", "attention_triton_backward"),
            "attention_cuda",
        ),
        backends=(
            registry.Backend("cpu", ("cpu",), _cpu_refusal),
            registry.Backend(
                "cuda", ("cuda",), _cuda_refusal, note="unverified on hardware", automatic=False
            ),
            registry.Backend("triton", (), _triton_refusal, note="unverified on hardware"),
            registry.Backend("reference", (), _reference_refusal, note="plain PyTorch"),
        ),
        dtypes=(*FAST_DTYPES, torch.float64),
        sizes={"head_dim": 64, "value_dim": 64},
        samples=samples,
        bad_samples=bad_samples,
        calls=calls,
        flops=attention_flops,
        bytes=attention_bytes,
        double_backward=_DOUBLE_BACKWARD,
    )
)
