"""Exact attention: the public function, its choice of backend, and what the registry says about it."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from effkern import backends
from effkern.ops import registry
from effkern.ops._attention_checks import FAST_DTYPES, check_arguments, check_tensors
from effkern.ops._attention_cost import attention_bytes, attention_flops
from effkern.ops._attention_dispatch import (
    DOUBLE_BACKWARD,
    FORWARD,
    FORWARD_CUDA,
    FORWARD_TRITON,
    cpu_refusal,
    cuda_refusal,
    reference_refusal,
    run_reference,
    sizes,
    triton_refusal,
)
from effkern.ops._attention_samples import bad_samples, calls, samples
from effkern.ops._dispatch import autocast_dtype, refuse_forward_mode
from effkern.reference import attention as reference

__all__ = ["attention", "attention_bytes", "attention_flops"]


def _kernel_for(q: Tensor, v: Tensor, name: str | None) -> Any:
    """The dispatcher op for a request, None for the reference. Traceable: looks at nothing but the arguments."""
    device = q.device.type
    if name is None:
        if device == "cpu":
            usable = cpu_refusal(device, q.dtype, sizes(q, v)) is None
        else:
            usable = device in ("cuda", "meta") and q.dtype in FAST_DTYPES
        return FORWARD if usable else None
    if name == "reference":
        return None
    if name == "cpu":
        reason = f"tensors are on {device}, it runs on cpu" if device != "cpu" else None
        reason = reason or cpu_refusal(device, q.dtype, sizes(q, v))
        if reason is not None:
            raise backends.Unavailable(
                "attention", "cpu", reason, backends.would_work("attention", device, q.dtype, sizes(q, v))
            )
        return FORWARD
    # These two say themselves, when they run, what is in their way.
    return FORWARD_TRITON if backends.check_name(name) == "triton" else FORWARD_CUDA


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    align: str = ...,
    scale: float | None = ...,
    cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    align: str = ...,
    scale: float | None = ...,
    cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    return_lse: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    align: str = ...,
    scale: float | None = ...,
    cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    return_lse: bool,
    backend: str | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
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
        out, lse = run_reference(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, causal, align)
    return (out, lse) if return_lse else out


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
            registry.Backend("cpu", ("cpu",), cpu_refusal),
            registry.Backend("cuda", ("cuda",), cuda_refusal, note="unverified on hardware", automatic=False),
            registry.Backend("triton", (), triton_refusal, note="unverified on hardware"),
            registry.Backend("reference", (), reference_refusal, note="plain PyTorch"),
        ),
        dtypes=(*FAST_DTYPES, torch.float64),
        sizes={"head_dim": 64, "value_dim": 64},
        samples=samples,
        bad_samples=bad_samples,
        calls=calls,
        flops=attention_flops,
        bytes=attention_bytes,
        double_backward=DOUBLE_BACKWARD,
    )
)
