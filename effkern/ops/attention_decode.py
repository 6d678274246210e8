"""Attention of a few new queries to a key-value cache: the public function and its choice of backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from effkern import _host, _lib, backends
from effkern.masks import Lowered, Mask
from effkern.ops import registry
from effkern.ops._attention_checks import MAX_HEAD_DIM
from effkern.ops._attention_decode_checks import check_arguments, check_values
from effkern.ops._attention_decode_samples import bad_samples, calls, samples
from effkern.ops._dispatch import (
    FAST_DTYPES,
    autocast_dtype,
    dtype_name,
    refuse_all_but_floating,
    register_autocast,
    register_flops,
    register_kernel,
    triton_refusal,
)
from effkern.reference import attention_decode as reference

__all__ = ["attention_decode", "decode_bytes", "decode_flops"]

_OPS = torch.ops.effkern


def check_before_writing(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    page_table: Tensor | None,
    scale: float | None,
    softcap: float,
) -> None:
    """Raises what `attention_decode` would, for callers that change the caches first."""
    q, k_cache, v_cache = (t.to(autocast_dtype(t)) for t in (q, k_cache, v_cache))
    check_arguments(q, k_cache, v_cache, cache_seqlens, page_table, scale, None, softcap, None)
    _kernel_for(q, v_cache, backends.forced())
    if q.device.type == "cpu" and not torch.compiler.is_compiling():
        check_values(k_cache, cache_seqlens, page_table)


def _pairs(q: Tensor, k_cache: Tensor, cache_seqlens: Tensor, page_table: Tensor | None) -> int:
    """Visible pairs of all heads without a window; the whole cache where the lengths are not known."""
    batch, heads, queries = q.shape[:3]
    capacity = k_cache.shape[2] * (1 if page_table is None else page_table.shape[1])
    if cache_seqlens.is_meta or isinstance(cache_seqlens, torch._subclasses.FakeTensor):
        return batch * heads * queries * capacity
    seen = cache_seqlens.long()[:, None] - torch.arange(queries, device=cache_seqlens.device)
    return heads * int(seen.clamp(min=0).sum())


def decode_flops(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    page_table: Tensor | None = None,
    **_: Any,
) -> int:
    """2 (D + Dv) for every pair of a query and a valid key; a window sees fewer."""
    pairs = _pairs(q, k_cache, cache_seqlens, page_table)
    return pairs * 2 * (q.shape[3] + v_cache.shape[3])


def decode_bytes(q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, **_: Any) -> int:
    """The caches, the queries and the results once."""
    rows = q.numel() // q.shape[3]
    return sum(t.nbytes for t in (q, k_cache, v_cache)) + rows * (v_cache.shape[3] * q.element_size() + 4)


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    page_table: Tensor | None = None,
    mask: Mask | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the newest queries to a key-value cache, for inference: every key and value is read once.

        z = softcap(scale * q k^T), key j visible to query i when j <= cache_seqlens - Sq + i and the mask shows it
        lse = log(sum_j exp(z_j) + exp(sink))          out = exp(z - lse) v

    The keys of a sequence are split into chunks that run in parallel and are merged by their log-sum-exps.

    Args:
        q: (B, Hq, Sq, D), the newest Sq positions; float32, bfloat16 or float16; float64 through the reference. Made
            for small Sq, right for any.
        k_cache: (B, Hkv, capacity, D), or in pages (pages, Hkv, page, D) with page_table. Hkv divides Hq.
        v_cache: (B, Hkv, capacity, Dv), or (pages, Hkv, page, Dv). D and Dv from 1 to 256.
        cache_seqlens: int32 (B,) on q's device: valid keys of every sequence, the new ones included. Nothing behind
            them is read. On a GPU the values are not read back, and wrong ones give wrong numbers.
        page_table: int32 (B, pages of a sequence): where each stretch of `page` keys of a sequence lies. Any page
            size; entries behind the last valid key may hold anything.
        mask: `SlidingWindow`, `Lambda`, or several of them joined by `&`; keys outside cost nothing.
        scale: finite factor of the scores; None is D ** -0.5.
        softcap: c of c * tanh(s / c), finite and at least 0; 0 is off.
        sink_logits: (Hq,), q's dtype or float32: one more logit a head in the denominator.
        return_lse: also return lse.
        backend: "cpu", "triton", "cuda" (bfloat16 and float16, D and Dv multiples of 8) or "reference"; None leaves the
            choice to `effkern.backends`.

    Returns:
        out (B, Hq, Sq, Dv), contiguous, in q's dtype; with `return_lse` also lse (B, Hq, Sq), natural logarithm,
        float32 (float64 for float64). A query that sees no key gives out 0 and lse -inf (the sink, where there is one).

    Raises:
        TypeError: an argument is not a tensor, or mask is not one of `effkern.masks`.
        ValueError: the mask has terms other than windows and sinks.
        NotImplementedError: a gradient is asked for; `effkern.attention` has one.
        RuntimeError: shapes, dtypes, devices, lengths or pages do not fit; the message names the argument, what was
            expected and what came.
        effkern.backends.Unavailable: the backend asked for cannot run.

    Numerics:
        Scores and sums in float32. Deterministic: the chunks depend on the shapes alone, so the bits do not depend on
        the number of threads ("cuda" also counts the GPU's multiprocessors). Under autocast q and the caches are cast
        to the autocast dtype.

    Cost:
        `decode_flops`, `decode_bytes`: bound by reading the cache.

    Source:
        Dao et al. 2023 (Flash-Decoding); Kwon et al. 2023 (PagedAttention), section 4.1, for pages.
    """
    for name, t in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache), ("cache_seqlens", cache_seqlens)):
        if not isinstance(t, Tensor):
            raise TypeError(f"attention_decode: {name} must be a tensor, got {type(t).__name__}")
    if mask is not None and not isinstance(mask, Mask):
        raise TypeError(f"attention_decode: mask must be one of effkern.masks, got {type(mask).__name__}")
    lowered = Lowered() if mask is None else mask.lower()
    if lowered != Lowered(bands=lowered.bands):
        raise ValueError(f"attention_decode: mask must be made of SlidingWindow and Lambda, got {mask!r}")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k_cache, v_cache)):
        raise NotImplementedError(
            "attention_decode: there is no gradient; use effkern.attention, or torch.no_grad()"
        )
    asked = backends.forced() if backend is None else backend
    if asked is not None:
        backends.check_name(asked)
    options = page_table, scale, list(lowered.bands) or None, float(softcap), sink_logits
    if q.dim() < 4 or v_cache.dim() < 4:
        check_arguments(q, k_cache, v_cache, cache_seqlens, *options)
    kernel = _kernel_for(q, v_cache, asked, lowered.bands)
    if kernel is not None:
        out, lse = kernel(q, k_cache, v_cache, cache_seqlens, *options)
    else:
        q, k_cache, v_cache = (t.to(autocast_dtype(t)) for t in (q, k_cache, v_cache))
        out, lse = _run_reference(q, k_cache, v_cache, cache_seqlens, *options)
    return (out, lse) if return_lse else out


def _sizes(q: Tensor, v_cache: Tensor, bands: Sequence[int] | None) -> dict[str, int]:
    return {"head_dim": q.shape[3], "value_dim": v_cache.shape[3], "bands": len(bands or ()) // 3}


def _kernel_for(q: Tensor, v_cache: Tensor, name: str | None, bands: Sequence[int] | None = None) -> Any:
    """The dispatcher op for a request, None for the reference."""
    device, sizes = q.device.type, _sizes(q, v_cache, bands)
    if name is None:
        if device == "cpu":
            return _OPS.attention_decode.default if _cpu_refusal(device, q.dtype, sizes) is None else None
        return _OPS.attention_decode.default if q.dtype in FAST_DTYPES else None
    if name == "reference":
        return None
    backends.select("attention_decode", device, q.dtype, sizes, name)
    named = {"triton": _OPS.attention_decode_triton, "cuda": _OPS.attention_decode_cuda}
    return named.get(name, _OPS.attention_decode).default


def _run_reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    check_arguments(q, k_cache, v_cache, cache_seqlens, *options)
    page_table, scale, bands, softcap, sink_logits = options
    if not torch.compiler.is_compiling():
        check_values(k_cache, cache_seqlens, page_table)
    backends.record("attention_decode:reference")
    return reference.attention_decode(
        *(q, k_cache, v_cache, cache_seqlens),
        page_table=page_table,
        scale=scale,
        mask=Lowered(bands=tuple(bands or ())),
        softcap=softcap,
        sink_logits=sink_logits,
    )


def _fill(
    page_table: Tensor | None = None,
    scale: float | None = None,
    bands: Sequence[int] | None = None,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
) -> tuple[Any, ...]:
    """The optional arguments of the schema, in its order."""
    return page_table, scale, bands, softcap, sink_logits


def _fake(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, *rest: Any, **named: Any
) -> tuple[Tensor, Tensor]:
    check_arguments(q, k_cache, v_cache, cache_seqlens, *_fill(*rest, **named))
    rows = q.shape[:-1]
    return q.new_empty((*rows, v_cache.shape[3])), q.new_empty(rows, dtype=torch.float32)


def _triton(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, *rest: Any, **named: Any
) -> tuple[Tensor, Tensor]:
    options = _fill(*rest, **named)
    check_arguments(q, k_cache, v_cache, cache_seqlens, *options)
    sizes = _sizes(q, v_cache, options[2])
    backends.select("attention_decode", q.device.type, q.dtype, sizes, "triton")
    from effkern._triton import attention_decode as launcher

    backends.record("attention_decode:triton")
    page_table, scale, bands, softcap, sink_logits = options
    return launcher.decode(
        q, k_cache, v_cache, cache_seqlens, page_table, scale, tuple(bands or ()), softcap, sink_logits
    )


def _cuda(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, *rest: Any, **named: Any
) -> tuple[Tensor, Tensor]:
    """The key CUDA of `attention_decode`: C++ where it was asked for, else Triton, else the reference."""
    options = _fill(*rest, **named)
    name = backends.select("attention_decode", q.device.type, q.dtype, _sizes(q, v_cache, options[2]))
    runs: dict[str, Any] = {"reference": _run_reference, "cuda": _OPS.attention_decode_cuda.default}
    return runs.get(name, _triton)(q, k_cache, v_cache, cache_seqlens, *options)


def _no_cuda_kernel(q: Tensor, k_cache: Tensor, v_cache: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    backends.select("attention_decode", q.device.type, q.dtype, _sizes(q, v_cache, None), "cuda")
    raise AssertionError("unreachable: select refuses")


def _cpu_refusal(device: str, dtype: torch.dtype, sizes: Mapping[str, int]) -> str | None:
    if dtype not in FAST_DTYPES:
        return f"it takes float32, bfloat16 and float16, not {dtype_name(dtype)}"
    if not (1 <= sizes["head_dim"] <= MAX_HEAD_DIM and 1 <= sizes["value_dim"] <= MAX_HEAD_DIM):
        return f"head dims go from 1 to {MAX_HEAD_DIM}, got {sizes['head_dim']} and {sizes['value_dim']}"
    return None


def _cuda_refusal(device: str, dtype: torch.dtype, sizes: Mapping[str, int]) -> str | None:
    """What the kernels declare (csrc/attention_decode/split_launch.h) against a request."""
    if _CUDA_MISSING:
        return f"the CUDA library is not loaded: {_lib.status().cuda.reason}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, not {dtype_name(dtype)}"
    most, step, dims = _FEATURES["max_dim"], _FEATURES["dim_step"], (sizes["head_dim"], sizes["value_dim"])
    if not all(1 <= dim <= most and dim % step == 0 for dim in dims):
        return f"head dims are multiples of {step} up to {most}, got {dims[0]} and {dims[1]}"
    if sizes.get("bands", 0) > _FEATURES["max_bands"]:
        return f"it takes masks of up to {_FEATURES['max_bands']} windows, got {sizes['bands']}"
    major, minor = torch.cuda.get_device_capability()
    least = _FEATURES["capability"]
    if 10 * major + minor < least:
        return f"it needs compute capability {least / 10} or later, not {major}.{minor}"
    return None


for _op in ("attention_decode", "attention_decode_triton", "attention_decode_cuda"):
    torch.library.register_fake(f"effkern::{_op}", _fake)
    register_autocast(_op, 3)
    register_flops(
        _op,
        lambda q, k, v, lengths, page_table=None, *_, **__: decode_flops(
            q, k, v, lengths, page_table=page_table
        ),
    )
register_kernel("attention_decode", _cuda, "CUDA")
register_kernel("attention_decode_triton", _triton, "CPU", "CUDA")
_FEATURES = _host.attention_decode_features()
_CUDA_MISSING = not torch._C._dispatch_has_kernel_for_dispatch_key("effkern::attention_decode_cuda", "CUDA")
register_kernel("attention_decode_cuda", _no_cuda_kernel, "CPU", *(("CUDA",) if _CUDA_MISSING else ()))

registry.register(
    registry.OpSpec(
        name="attention_decode",
        family="attention",
        public=attention_decode,
        reference=reference.attention_decode,
        schemas=("attention_decode", "attention_decode_triton", "attention_decode_cuda"),
        backends=(
            registry.Backend("cpu", ("cpu",), _cpu_refusal),
            registry.Backend(
                "cuda", ("cuda",), _cuda_refusal, note="unverified on hardware", automatic=False
            ),
            registry.Backend("triton", (), triton_refusal("attention_decode"), note="unverified on hardware"),
            registry.Backend("reference", (), refuse_all_but_floating, note="plain PyTorch"),
        ),
        dtypes=(*FAST_DTYPES, torch.float64),
        sizes={"head_dim": 128, "value_dim": 128},
        samples=samples,
        bad_samples=bad_samples,
        calls=calls,
        flops=decode_flops,
        bytes=decode_bytes,
        double_backward="",
    )
)
