"""flash-attn's decoding with a key-value cache. Public through effkern.integrations.flash_attn."""

from __future__ import annotations

import torch
from torch import Tensor

from effkern.integrations._flash_attn_window import window_mask
from effkern.masks import SlidingWindow
from effkern.ops.attention_decode import attention_decode, check_before_writing

NAME = "flash_attn_with_kvcache"


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the newest queries to a cache, which may first take in their keys and values. No gradient.

    Args:
        q: (B, Sq, Hq, D).
        k_cache: (entries, capacity, Hkv, D), or (pages, page, Hkv, D) with `block_table`; any page size.
        v_cache: the same with Dv.
        k, v: (B, Snew, Hkv, D) and Dv: written into the caches, in place, behind `cache_seqlens`.
        rotary_cos, rotary_sin: None: rotate q and k before the call.
        cache_seqlens: int32 (B,) or one number: keys in the cache before the call; None is the whole capacity.
        cache_batch_idx: int32 (B,): which entry of the caches belongs to which query; None is 0 to B - 1.
        cache_leftpad: None.
        block_table: int32 (B, pages of a sequence).
        softmax_scale: None is D ** -0.5.
        causal: the last query sees the last key; else all of them see all keys.
        window_size: as in `flash_attn_func`; several queries at once need `causal` to have a window.
        softcap: bound of the scores; 0 or less is off.
        rotary_interleaved: of no meaning without `rotary_cos`.
        alibi_slopes: None.
        num_splits: a hint to flash-attn's scheduler; the split here follows from the shapes.
        return_softmax_lse: also return lse.

    Returns:
        out (B, Sq, Hq, Dv); with `return_softmax_lse` also lse (B, Hq, Sq), natural logarithm, float32.

    Raises:
        NotImplementedError: rotary embeddings, `cache_leftpad`, `alibi_slopes`, a window of several queries without
            `causal`, both `block_table` and `cache_batch_idx`, or a gradient is asked for.
        RuntimeError: shapes, dtypes, devices or lengths do not fit. On a GPU the values of lengths and indices are not
            read back.

    A call that raises has not written to the caches.
    """
    for argument, value, instead in (
        ("rotary_cos", rotary_cos, "rotate q and k before the call"),
        ("rotary_sin", rotary_sin, "rotate q and k before the call"),
        ("cache_leftpad", cache_leftpad, "left-aligned sequences need none"),
        ("alibi_slopes", alibi_slopes, "flash_attn_func takes them"),
    ):
        if value is not None:
            raise NotImplementedError(f"{NAME}: {argument} must be None; {instead}")
    if block_table is not None and cache_batch_idx is not None:
        raise NotImplementedError(f"{NAME}: block_table and cache_batch_idx exclude each other")
    for argument, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        if tensor.dim() != 4:
            raise RuntimeError(f"{NAME}: {argument} must have 4 dimensions, got {tuple(tensor.shape)}")
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (q, k_cache, v_cache, k, v)
    ):
        raise NotImplementedError(f"{NAME}: there is no gradient; use flash_attn_func, or torch.no_grad()")
    batch, queries, heads, _ = q.shape
    lengths = _lengths(q, k_cache, cache_seqlens, block_table)
    # Entries of a contiguous cache are pages as long as the cache: an index into them is a table with one column.
    pages = block_table if cache_batch_idx is None else cache_batch_idx[:, None]
    mask = window_mask(NAME, causal, window_size)
    if mask is not None and mask.right is not None:
        if queries > 1:
            raise NotImplementedError(f"{NAME}: a window of {queries} queries at once needs causal=True")
        mask = None if mask.left is None else SlidingWindow(mask.left, None)  # nothing is behind the last key
    q = q.transpose(1, 2)
    if not causal and queries > 1:
        if mask is not None:
            raise NotImplementedError(f"{NAME}: a window of {queries} queries at once needs causal=True")
        # Without an order among the queries each is the last one: as heads of the same group they all are.
        group = heads // max(k_cache.shape[2], 1)
        q = q.unflatten(1, (-1, group)).flatten(1, 3)[:, :, None]
    if k is not None or v is not None:
        if k is None or v is None or cache_seqlens is None:
            raise RuntimeError(f"{NAME}: new keys need k, v and cache_seqlens")
        lengths = _append(q, k_cache, v_cache, k, v, lengths, pages, softmax_scale, softcap)
    out, lse = attention_decode(
        *(q, k_cache.transpose(1, 2), v_cache.transpose(1, 2), lengths),
        page_table=pages,
        mask=mask,
        scale=softmax_scale,
        softcap=max(softcap, 0.0),
        return_lse=True,
    )
    out = out.reshape(batch, heads, queries, -1).transpose(1, 2).contiguous()
    return (out, lse.reshape(batch, heads, queries)) if return_softmax_lse else out


def _lengths(
    q: Tensor, k_cache: Tensor, cache_seqlens: int | Tensor | None, block_table: Tensor | None
) -> Tensor:
    """int32 (B,): keys in the cache before the call."""
    if isinstance(cache_seqlens, Tensor):
        return cache_seqlens
    if cache_seqlens is None:
        cache_seqlens = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    return torch.full((q.shape[0],), cache_seqlens, dtype=torch.int32, device=q.device)


def _append(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    pages: Tensor | None,
    scale: float | None,
    softcap: float,
) -> Tensor:
    """Writes k and v (B, Snew, Hkv, D) behind the keys that the caches have, and returns how many that makes. First
    everything that could go wrong is asked, also what only the attention to them needs."""
    batch, new = k.shape[:2]
    size = k_cache.shape[1]
    capacity = size if pages is None else size * pages.shape[1]
    for argument, tensor, cache in (("k", k, k_cache), ("v", v, v_cache)):
        expected = len(lengths), new, *cache.shape[2:]
        if tensor.device != cache.device:
            raise RuntimeError(f"{NAME}: {argument} is on {tensor.device}, its cache on {cache.device}")
        if tuple(tensor.shape) != expected or tensor.dtype != cache.dtype:
            raise RuntimeError(
                f"{NAME}: {argument} must have shape {expected} and {cache.dtype}, got {tuple(tensor.shape)} and "
                f"{tensor.dtype}"
            )
    after = lengths + new
    if lengths.device.type == "cpu" and batch > 0:
        least, most = lengths.min().item(), lengths.max().item()
        if least < 0 or most + new > capacity:
            raise RuntimeError(
                f"{NAME}: cache_seqlens from {least} to {most} and {new} new keys do not fit the capacity {capacity}"
            )
    check_before_writing(
        *(q, k_cache.transpose(1, 2), v_cache.transpose(1, 2), after, pages, scale, max(softcap, 0.0))
    )
    position = lengths.long()[:, None] + torch.arange(new, device=k.device)  # (B, Snew)
    if pages is None:
        entry = torch.arange(batch, device=k.device)[:, None].expand_as(position)
    else:
        entry = pages.long().gather(1, position // size)
    k_cache[entry, position % size] = k
    v_cache[entry, position % size] = v
    return after
