"""Attention forward and backward kernels: online softmax over tile lists, no atomics, fp32 accumulation.

Scores live in base 2: `c` = scale * log2(e), so that P = exp2(c * QK^T - lse2). The backward recomputes P:
    delta = rowsum(dO * O) - dLSE,  dV = P^T dO,  dS = P * (dO V^T - delta),  dQ = scale dS K,  dK = scale dS^T Q.
"""

import triton
import triton.language as tl

from .attention_tiles import (
    key_tiles,
    last_key,
    load_line,
    load_tile,
    locate,
    query_tiles,
    store_tile,
    visited,
)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def attend(acc, top, total, q, last, k, v, batch, head, first_k, sk, begin, end, c,
           kb, kh, ks, vb, vh, vs, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
           BLOCK_N: tl.constexpr, PACKED: tl.constexpr, TMA: tl.constexpr,
           PRECISION: tl.constexpr, MASKED: tl.constexpr):
    """Fold key tiles [begin, end) into the running maximum, sum and output of one query tile."""
    for step in range(begin, end):
        tile = visited(step, end, 0)
        col = tile * BLOCK_N
        kt = load_tile(k, batch, head, first_k + col, first_k + sk, kb, kh, ks, BLOCK_N, D, BLOCK_D, TMA, MASKED,
                       PACKED)
        s = tl.dot(q, kt.T, input_precision=PRECISION)
        if MASKED:
            # Hidden after scaling: -inf times a scale of 0 would be NaN.
            visible = (col + tl.arange(0, BLOCK_N))[None, :] <= last[:, None]
            s = tl.where(visible, s * c, float("-inf"))
            new_top = tl.maximum(top, tl.max(s, 1))
            # A row that has seen no key yet has top -inf, and -inf - -inf would be NaN too.
            anchor = tl.where(new_top == float("-inf"), 0.0, new_top)
            p = tl.exp2(s - anchor[:, None])
        else:
            new_top = tl.maximum(top, tl.max(s, 1) * c)
            anchor = new_top
            p = tl.exp2(s * c - anchor[:, None])
        shrink = tl.exp2(top - anchor)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        vt = load_tile(v, batch, head, first_k + col, first_k + sk, vb, vh, vs, BLOCK_N, DV, BLOCK_DV, TMA, MASKED,
                       PACKED)
        acc = tl.dot(p.to(vt.dtype), vt, acc, input_precision=PRECISION)
        top = new_top
    return acc, top, total


@triton.jit(do_not_specialize=["sq", "sk", "tiles", "total_heads", "section", "heads", "group"])
def attention_forward_kernel(
        q, k, v, out, lse, table, lengths_q, lengths_k, qb, qh, qs, kb, kh, ks, vb, vh, vs,
        sq, sk, tiles, total_heads, section, heads, group, scale,
        D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, TOP_LEFT: tl.constexpr,
        PACKED: tl.constexpr, TMA: tl.constexpr, PARTIAL: tl.constexpr, PRECISION: tl.constexpr):
    """Query-stationary: one program per (query tile, head). `sq` also counts the rows of a head in out and lse."""
    tile, head, batch, _, first_q, first_k, seq_q, seq_k, shift = locate(
        tiles, total_heads, section, heads, table, lengths_q, lengths_k, sq, sk, CAUSAL, PACKED, TOP_LEFT)
    if tile < 0:
        return
    c = scale * LOG2E
    row = tile * BLOCK_M
    rows = row + tl.arange(0, BLOCK_M)
    kv_head = head // group
    qt = load_tile(q, batch, head, first_q + row, first_q + seq_q, qb, qh, qs, BLOCK_M, D, BLOCK_D, TMA, True, False)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    last = last_key(rows, seq_k, shift, CAUSAL)
    full, end = key_tiles(row, seq_q, seq_k, shift, CAUSAL, BLOCK_M, BLOCK_N)
    acc, top, total = attend(acc, top, total, qt, last, k, v, batch, kv_head, first_k, seq_k, 0, full, c,
                             kb, kh, ks, vb, vh, vs, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, PACKED, TMA,
                             PRECISION, False)
    if PARTIAL:
        acc, top, total = attend(acc, top, total, qt, last, k, v, batch, kv_head, first_k, seq_k, full, end, c,
                                 kb, kh, ks, vb, vh, vs, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, PACKED, TMA,
                                 PRECISION, True)
    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    store_tile(out, acc, batch, heads, head, sq, first_q + row, first_q + seq_q, BLOCK_M, DV, BLOCK_DV)
    natural = tl.where(empty, float("-inf"), (top + tl.log2(total)) * LN2)
    line = lse + (batch * heads + head).to(tl.int64) * sq + first_q
    tl.store(line + rows, natural, mask=rows < seq_q)


@triton.jit(do_not_specialize=["sq", "heads"])
def attention_delta_kernel(grad_out, grad_lse, out, lse, stats, gb, gh, gs, ob, oh, os, sq, heads,
                           DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, HAS_GRAD_LSE: tl.constexpr):
    """Row statistics for the backward: stats[..., 0, :] = lse in base 2, stats[..., 1, :] = delta.

    A row that saw no key gets +inf and 0, so that P and dS are 0 there.
    """
    # One grid axis: a second one would end at 65535 heads.
    blocks = tl.cdiv(sq, BLOCK_M)
    row = tl.program_id(0) % blocks * BLOCK_M
    line = tl.program_id(0) // blocks
    batch = line // heads
    head = line % heads
    rows = row + tl.arange(0, BLOCK_M)
    keep = rows < sq
    g = load_tile(grad_out, batch, head, row, sq, gb, gh, gs, BLOCK_M, DV, BLOCK_DV, False, True, False)
    o = load_tile(out, batch, head, row, sq, ob, oh, os, BLOCK_M, DV, BLOCK_DV, False, True, False)
    delta = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    at = line.to(tl.int64) * sq + rows
    if HAS_GRAD_LSE:
        delta -= tl.load(grad_lse + at, mask=keep, other=0.0).to(tl.float32)
    value = tl.load(lse + at, mask=keep, other=0.0)
    empty = value == float("-inf")
    at += line.to(tl.int64) * sq
    tl.store(stats + at, tl.where(empty, float("inf"), value * LOG2E), mask=keep)
    tl.store(stats + sq + at, tl.where(empty, 0.0, delta), mask=keep)


@triton.jit
def gather_query_tiles(dk, dv, kt, vt, cols, q, grad_out, lines, length, batch, kv_head, group, first_q, sq, shift,
                       begin, count, head_count, skip, c, qb, qh, qs, gb, gh, gs,
                       D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
                       BLOCK_M: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr, TMA: tl.constexpr,
                       PRECISION: tl.constexpr, MASKED: tl.constexpr):
    """Add what a list of query tiles gives to dK and dV of one key tile. S and dP are kept transposed (keys, queries):
    P^T and dS^T then feed the next product from registers."""
    for step in range(group * count):
        head = kv_head * group + step // count
        line = lines + (step // count).to(tl.int64) * (2 * length)
        row = visited(begin + step % count, head_count, skip) * BLOCK_M
        rows = row + tl.arange(0, BLOCK_M)
        qt = load_tile(q, batch, head, first_q + row, first_q + sq, qb, qh, qs, BLOCK_M, D, BLOCK_D, TMA, MASKED,
                       PACKED)
        gt = load_tile(grad_out, batch, head, first_q + row, first_q + sq, gb, gh, gs, BLOCK_M, DV, BLOCK_DV, TMA,
                       MASKED, PACKED)
        lse2 = load_line(line, rows, sq, float("inf"), MASKED)
        st = tl.dot(kt, qt.T, input_precision=PRECISION)
        st = st * c - lse2[None, :]
        if MASKED and CAUSAL:
            st = tl.where((cols - shift)[:, None] <= rows[None, :], st, float("-inf"))
        pt = tl.exp2(st)
        dv = tl.dot(pt.to(gt.dtype), gt, dv, input_precision=PRECISION)
        dpt = tl.dot(vt, gt.T, input_precision=PRECISION)
        # Loaded here and not beside lse2: registers are short between the two products.
        delta = load_line(line + length, rows, sq, 0.0, MASKED)
        dst = pt * (dpt - delta[None, :])
        dk = tl.dot(dst.to(qt.dtype), qt, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["sq", "sk", "tiles", "total_heads", "section", "kv_heads", "group"])
def attention_backward_kv_kernel(
        q, k, v, grad_out, stats, grad_k, grad_v, table, lengths_q, lengths_k,
        qb, qh, qs, kb, kh, ks, vb, vh, vs, gb, gh, gs,
        sq, sk, tiles, total_heads, section, kv_heads, group, scale,
        D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, TOP_LEFT: tl.constexpr,
        PACKED: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr):
    """Key-stationary: one program per (key tile, kv head), looping over the query heads of the group in order."""
    tile, kv_head, batch, _, first_q, first_k, seq_q, seq_k, shift = locate(
        tiles, total_heads, section, kv_heads, table, lengths_q, lengths_k, sq, sk, False, PACKED, TOP_LEFT)
    if tile < 0:
        return
    c = scale * LOG2E
    col = tile * BLOCK_N
    cols = col + tl.arange(0, BLOCK_N)
    kt = load_tile(k, batch, kv_head, first_k + col, first_k + seq_k, kb, kh, ks, BLOCK_N, D, BLOCK_D, TMA, True, False)
    vt = load_tile(v, batch, kv_head, first_k + col, first_k + seq_k, vb, vh, vs, BLOCK_N, DV, BLOCK_DV, TMA, True,
                   False)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    begin, full, full_end, end = query_tiles(col, seq_q, seq_k, shift, CAUSAL, BLOCK_M, BLOCK_N)
    lines = stats + ((batch * kv_heads + kv_head) * group).to(tl.int64) * (2 * sq) + first_q
    # Tiles on the diagonal, then the ragged last one. The loop stays even where it is known to be empty: without it
    # the accumulators enter the next loop as constants, and ptxas then serialises its wgmma.
    dk, dv = gather_query_tiles(
        dk, dv, kt, vt, cols, q, grad_out, lines, sq, batch, kv_head, group, first_q, seq_q, shift,
        begin, full - begin + end - full_end, full, full_end - full, c, qb, qh, qs, gb, gh, gs,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, CAUSAL, PACKED, TMA, PRECISION, True)
    dk, dv = gather_query_tiles(
        dk, dv, kt, vt, cols, q, grad_out, lines, sq, batch, kv_head, group, first_q, seq_q, shift,
        full, full_end - full, full_end, 0, c, qb, qh, qs, gb, gh, gs,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, CAUSAL, PACKED, TMA, PRECISION, False)
    store_tile(grad_k, dk * scale, batch, kv_heads, kv_head, sk, first_k + col, first_k + seq_k, BLOCK_N, D, BLOCK_D)
    store_tile(grad_v, dv, batch, kv_heads, kv_head, sk, first_k + col, first_k + seq_k, BLOCK_N, DV, BLOCK_DV)


@triton.jit
def gather_key_tiles(dq, qt, gt, lse2, delta, last, k, v, batch, head, first_k, sk, begin, end, c,
                     kb, kh, ks, vb, vh, vs, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
                     BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr, PACKED: tl.constexpr,
                     TMA: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr):
    """Add what key tiles [begin, end) give to dQ of one query tile."""
    for step in range(begin, end):
        col = visited(step, end, 0) * BLOCK_N
        kt = load_tile(k, batch, head, first_k + col, first_k + sk, kb, kh, ks, BLOCK_N, D, BLOCK_D, TMA, MASKED,
                       PACKED)
        vt = load_tile(v, batch, head, first_k + col, first_k + sk, vb, vh, vs, BLOCK_N, DV, BLOCK_DV, TMA, MASKED,
                       PACKED)
        s = tl.dot(qt, kt.T, input_precision=PRECISION)
        p = tl.exp2(s * c - lse2[:, None])
        dp = tl.dot(gt, vt.T, input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        if MASKED:
            visible = (col + tl.arange(0, BLOCK_N))[None, :] <= last[:, None]
            ds = tl.where(visible, ds, 0.0)
        dq = tl.dot(ds.to(kt.dtype), kt, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=["sq", "sk", "tiles", "total_heads", "section", "heads", "group"])
def attention_backward_q_kernel(
        q, k, v, grad_out, stats, grad_q, table, lengths_q, lengths_k,
        qb, qh, qs, kb, kh, ks, vb, vh, vs, gb, gh, gs,
        sq, sk, tiles, total_heads, section, heads, group, scale,
        D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, TOP_LEFT: tl.constexpr,
        PACKED: tl.constexpr, TMA: tl.constexpr, PARTIAL: tl.constexpr, PRECISION: tl.constexpr):
    """Query-stationary: one program per (query tile, head). A second pass over the scores is the price of dQ without
    atomics: every gradient element is written once, by one program, in a fixed order of additions."""
    tile, head, batch, _, first_q, first_k, seq_q, seq_k, shift = locate(
        tiles, total_heads, section, heads, table, lengths_q, lengths_k, sq, sk, CAUSAL, PACKED, TOP_LEFT)
    if tile < 0:
        return
    c = scale * LOG2E
    row = tile * BLOCK_M
    rows = row + tl.arange(0, BLOCK_M)
    kv_head = head // group
    qt = load_tile(q, batch, head, first_q + row, first_q + seq_q, qb, qh, qs, BLOCK_M, D, BLOCK_D, TMA, True, False)
    gt = load_tile(grad_out, batch, head, first_q + row, first_q + seq_q, gb, gh, gs, BLOCK_M, DV, BLOCK_DV, TMA, True,
                   False)
    line = stats + (batch * heads + head).to(tl.int64) * (2 * sq) + first_q
    lse2 = tl.load(line + rows, mask=rows < seq_q, other=float("inf"))
    delta = tl.load(line + sq + rows, mask=rows < seq_q, other=0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    last = last_key(rows, seq_k, shift, CAUSAL)
    full, end = key_tiles(row, seq_q, seq_k, shift, CAUSAL, BLOCK_M, BLOCK_N)
    dq = gather_key_tiles(dq, qt, gt, lse2, delta, last, k, v, batch, kv_head, first_k, seq_k, 0, full, c,
                          kb, kh, ks, vb, vh, vs, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, PACKED, TMA, PRECISION,
                          False)
    if PARTIAL:
        dq = gather_key_tiles(dq, qt, gt, lse2, delta, last, k, v, batch, kv_head, first_k, seq_k, full, end, c,
                              kb, kh, ks, vb, vh, vs, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, PACKED, TMA,
                              PRECISION, True)
    store_tile(grad_q, dq * scale, batch, heads, head, sq, first_q + row, first_q + seq_q, BLOCK_M, D, BLOCK_D)
