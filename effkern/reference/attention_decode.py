"""Attention of few queries to a cache in plain PyTorch: gathered, masked to the valid keys, and attended at once."""

from __future__ import annotations

import torch
from torch import Tensor

from effkern.masks import Lowered, Mask
from effkern.reference.attention import attention


def _gathered(cache: Tensor, page_table: Tensor | None) -> Tensor:
    """(B, Hkv, capacity, D). Entries of the table behind the valid keys may hold anything."""
    if page_table is None:
        return cache
    pages = cache[page_table.long().clamp(0, max(cache.shape[0] - 1, 0))]  # (B, max_pages, Hkv, page, D)
    return pages.transpose(1, 2).flatten(2, 3)


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    page_table: Tensor | None = None,
    scale: float | None = None,
    mask: Mask | Lowered | None = None,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) with the shapes of `effkern.attention_decode`, for any floating dtype."""
    k, v = _gathered(k_cache, page_table), _gathered(v_cache, page_table)
    lengths = cache_seqlens.long()[:, None, None, None]
    j = torch.arange(k.shape[2], device=q.device)
    valid = j[:, None] < lengths  # (B, 1, capacity, 1)
    k, v = k.masked_fill(~valid, 0.0), v.masked_fill(~valid, 0.0)
    p = lengths - q.shape[2] + torch.arange(q.shape[2], device=q.device)[:, None]
    visible = j <= p
    bands = () if mask is None else (mask.lower() if isinstance(mask, Mask) else mask).bands
    for left, right, sink in zip(bands[::3], bands[1::3], bands[2::3], strict=True):
        visible = visible & (j <= p + right) & ((j >= p - left) | (j < sink))
    seen = Lowered(visible=visible)
    return attention(q, k, v, scale=scale, mask=seen, softcap=softcap, sink_logits=sink_logits)
