"""Launcher of the Triton decode kernels."""

from __future__ import annotations

import contextlib

import torch
import triton

from . import attention_decode_kernels as kernels
from .attention import architecture, supports
from .attention_tables import padded, precision

__all__ = ["decode", "supports"]

# Programs that fill a large GPU twice over; the split depends on shapes alone, so results do not depend on the device.
_PROGRAMS, _LEAST_KEYS = 264, 256
_MOST_ROWS = 64  # (head, query) rows of a tile


def chunk_keys(units: int, capacity: int, block: int) -> int:
    """Keys of a chunk: enough chunks to fill the device, none shorter than is worth a program."""
    splits = max(1, min(triton.cdiv(_PROGRAMS, max(units, 1)), triton.cdiv(capacity, _LEAST_KEYS)))
    return max(block, triton.cdiv(triton.cdiv(capacity, splits), block) * block)


def decode(q, k_cache, v_cache, cache_seqlens, page_table, scale, bands, softcap, sink_logits):
    """(out, lse) of q (B, Hq, Sq, D) against a contiguous or paged cache; `bands` as in the schema."""
    batch, heads, sq, dim = q.shape
    kv_heads, page, value_dim = k_cache.size(1), k_cache.size(2), v_cache.size(3)
    out = torch.empty((batch, heads, sq, value_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, sq), dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return out, lse
    group = heads // kv_heads
    step = max(1, _MOST_ROWS // group)
    if sq > step:  # more rows than a tile should hold: the queries in slices, each with the keys before its end
        slices = [(begin, min(begin + step, sq)) for begin in range(0, sq, step)]
        parts = [decode(q[:, :, begin:end], k_cache, v_cache, (cache_seqlens - (sq - end)).clamp(min=0), page_table,
                        scale, bands, softcap, sink_logits) for begin, end in slices]
        return torch.cat([part[0] for part in parts], 2), torch.cat([part[1] for part in parts], 2)
    q, k_cache, v_cache = (t if t.stride(3) == 1 or t.size(3) == 1 else t.contiguous() for t in (q, k_cache, v_cache))
    paged = page_table is not None
    capacity = page * (page_table.size(1) if paged else 1)
    arch, units = architecture(q.device), batch * kv_heads
    rows = group * sq
    block_r = max(16, triton.next_power_of_2(rows))
    wide = max(padded(dim), padded(value_dim))
    block = 16 if arch == 0 else 32 if q.dtype == torch.float32 or wide > 128 or block_r > 32 else 64
    chunk = chunk_keys(units, capacity, block)
    chunks = max(1, triton.cdiv(capacity, chunk))
    values = torch.empty((units, chunks, rows, value_dim), dtype=torch.float32, device=q.device)
    tops, totals = (torch.empty((units, chunks, rows), dtype=torch.float32, device=q.device) for _ in range(2))
    band_terms = torch.tensor(list(bands), dtype=torch.int32, device=q.device) if bands else None
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        kernels.attention_decode_chunk_kernel[(units * chunks,)](
            q, k_cache, v_cache, cache_seqlens, page_table.contiguous() if paged else None, band_terms, values, tops,
            totals, *q.stride()[:3], *k_cache.stride()[:3], *v_cache.stride()[:3], sq, kv_heads, group, chunks, chunk,
            max(page, 1), page_table.size(1) if paged else 0, dim**-0.5 if scale is None else float(scale),
            float(softcap), D=dim, DV=value_dim, BLOCK_D=padded(dim), BLOCK_DV=padded(value_dim), BLOCK_R=block_r,
            BLOCK_N=block, NB=len(bands) // 3, CAP=softcap != 0.0, PAGED=paged, PRECISION=precision(arch, q.dtype),
            num_warps=4, num_stages=2)
        kernels.attention_decode_merge_kernel[(units * rows,)](
            values, tops, totals, None if sink_logits is None else sink_logits.contiguous(), out, lse, rows, sq,
            kv_heads, group, chunks, DV=value_dim, BLOCK_DV=padded(value_dim), SINKS=sink_logits is not None,
            num_warps=2)
    return out, lse
