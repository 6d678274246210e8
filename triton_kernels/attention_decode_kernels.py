"""Decoding: a few queries against a long cache. The keys are split into chunks, one program each, and a second kernel
merges what the chunks found by its log-sum-exp. fp32 accumulation, scores in base 2, no atomics."""

import triton
import triton.language as tl

from .attention_pairs import LOG2E, tanh

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def visible_range(bands, first, last, begin, end, NB: tl.constexpr):
    """What bands leave of keys [begin, end) for positions first to last: a range that holds all of it."""
    low = 0
    sinks = 0
    for n in tl.static_range(NB):
        low = tl.maximum(low, first - tl.load(bands + 3 * n))
        end = tl.minimum(end, last + tl.load(bands + 3 * n + 1) + 1)
        sinks = tl.maximum(sinks, tl.load(bands + 3 * n + 2))
    behind = (begin < sinks) & (end <= low)  # a chunk of the sinks, before the window
    within = begin >= sinks
    end = tl.where(behind, tl.minimum(end, sinks), end)
    begin = tl.where(within, tl.maximum(begin, tl.minimum(low, end)), begin)
    return begin, end


@triton.jit
def cache_tile(table, page, base, keys, end, kb, ks, D: tl.constexpr, BLOCK_D: tl.constexpr,
               PAGED: tl.constexpr):
    """(keys, BLOCK_D) rows of a cache; zero from `end` on and beyond column D. `base` points at the kv head."""
    cols = tl.arange(0, BLOCK_D)
    inside = keys < end
    if PAGED:
        pages = tl.load(table + keys // page, mask=inside, other=0)
        rows = pages.to(tl.int64) * kb + (keys % page).to(tl.int64) * ks
    else:
        rows = keys.to(tl.int64) * ks
    return tl.load(base + rows[:, None] + cols[None, :], mask=inside[:, None] & (cols < D)[None, :], other=0.0)


@triton.jit(do_not_specialize=["sq", "kv_heads", "group", "chunks", "chunk", "page", "max_pages"])
def attention_decode_chunk_kernel(
        q, k, v, lengths, table, bands, values, tops, totals, qb, qh, qs, kb, kh, ks, vb, vh, vs,
        sq, kv_heads, group, chunks, chunk, page, max_pages, scale, softcap,
        D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_R: tl.constexpr,
        BLOCK_N: tl.constexpr, NB: tl.constexpr, CAP: tl.constexpr, PAGED: tl.constexpr, PRECISION: tl.constexpr):
    """One program per (chunk of keys, kv head, sequence): all rows of the group, (head, query), at once."""
    part = tl.program_id(0) % chunks
    unit = tl.program_id(0) // chunks
    kv_head = unit % kv_heads
    batch = unit // kv_heads
    length = tl.load(lengths + batch)
    row = tl.arange(0, BLOCK_R)
    count = group * sq
    query = row % sq
    head = kv_head * group + row // sq
    position = length - sq + query
    dims = tl.arange(0, BLOCK_D)
    at = q + batch.to(tl.int64) * qb + head.to(tl.int64)[:, None] * qh + query.to(tl.int64)[:, None] * qs
    qt = tl.load(at + dims[None, :], mask=(row < count)[:, None] & (dims < D)[None, :], other=0.0)
    acc = tl.zeros([BLOCK_R, BLOCK_DV], tl.float32)
    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    begin, end = visible_range(bands, length - sq, length - 1, part * chunk, tl.minimum((part + 1) * chunk, length), NB)
    first = 0 if PAGED else batch
    k_base = k + tl.cast(first, tl.int64) * kb + kv_head.to(tl.int64) * kh
    v_base = v + tl.cast(first, tl.int64) * vb + kv_head.to(tl.int64) * vh
    pages = table
    if PAGED:
        pages = table + batch.to(tl.int64) * max_pages
    for col in range(begin, end, BLOCK_N):
        keys = col + tl.arange(0, BLOCK_N)
        kt = cache_tile(pages, page, k_base, keys, end, kb, ks, D, BLOCK_D, PAGED)
        z = tl.dot(qt, kt.T, input_precision=PRECISION) * scale
        if CAP:
            z = softcap * tanh(z / softcap)
        seen = (keys < end)[None, :] & (keys[None, :] <= position[:, None])
        for n in tl.static_range(NB):
            left = tl.load(bands + 3 * n)
            right = tl.load(bands + 3 * n + 1)
            sink = tl.load(bands + 3 * n + 2)
            near = keys[None, :] >= position[:, None] - left
            seen = seen & (keys[None, :] <= position[:, None] + right) & (near | (keys < sink)[None, :])
        z = tl.where(seen, z * LOG2E, float("-inf"))
        new_top = tl.maximum(top, tl.max(z, 1))
        anchor = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(z - anchor[:, None])
        shrink = tl.exp2(top - anchor)
        total = total * shrink + tl.sum(weights, 1)
        vt = cache_tile(pages, page, v_base, keys, end, vb, vs, DV, BLOCK_DV, PAGED)
        acc = tl.dot(weights.to(vt.dtype), vt, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top
    line = tl.program_id(0).to(tl.int64) * count + row
    keep = row < count
    cols = tl.arange(0, BLOCK_DV)
    tl.store(values + line[:, None] * DV + cols[None, :], acc, mask=keep[:, None] & (cols < DV)[None, :])
    tl.store(tops + line, top, mask=keep)
    tl.store(totals + line, total, mask=keep)


@triton.jit(do_not_specialize=["count", "sq", "kv_heads", "group", "chunks"])
def attention_decode_merge_kernel(values, tops, totals, sinks, out, lse, count, sq, kv_heads, group, chunks,
                                  DV: tl.constexpr, BLOCK_DV: tl.constexpr, SINKS: tl.constexpr):
    """One program per row: the chunks of a kv head in their order, with the sink as one more term."""
    unit = tl.program_id(0) // count
    row = tl.program_id(0) % count
    head = unit % kv_heads * group + row // sq
    first = (unit * chunks).to(tl.int64) * count + row
    top = tl.full([], float("-inf"), tl.float32)
    if SINKS:
        top = tl.load(sinks + head).to(tl.float32) * LOG2E
    sink = top
    for part in range(chunks):
        top = tl.maximum(top, tl.load(tops + first + part * count))
    anchor = tl.where(top == float("-inf"), 0.0, top)
    total = tl.exp2(sink - anchor)
    cols = tl.arange(0, BLOCK_DV)
    acc = tl.zeros([BLOCK_DV], tl.float32)
    for part in range(chunks):
        at = first + part * count
        share = tl.exp2(tl.load(tops + at) - anchor)
        total += share * tl.load(totals + at)
        acc += share * tl.load(values + at * DV + cols, mask=cols < DV, other=0.0)
    nothing = top == float("-inf")
    acc = acc / tl.where(nothing, 1.0, total)
    line = unit.to(tl.int64) * count + row
    tl.store(out + line * DV + cols, acc.to(out.dtype.element_ty), mask=cols < DV)
    tl.store(lse + line, tl.where(nothing, top, (anchor + tl.log2(tl.where(nothing, 1.0, total))) * LN2))
