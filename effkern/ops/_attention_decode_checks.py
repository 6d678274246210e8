"""Checks of attention_decode's arguments, the same as in csrc/attention_decode/checks.h."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from effkern.ops._attention_checks import MAX_HEAD_DIM
from effkern.ops._dispatch import FAST_DTYPES, dtype_name


def require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(f"attention_decode: {message}")


def check_arguments(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    page_table: Tensor | None,
    scale: float | None,
    bands: Sequence[int] | None,
    softcap: float,
    sink_logits: Tensor | None,
) -> None:
    """What the C++ side checks, but for the values of cache_seqlens and page_table."""
    for name, optional in (("page_table", page_table), ("sink_logits", sink_logits)):
        if optional is not None and not isinstance(optional, Tensor):
            raise TypeError(f"attention_decode: {name} must be a tensor, got {type(optional).__name__}")
    for name, t in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        require(t.dim() == 4, f"{name} must have 4 dimensions, got shape {tuple(t.shape)}")
        require(t.dtype == q.dtype, f"{name} is {dtype_name(t.dtype)} but q is {dtype_name(q.dtype)}")
        require(t.device == q.device, f"{name} is on {t.device}, q is on {q.device}")
    allowed = (*FAST_DTYPES, torch.float64)
    require(
        q.dtype in allowed,
        f"q and the caches must be float32, bfloat16 or float16, got {dtype_name(q.dtype)}",
    )
    batch, heads = q.shape[:2]
    require(k_cache.shape[3] == q.shape[3], f"k_cache has head dim {k_cache.shape[3]}, q has {q.shape[3]}")
    for name, dim in (("q", q.shape[3]), ("v_cache", v_cache.shape[3])):
        require(dim >= 1, f"{name} has head dim {dim}, expected 1 to {MAX_HEAD_DIM}")
    require(
        v_cache.shape[:3] == k_cache.shape[:3],
        f"v_cache has shape {tuple(v_cache.shape)}, which does not match k_cache's {tuple(k_cache.shape)}",
    )
    kv_heads = k_cache.shape[1]
    divides = heads % kv_heads == 0 if kv_heads > 0 else heads == 0
    require(divides, f"k_cache has {kv_heads} heads, which does not divide q's {heads}")
    require(
        cache_seqlens.dtype == torch.int32 and tuple(cache_seqlens.shape) == (batch,),
        f"cache_seqlens must be int32 of shape ({batch},), got {dtype_name(cache_seqlens.dtype)} of shape "
        f"{tuple(cache_seqlens.shape)}",
    )
    require(
        cache_seqlens.device == q.device, f"cache_seqlens is on {cache_seqlens.device}, q is on {q.device}"
    )
    if page_table is None:
        require(k_cache.shape[0] == batch, f"k_cache has batch {k_cache.shape[0]}, q has {batch}")
    else:
        good = page_table.dtype == torch.int32 and page_table.dim() == 2 and page_table.shape[0] == batch
        require(
            good and page_table.device == q.device,
            f"page_table must be int32 of shape ({batch}, pages of a sequence) on q's device, got "
            f"{dtype_name(page_table.dtype)} of shape {tuple(page_table.shape)}",
        )
    most = torch.finfo(torch.float32).max
    if isinstance(scale, float):
        good = math.isfinite(scale) and abs(scale) <= most
        require(good, f"scale must be finite in float32, got {scale}")
    require(bands is None or len(bands) % 3 == 0, "bands must hold triples (left, right, sink)")
    good = math.isfinite(softcap) and 0.0 <= softcap <= most
    require(good, f"softcap must be finite and at least 0, got {softcap}")
    if sink_logits is not None:
        shape = tuple(sink_logits.shape)
        if shape != (heads,):
            raise RuntimeError(
                f"attention: sink_logits must have shape ({heads},), one number a query head, got {shape}"
            )


def check_values(k_cache: Tensor, cache_seqlens: Tensor, page_table: Tensor | None) -> None:
    """What a kernel on the CPU finds out for itself."""
    size = k_cache.shape[2]
    capacity = size if page_table is None else size * page_table.shape[1]
    if page_table is not None:
        # All at once, and one by one only to say which is wrong: there may be thousands of pages.
        read = torch.arange(page_table.shape[1]) * size < cache_seqlens[:, None]
        wrong = read & ((page_table < 0) | (page_table >= k_cache.shape[0]))
        if not wrong.any() and ((cache_seqlens >= 0) & (cache_seqlens <= capacity)).all():
            return
    for entry, length in enumerate(cache_seqlens.tolist()):
        require(
            0 <= length <= capacity,
            f"cache_seqlens[{entry}] is {length}, the cache holds 0 to {capacity}",
        )
        if page_table is None:
            continue
        for page, number in enumerate(page_table[entry, : -(-length // size)].tolist()):
            require(
                0 <= number < k_cache.shape[0],
                f"page_table[{entry}, {page}] is {number}, there are {k_cache.shape[0]} pages",
            )
