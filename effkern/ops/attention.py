"""Exact attention: the public function, its choice of backend, and what the registry says about it."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from effkern import backends
from effkern.masks import Mask
from effkern.ops import _attention_cuda as cuda_kernels
from effkern.ops import registry
from effkern.ops._attention_checks import check_arguments, check_tensors
from effkern.ops._attention_cost import attention_bytes, attention_flops
from effkern.ops._attention_dispatch import (
    FORWARD,
    FORWARD_CUDA,
    FORWARD_TRITON,
    cpu_refusal,
    run_reference,
    sizes,
)
from effkern.ops._attention_gradient import DOUBLE_BACKWARD
from effkern.ops._attention_options import Options, collect
from effkern.ops._attention_samples import bad_samples, calls, samples
from effkern.ops._dispatch import (
    FAST_DTYPES,
    autocast_dtype,
    refuse_all_but_floating,
    refuse_forward_mode,
    triton_refusal,
)
from effkern.reference import attention as reference

__all__ = ["attention", "attention_bytes", "attention_flops"]


def _kernel_for(q: Tensor, v: Tensor, name: str | None, extended: bool) -> Any:
    """The dispatcher op for a request, None for the reference. Traceable: looks at nothing but the arguments."""
    device = q.device.type
    if name is None:
        if device == "cpu":
            usable = cpu_refusal(device, q.dtype, sizes(q, v, extended)) is None
        else:
            usable = device in ("cuda", "meta") and q.dtype in FAST_DTYPES
        return FORWARD if usable else None
    if name == "reference":
        return None
    if name == "cpu":
        reason = f"tensors are on {device}, it runs on cpu" if device != "cpu" else None
        reason = reason or cpu_refusal(device, q.dtype, sizes(q, v, extended))
        if reason is not None:
            others = backends.would_work("attention", device, q.dtype, sizes(q, v, extended))
            raise backends.Unavailable("attention", "cpu", reason, others)
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
    mask: Mask | None = ...,
    bias: Tensor | None = ...,
    softcap: float = ...,
    sink_logits: Tensor | None = ...,
    alibi_slopes: Tensor | None = ...,
    dropout_p: float = ...,
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
    mask: Mask | None = ...,
    bias: Tensor | None = ...,
    softcap: float = ...,
    sink_logits: Tensor | None = ...,
    alibi_slopes: Tensor | None = ...,
    dropout_p: float = ...,
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
    mask: Mask | None = ...,
    bias: Tensor | None = ...,
    softcap: float = ...,
    sink_logits: Tensor | None = ...,
    alibi_slopes: Tensor | None = ...,
    dropout_p: float = ...,
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
    mask: Mask | None = None,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact softmax attention with grouped heads, in memory linear in the sequence length.

        z = softcap(scale * q k^T) + bias - slope * |p - j|, -inf where the mask hides the pair
        lse = log(sum_j exp(z_j) + exp(sink))          out = dropout(exp(z - lse)) v

    i is the row of a query, p its position, j the position of a key; every term but the first is optional.

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
        mask: one of `effkern.masks`, or several joined by `&`; `causal` hides as well. Its tensors are on q's device.
        bias: q's dtype or float32, broadcastable to (B, Hq, Sq, Sk), any strides; has a gradient, and -inf hides a
            pair. With cu_seqlens the first axis counts sequences and the last two, if not 1, suffice for the longest.
        softcap: c of c * tanh(s / c), finite and at least 0; 0 is off.
        sink_logits: (Hq,), q's dtype or float32: one more logit a head in the denominator, with no value; has a
            gradient.
        alibi_slopes: (Hq,), used in float32; `effkern.masks.alibi_slopes` gives the usual ones. Has no gradient.
        dropout_p: probability in [0, 1) that a weight is dropped after the division by the denominator; the others
            grow by 1 / (1 - p). The choice comes from PyTorch's generator of q's device, so torch.manual_seed
            repeats it, and is the same on every backend that gets the same draw.
        cu_seqlens_q: int32 (N + 1,) on q's device, rising from 0 to Tq: sequence n owns tokens cu[n] to cu[n + 1].
            Sequences may be empty. Positions count inside each sequence. On a GPU the values are not read back, and
            wrong ones give wrong numbers.
        cu_seqlens_k: the same for k and v; given together with cu_seqlens_q.
        return_lse: also return lse.
        backend: "cpu", "cuda", "triton" or "reference"; None leaves the choice to `effkern.backends`. "cuda" takes
            none of mask, bias, softcap, sink_logits, alibi_slopes and dropout_p.

    Returns:
        out (B, Hq, Sq, Dv) or (Hq, Tq, Dv), contiguous, in q's dtype; with `return_lse` also lse (B, Hq, Sq) or
        (Hq, Tq), natural logarithm, float32 (float64 for float64). Both are differentiable. A row that sees no key
        gives out 0, lse -inf (the sink, where there is one) and zero gradients.

    Raises:
        TypeError: q, k, v or another tensor is not one, or mask is not one of `effkern.masks`.
        ValueError: `align` or `backend` is not one of the names above.
        RuntimeError: rank, heads, sizes, dtypes or devices do not fit, scale, softcap or dropout_p is out of its
            range, alibi_slopes requires a gradient, or cu_seqlens does not rise from 0 to the number of tokens; the
            message names the argument, what was expected and what came.
        effkern.backends.Unavailable: the backend asked for cannot run; says why and what would work.
        NotImplementedError: differentiated twice or in forward mode, on any backend but the reference.

    Numerics:
        Scores, sums and gradients accumulate in float32. The error stays within twice that of the same computation
        in PyTorch in the same dtype. Deterministic: the same inputs give the same bits, forward and backward,
        for any number of threads; only backend="cuda" adds up the gradient of q in no fixed order on Hopper GPUs,
        unless `torch.use_deterministic_algorithms(True)` is set. Under autocast q, k and v are cast to the autocast
        dtype, and nothing else.

    Cost:
        `attention_flops`: 2 (D + Dv) a visible pair forward, 2 (3 D + 2 Dv) backward. `attention_bytes`: every
        tensor once. Beyond its outputs a call needs memory linear in Sq + Sk.

    Source:
        Dao et al. 2022 (FlashAttention), algorithm 1; Dao 2023 (FlashAttention-2), algorithms 1 and 2. Masks:
        `effkern.masks`. Cap: Gemma Team 2024 (Gemma 2), section 2. Sinks: Xiao et al. 2023 (StreamingLLM), section
        3.3, as a learned logit. ALiBi: Press et al. 2021.
    """
    if align != "bottom_right" and align != "top_left":
        raise ValueError(f"attention: align must be 'bottom_right' or 'top_left', got {align!r}")
    check_tensors(q, k, v)
    if q.dim() < 3 or v.dim() < 3:
        check_arguments(q, k, v, cu_seqlens_q, cu_seqlens_k, scale)
    extended = (
        mask is not None
        or bias is not None
        or softcap != 0.0
        or sink_logits is not None
        or alibi_slopes is not None
        or dropout_p != 0.0
    )
    kernel = _kernel_for(q, v, backends.forced() if backend is None else backend, extended)
    options: Any = cu_seqlens_q, cu_seqlens_k, scale, causal, align == "top_left"
    if extended:
        options = collect(q, options, mask, bias, softcap, sink_logits, alibi_slopes, dropout_p)
    if kernel is not None:
        refuse_forward_mode("attention", q, k, v, bias, sink_logits, alibi_slopes)
        out, lse = kernel(q, k, v, *options)
    else:
        out, lse = _run_plain(q, k, v, Options(*options))
    return (out, lse) if return_lse else out


def _run_plain(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    q, k, v = (tensor.to(autocast_dtype(tensor)) for tensor in (q, k, v))
    return run_reference(q, k, v, options)


def attention_in_band(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    band: tuple[int, int, int],
    top_left: bool,
    scale: float | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of a single band (left, right, sink), whose ends may be negative where no public mask has any."""
    options = Options(None, None, scale, False, top_left, band)
    kernel = _kernel_for(q, v, backends.forced() if backend is None else backend, True)
    if kernel is None:
        return _run_plain(q, k, v, options)
    refuse_forward_mode("attention", q, k, v)
    out, lse = kernel(q, k, v, *options[: Options._fields.index("bands") + 1])
    return out, lse


registry.register(
    registry.OpSpec(
        name="attention",
        family="attention",
        public=attention,
        reference=reference.attention,
        schemas=(
            *("attention", "attention_backward", "attention_triton", "attention_triton_backward"),
            *("attention_cuda", "attention_cuda_backward", "attention_cuda_sm80", "attention_cuda_sm90"),
            "attention_cuda_sm90_backward",
        ),
        backends=(
            registry.Backend("cpu", ("cpu",), cpu_refusal),
            registry.Backend(
                "cuda", ("cuda",), cuda_kernels.refusal, note="unverified on hardware", automatic=False
            ),
            registry.Backend("triton", (), triton_refusal("attention"), note="unverified on hardware"),
            registry.Backend("reference", (), refuse_all_but_floating, note="plain PyTorch"),
        ),
        dtypes=(*FAST_DTYPES, torch.float64),
        sizes={"head_dim": 64, "value_dim": 64},
        samples=samples,
        bad_samples=bad_samples,
        calls=calls,
        flops=attention_flops,
        bytes=attention_bytes,
        double_backward=DOUBLE_BACKWARD,
        constants=("alibi_slopes",),
    )
)
