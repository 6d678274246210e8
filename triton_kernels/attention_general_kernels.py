"""Attention forward and backward with masks as data, score terms and dropout: the kernels of attention_kernels.py in
general form. Which tiles are visited comes from stored lists (attention_lists.py) or, packed, from the lengths; what
happens to a pair is in attention_pairs.py. No atomics, fp32 accumulation, scores in base 2.
"""

import triton
import triton.language as tl

from .attention_pairs import LOG2E, kept_weights, shaped_scores, visible_pairs
from .attention_tiles import load_tile, locate, store_tile

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def listed(entries, full, total, eb, eh, most, batch, head, tile, lists, count, LISTED: tl.constexpr):
    """(pointer to the entries, how many are full, how many there are) of one tile; without stored lists all `count`
    tiles, each of them partial."""
    if LISTED:
        line = (batch * eb + head * eh).to(tl.int64) * lists + tile
        return entries + line * most, tl.load(full + line), tl.load(total + line)
    else:
        return entries, count * 0, count


@triton.jit
def logits(s, i, j, sq, sk, shift, entry, head, first_k, scale,
           bands, groups, layout, lb, lh, lr, block, ids, ib, visible, vis_b, vis_h, vis_r, vis_c,
           bias, bias_b, bias_h, bias_r, bias_c, slopes, softcap, seed, keep, threshold, half,
           NB: tl.constexpr, NG: tl.constexpr, LAYOUT: tl.constexpr, IDS: tl.constexpr, VISIBLE: tl.constexpr,
           BIAS: tl.constexpr, CAP: tl.constexpr, ALIBI: tl.constexpr, DROP: tl.constexpr,
           MASKED: tl.constexpr):
    """(z in base 2, dz / d(scale q.k)) of a tile of products."""
    z, slope = shaped_scores(s, i, j, sq, sk, shift, entry, head, scale, softcap, bias, bias_b, bias_h, bias_r, bias_c,
                             slopes, BIAS, CAP, ALIBI)
    if MASKED:
        seen = visible_pairs(i, j, sq, sk, shift, entry, head, half, bands, groups, layout, lb, lh, lr, block, ids, ib,
                             visible, vis_b, vis_h, vis_r, vis_c, first_k, NB, NG, LAYOUT, IDS, VISIBLE)
        z = tl.where(seen, z, float("-inf"))
    return z, slope


@triton.jit
def attend(acc, top, total, qt, rows, k, v, batch, entry, head, kv_head, first_row, first_k, sq, sk, shift, tiles,
           begin, end, scale, kb, kh, ks, vb, vh, vs,
           bands, groups, layout, lb, lh, lr, block, ids, ib, visible, vis_b, vis_h, vis_r, vis_c,
           bias, bias_b, bias_h, bias_r, bias_c, slopes, softcap, seed, keep, threshold, half,
           NB: tl.constexpr, NG: tl.constexpr, LAYOUT: tl.constexpr, IDS: tl.constexpr, VISIBLE: tl.constexpr,
           BIAS: tl.constexpr, CAP: tl.constexpr, ALIBI: tl.constexpr, DROP: tl.constexpr,
           D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
           LISTED: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr):
    """Fold list entries [begin, end) into the running maximum, sum and output of one query tile."""
    for step in range(begin, end):
        col = step * BLOCK_N
        if LISTED:
            col = tl.load(tiles + step) * BLOCK_N
        kt = load_tile(k, batch, kv_head, first_k + col, first_k + sk, kb, kh, ks, BLOCK_N, D, BLOCK_D, False, MASKED,
                       False)
        s = tl.dot(qt, kt.T, input_precision=PRECISION)
        i = rows[:, None]
        j = (col + tl.arange(0, BLOCK_N))[None, :]
        z, _ = logits(s, i, j, sq, sk, shift, entry, head, first_k, scale,
                      bands, groups, layout, lb, lh, lr, block, ids, ib, visible, vis_b, vis_h, vis_r, vis_c,
                      bias, bias_b, bias_h, bias_r, bias_c, slopes, softcap, seed, keep, threshold, half,
                      NB, NG, LAYOUT, IDS, VISIBLE,
                      BIAS, CAP, ALIBI, DROP,
                      MASKED)
        new_top = tl.maximum(top, tl.max(z, 1))
        # A row that has seen no key yet has top -inf, and -inf - -inf would be NaN.
        anchor = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(z - anchor[:, None])
        shrink = tl.exp2(top - anchor)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        weights = weights * kept_weights(i, j, first_row, seed, keep, threshold, DROP)
        vt = load_tile(v, batch, kv_head, first_k + col, first_k + sk, vb, vh, vs, BLOCK_N, DV, BLOCK_DV, False, MASKED,
                       False)
        acc = tl.dot(weights.to(vt.dtype), vt, acc, input_precision=PRECISION)
        top = new_top
    return acc, top, total


@triton.jit(do_not_specialize=["sq", "sk", "tiles", "total_heads", "section", "heads", "group", "most", "half",
                               "threshold"])
def attention_general_forward_kernel(
        q, k, v, out, lse, sinks, table, lengths_q, lengths_k, qb, qh, qs, kb, kh, ks, vb, vh, vs,
        sq, sk, tiles, total_heads, section, heads, group, scale, entries, full, listed_total, eb, eh, most,
        bands, groups, layout, lb, lh, lr, block, ids, ib, visible, vis_b, vis_h, vis_r, vis_c,
        bias, bias_b, bias_h, bias_r, bias_c, slopes, softcap, seed, keep, threshold, half,
        NB: tl.constexpr, NG: tl.constexpr, LAYOUT: tl.constexpr, IDS: tl.constexpr, VISIBLE: tl.constexpr,
        BIAS: tl.constexpr, CAP: tl.constexpr, ALIBI: tl.constexpr, DROP: tl.constexpr,
        D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr, TOP_LEFT: tl.constexpr, PACKED: tl.constexpr, LISTED: tl.constexpr, SINKS: tl.constexpr,
        PRECISION: tl.constexpr):
    """Query-stationary: one program per (query tile, head). `entry` indexes the batch axis of the tables."""
    tile, head, batch, entry, first_q, first_k, seq_q, seq_k, shift = locate(
        tiles, total_heads, section, heads, table, lengths_q, lengths_k, sq, sk, False, PACKED, TOP_LEFT)
    if tile < 0:
        return
    row = tile * BLOCK_M
    rows = row + tl.arange(0, BLOCK_M)
    kv_head = head // group
    qt = load_tile(q, batch, head, first_q + row, first_q + seq_q, qb, qh, qs, BLOCK_M, D, BLOCK_D, False, True, False)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    first_row = (batch * heads + head).to(tl.int64) * sq + first_q
    visits, whole, count = listed(entries, full, listed_total, eb, eh, most, batch, head, tile, tiles,
                                  tl.cdiv(seq_k, BLOCK_N), LISTED)
    if LISTED:
        acc, top, total = attend(
            acc, top, total, qt, rows, k, v, batch, entry, head, kv_head, first_row, first_k, seq_q, seq_k, shift,
            visits, 0, whole, scale, kb, kh, ks, vb, vh, vs,
            bands, groups, layout, lb, lh, lr, block, ids, ib, visible, vis_b, vis_h, vis_r, vis_c,
            bias, bias_b, bias_h, bias_r, bias_c, slopes, softcap, seed, keep, threshold, half,
            NB, NG, LAYOUT, IDS, VISIBLE,
            BIAS, CAP, ALIBI, DROP,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, LISTED, PRECISION, False)
    acc, top, total = attend(
        acc, top, total, qt, rows, k, v, batch, entry, head, kv_head, first_row, first_k, seq_q, seq_k, shift, visits,
        whole, count, scale, kb, kh, ks, vb, vh, vs,
        bands, groups, layout, lb, lh, lr, block, ids, ib, visible, vis_b, vis_h, vis_r, vis_c,
        bias, bias_b, bias_h, bias_r, bias_c, slopes, softcap, seed, keep, threshold, half,
        NB, NG, LAYOUT, IDS, VISIBLE,
        BIAS, CAP, ALIBI, DROP,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, LISTED, PRECISION, True)
    empty = total == 0.0
    mine = tl.where(empty, float("-inf"), top + tl.log2(tl.where(empty, 1.0, total)))
    inverse = 1.0 / tl.where(empty, 1.0, total)
    if SINKS:
        # One more logit, relative to the larger of the two so that neither overflows.
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        best = tl.maximum(mine, sink)
        anchor = tl.where(best == float("-inf"), 0.0, best)
        share = tl.exp2(mine - anchor)
        both = tl.where(best == float("-inf"), 1.0, share + tl.exp2(sink - anchor))
        inverse = inverse * (share / both)
        mine = tl.where(best == float("-inf"), best, best + tl.log2(both))
    store_tile(out, acc * inverse[:, None], batch, heads, head, sq, first_q + row, first_q + seq_q, BLOCK_M, DV,
               BLOCK_DV)
    tl.store(lse + first_row + rows, mine * LN2, mask=rows < seq_q)


@triton.jit
def gradient_tile(s, dp, i, j, lse2, delta, first_row, sq, sk, shift, entry, head, first_k, scale,
                  bands, groups, layout, lb, lh, lr, block, ids, ib, visible, vis_b, vis_h, vis_r, vis_c,
                  bias, bias_b, bias_h, bias_r, bias_c, slopes, softcap, seed, keep, threshold, half,
                  NB: tl.constexpr, NG: tl.constexpr, LAYOUT: tl.constexpr, IDS: tl.constexpr, VISIBLE: tl.constexpr,
                  BIAS: tl.constexpr, CAP: tl.constexpr, ALIBI: tl.constexpr, DROP: tl.constexpr,
                  MASKED: tl.constexpr):
    """(weights after dropout, dS behind the softcap, dS before it) of a tile of products and of dO V^T. `lse2` and
    `delta` broadcast along the queries."""
    z, slope = logits(s, i, j, sq, sk, shift, entry, head, first_k, scale,
                      bands, groups, layout, lb, lh, lr, block, ids, ib, visible, vis_b, vis_h, vis_r, vis_c,
                      bias, bias_b, bias_h, bias_r, bias_c, slopes, softcap, seed, keep, threshold, half,
                      NB, NG, LAYOUT, IDS, VISIBLE,
                      BIAS, CAP, ALIBI, DROP,
                      MASKED)
    weights = tl.exp2(z - lse2)
    kept = kept_weights(i, j, first_row, seed, keep, threshold, DROP)
    ds = weights * (dp * kept - delta)
    return weights * kept, ds * slope, ds


@triton.jit
def gather_query_tiles(
        dk, dv, kt, vt, cols, q, grad_out, stats, length, batch, entry, head, heads, first_q, first_k, sq, sk, shift,
        tiles, begin, end, scale, qb, qh, qs, gb, gh, gs,
        bands, groups, layout, lb, lh, lr, block, ids, ib, visible, vis_b, vis_h, vis_r, vis_c,
        bias, bias_b, bias_h, bias_r, bias_c, slopes, softcap, seed, keep, threshold, half,
        NB: tl.constexpr, NG: tl.constexpr, LAYOUT: tl.constexpr, IDS: tl.constexpr, VISIBLE: tl.constexpr,
        BIAS: tl.constexpr, CAP: tl.constexpr, ALIBI: tl.constexpr, DROP: tl.constexpr,
        D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
        LISTED: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr):
    """Add what list entries [begin, end) of one head give to dK and dV of one key tile; scores are (keys, queries)."""
    line = (batch * heads + head).to(tl.int64)
    for step in range(begin, end):
        row = step * BLOCK_M
        if LISTED:
            row = tl.load(tiles + step) * BLOCK_M
        rows = row + tl.arange(0, BLOCK_M)
        qt = load_tile(q, batch, head, first_q + row, first_q + sq, qb, qh, qs, BLOCK_M, D, BLOCK_D, False, MASKED,
                       False)
        gt = load_tile(grad_out, batch, head, first_q + row, first_q + sq, gb, gh, gs, BLOCK_M, DV, BLOCK_DV, False,
                       MASKED, False)
        at = stats + line * (2 * length) + first_q
        lse2 = tl.load(at + rows, mask=rows < sq, other=float("inf"))
        delta = tl.load(at + length + rows, mask=rows < sq, other=0.0)
        st = tl.dot(kt, qt.T, input_precision=PRECISION)
        dpt = tl.dot(vt, gt.T, input_precision=PRECISION)
        pt, dst, _ = gradient_tile(
            st, dpt, rows[None, :], cols[:, None], lse2[None, :], delta[None, :], line * length + first_q, sq, sk,
            shift, entry, head, first_k, scale,
            bands, groups, layout, lb, lh, lr, block, ids, ib, visible, vis_b, vis_h, vis_r, vis_c,
            bias, bias_b, bias_h, bias_r, bias_c, slopes, softcap, seed, keep, threshold, half,
            NB, NG, LAYOUT, IDS, VISIBLE,
            BIAS, CAP, ALIBI, DROP,
            MASKED)
        dv = tl.dot(pt.to(gt.dtype), gt, dv, input_precision=PRECISION)
        dk = tl.dot(dst.to(qt.dtype), qt, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["sq", "sk", "tiles", "total_heads", "section", "kv_heads", "group", "most", "half",
                               "threshold"])
def attention_general_backward_kv_kernel(
        q, k, v, grad_out, stats, grad_k, grad_v, table, lengths_q, lengths_k,
        qb, qh, qs, kb, kh, ks, vb, vh, vs, gb, gh, gs,
        sq, sk, tiles, total_heads, section, kv_heads, group, scale, entries, full, listed_total, eb, eh, most,
        bands, groups, layout, lb, lh, lr, block, ids, ib, visible, vis_b, vis_h, vis_r, vis_c,
        bias, bias_b, bias_h, bias_r, bias_c, slopes, softcap, seed, keep, threshold, half,
        NB: tl.constexpr, NG: tl.constexpr, LAYOUT: tl.constexpr, IDS: tl.constexpr, VISIBLE: tl.constexpr,
        BIAS: tl.constexpr, CAP: tl.constexpr, ALIBI: tl.constexpr, DROP: tl.constexpr,
        D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr, TOP_LEFT: tl.constexpr, PACKED: tl.constexpr, LISTED: tl.constexpr,
        PRECISION: tl.constexpr):
    """Key-stationary: one program per (key tile, kv head), looping over the query heads of the group in order."""
    tile, kv_head, batch, entry, first_q, first_k, seq_q, seq_k, shift = locate(
        tiles, total_heads, section, kv_heads, table, lengths_q, lengths_k, sq, sk, False, PACKED, TOP_LEFT)
    if tile < 0:
        return
    col = tile * BLOCK_N
    cols = col + tl.arange(0, BLOCK_N)
    heads = kv_heads * group
    kt = load_tile(k, batch, kv_head, first_k + col, first_k + seq_k, kb, kh, ks, BLOCK_N, D, BLOCK_D, False, True,
                   False)
    vt = load_tile(v, batch, kv_head, first_k + col, first_k + seq_k, vb, vh, vs, BLOCK_N, DV, BLOCK_DV, False, True,
                   False)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for member in range(group):
        head = kv_head * group + member
        visits, whole, count = listed(entries, full, listed_total, eb, eh, most, batch, head, tile, tiles,
                                      tl.cdiv(seq_q, BLOCK_M), LISTED)
        if LISTED:
            dk, dv = gather_query_tiles(
                dk, dv, kt, vt, cols, q, grad_out, stats, sq, batch, entry, head, heads, first_q, first_k, seq_q, seq_k,
                shift, visits, 0, whole, scale, qb, qh, qs, gb, gh, gs,
                bands, groups, layout, lb, lh, lr, block, ids, ib, visible, vis_b, vis_h, vis_r, vis_c,
                bias, bias_b, bias_h, bias_r, bias_c, slopes, softcap, seed, keep, threshold, half,
                NB, NG, LAYOUT, IDS, VISIBLE,
                BIAS, CAP, ALIBI, DROP,
                D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, LISTED, PRECISION, False)
        dk, dv = gather_query_tiles(
            dk, dv, kt, vt, cols, q, grad_out, stats, sq, batch, entry, head, heads, first_q, first_k, seq_q, seq_k,
            shift, visits, whole, count, scale, qb, qh, qs, gb, gh, gs,
            bands, groups, layout, lb, lh, lr, block, ids, ib, visible, vis_b, vis_h, vis_r, vis_c,
            bias, bias_b, bias_h, bias_r, bias_c, slopes, softcap, seed, keep, threshold, half,
            NB, NG, LAYOUT, IDS, VISIBLE,
            BIAS, CAP, ALIBI, DROP,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, LISTED, PRECISION, True)
    store_tile(grad_k, dk * scale, batch, kv_heads, kv_head, sk, first_k + col, first_k + seq_k, BLOCK_N, D, BLOCK_D)
    store_tile(grad_v, dv, batch, kv_heads, kv_head, sk, first_k + col, first_k + seq_k, BLOCK_N, DV, BLOCK_DV)


@triton.jit
def gather_key_tiles(
        dq, qt, gt, lse2, delta, rows, k, v, batch, entry, head, kv_head, first_row, first_k, sq, sk, shift, tiles,
        begin, end, scale, kb, kh, ks, vb, vh, vs,
        bands, groups, layout, lb, lh, lr, block, ids, ib, visible, vis_b, vis_h, vis_r, vis_c,
        bias, bias_b, bias_h, bias_r, bias_c, slopes, softcap, seed, keep, threshold, half,
        NB: tl.constexpr, NG: tl.constexpr, LAYOUT: tl.constexpr, IDS: tl.constexpr, VISIBLE: tl.constexpr,
        BIAS: tl.constexpr, CAP: tl.constexpr, ALIBI: tl.constexpr, DROP: tl.constexpr,
        D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
        LISTED: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr):
    """Add what list entries [begin, end) give to dQ of one query tile."""
    for step in range(begin, end):
        col = step * BLOCK_N
        if LISTED:
            col = tl.load(tiles + step) * BLOCK_N
        kt = load_tile(k, batch, kv_head, first_k + col, first_k + sk, kb, kh, ks, BLOCK_N, D, BLOCK_D, False, MASKED,
                       False)
        vt = load_tile(v, batch, kv_head, first_k + col, first_k + sk, vb, vh, vs, BLOCK_N, DV, BLOCK_DV, False, MASKED,
                       False)
        s = tl.dot(qt, kt.T, input_precision=PRECISION)
        dp = tl.dot(gt, vt.T, input_precision=PRECISION)
        _, ds, _ = gradient_tile(
            s, dp, rows[:, None], (col + tl.arange(0, BLOCK_N))[None, :], lse2[:, None], delta[:, None], first_row, sq,
            sk, shift, entry, head, first_k, scale,
            bands, groups, layout, lb, lh, lr, block, ids, ib, visible, vis_b, vis_h, vis_r, vis_c,
            bias, bias_b, bias_h, bias_r, bias_c, slopes, softcap, seed, keep, threshold, half,
            NB, NG, LAYOUT, IDS, VISIBLE,
            BIAS, CAP, ALIBI, DROP,
            MASKED)
        dq = tl.dot(ds.to(kt.dtype), kt, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=["sq", "sk", "tiles", "total_heads", "section", "heads", "group", "most", "half",
                               "threshold"])
def attention_general_backward_q_kernel(
        q, k, v, grad_out, stats, grad_q, table, lengths_q, lengths_k,
        qb, qh, qs, kb, kh, ks, vb, vh, vs, gb, gh, gs,
        sq, sk, tiles, total_heads, section, heads, group, scale, entries, full, listed_total, eb, eh, most,
        bands, groups, layout, lb, lh, lr, block, ids, ib, visible, vis_b, vis_h, vis_r, vis_c,
        bias, bias_b, bias_h, bias_r, bias_c, slopes, softcap, seed, keep, threshold, half,
        NB: tl.constexpr, NG: tl.constexpr, LAYOUT: tl.constexpr, IDS: tl.constexpr, VISIBLE: tl.constexpr,
        BIAS: tl.constexpr, CAP: tl.constexpr, ALIBI: tl.constexpr, DROP: tl.constexpr,
        D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr, TOP_LEFT: tl.constexpr, PACKED: tl.constexpr, LISTED: tl.constexpr,
        PRECISION: tl.constexpr):
    """Query-stationary: one program per (query tile, head); dQ without atomics."""
    tile, head, batch, entry, first_q, first_k, seq_q, seq_k, shift = locate(
        tiles, total_heads, section, heads, table, lengths_q, lengths_k, sq, sk, False, PACKED, TOP_LEFT)
    if tile < 0:
        return
    row = tile * BLOCK_M
    rows = row + tl.arange(0, BLOCK_M)
    kv_head = head // group
    qt = load_tile(q, batch, head, first_q + row, first_q + seq_q, qb, qh, qs, BLOCK_M, D, BLOCK_D, False, True, False)
    gt = load_tile(grad_out, batch, head, first_q + row, first_q + seq_q, gb, gh, gs, BLOCK_M, DV, BLOCK_DV, False,
                   True, False)
    line = (batch * heads + head).to(tl.int64)
    at = stats + line * (2 * sq) + first_q
    lse2 = tl.load(at + rows, mask=rows < seq_q, other=float("inf"))
    delta = tl.load(at + sq + rows, mask=rows < seq_q, other=0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    visits, whole, count = listed(entries, full, listed_total, eb, eh, most, batch, head, tile, tiles,
                                  tl.cdiv(seq_k, BLOCK_N), LISTED)
    if LISTED:
        dq = gather_key_tiles(
            dq, qt, gt, lse2, delta, rows, k, v, batch, entry, head, kv_head, line * sq + first_q, first_k, seq_q,
            seq_k, shift, visits, 0, whole, scale, kb, kh, ks, vb, vh, vs,
            bands, groups, layout, lb, lh, lr, block, ids, ib, visible, vis_b, vis_h, vis_r, vis_c,
            bias, bias_b, bias_h, bias_r, bias_c, slopes, softcap, seed, keep, threshold, half,
            NB, NG, LAYOUT, IDS, VISIBLE,
            BIAS, CAP, ALIBI, DROP,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, LISTED, PRECISION, False)
    dq = gather_key_tiles(
        dq, qt, gt, lse2, delta, rows, k, v, batch, entry, head, kv_head, line * sq + first_q, first_k, seq_q, seq_k,
        shift, visits, whole, count, scale, kb, kh, ks, vb, vh, vs,
        bands, groups, layout, lb, lh, lr, block, ids, ib, visible, vis_b, vis_h, vis_r, vis_c,
        bias, bias_b, bias_h, bias_r, bias_c, slopes, softcap, seed, keep, threshold, half,
        NB, NG, LAYOUT, IDS, VISIBLE,
        BIAS, CAP, ALIBI, DROP,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, LISTED, PRECISION, True)
    store_tile(grad_q, dq * scale, batch, heads, head, sq, first_q + row, first_q + seq_q, BLOCK_M, D, BLOCK_D)


@triton.jit(do_not_specialize=["sq", "sk", "heads", "group", "half", "tiles_m", "tiles_n", "threshold"])
def attention_general_bias_kernel(
        q, k, v, grad_out, stats, grad_bias, lengths_q, lengths_k, qb, qh, qs, kb, kh, ks, vb, vh, vs, gb, gh, gs,
        sq, sk, heads, group, scale, tiles_m, tiles_n, bias_heads, bias_rows, bias_columns, entries_a_bias,
        heads_a_bias,
        bands, groups, layout, lb, lh, lr, block, ids, ib, visible, vis_b, vis_h, vis_r, vis_c,
        bias, bias_b, bias_h, bias_r, bias_c, slopes, softcap, seed, keep, threshold, half,
        NB: tl.constexpr, NG: tl.constexpr, LAYOUT: tl.constexpr, IDS: tl.constexpr, VISIBLE: tl.constexpr,
        BIAS: tl.constexpr, CAP: tl.constexpr, ALIBI: tl.constexpr, DROP: tl.constexpr,
        D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr, TOP_LEFT: tl.constexpr, PACKED: tl.constexpr, ONE_ROW: tl.constexpr,
        PRECISION: tl.constexpr):
    """One program per tile of the bias, adding dS over all that the bias is broadcast along, in order: entries of the
    batch, heads, and with ONE_ROW the query tiles."""
    pid = tl.program_id(0)
    col_tile = pid % tiles_n
    pid = pid // tiles_n
    row_tile = pid % tiles_m
    line = pid // tiles_m
    bias_head = line % bias_heads
    bias_entry = line // bias_heads
    col = col_tile * BLOCK_N
    cols = col + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for member in range(entries_a_bias * heads_a_bias):
        entry = bias_entry + member // heads_a_bias
        head = bias_head + member % heads_a_bias
        batch = entry
        first_q = 0
        first_k = 0
        seq_q = sq
        seq_k = sk
        if PACKED:
            batch = 0
            first_q = tl.load(lengths_q + entry)
            first_k = tl.load(lengths_k + entry)
            seq_q = tl.load(lengths_q + entry + 1) - first_q
            seq_k = tl.load(lengths_k + entry + 1) - first_k
        shift = seq_k - seq_q
        if TOP_LEFT:
            shift = 0
        at_line = (batch * heads + head).to(tl.int64)
        kt = load_tile(k, batch, head // group, first_k + col, first_k + seq_k, kb, kh, ks, BLOCK_N, D, BLOCK_D, False,
                       True, False)
        vt = load_tile(v, batch, head // group, first_k + col, first_k + seq_k, vb, vh, vs, BLOCK_N, DV, BLOCK_DV,
                       False, True, False)
        begin = row_tile
        end = row_tile + 1
        if ONE_ROW:
            end = tl.cdiv(seq_q, BLOCK_M)
        for step in range(begin, end):
            row = step * BLOCK_M
            rows = row + tl.arange(0, BLOCK_M)
            qt = load_tile(q, batch, head, first_q + row, first_q + seq_q, qb, qh, qs, BLOCK_M, D, BLOCK_D, False, True,
                           False)
            gt = load_tile(grad_out, batch, head, first_q + row, first_q + seq_q, gb, gh, gs, BLOCK_M, DV, BLOCK_DV,
                           False, True, False)
            at = stats + at_line * (2 * sq) + first_q
            lse2 = tl.load(at + rows, mask=rows < seq_q, other=float("inf"))
            delta = tl.load(at + sq + rows, mask=rows < seq_q, other=0.0)
            s = tl.dot(qt, kt.T, input_precision=PRECISION)
            dp = tl.dot(gt, vt.T, input_precision=PRECISION)
            _, _, ds = gradient_tile(
                s, dp, rows[:, None], cols[None, :], lse2[:, None], delta[:, None], at_line * sq + first_q, seq_q,
                seq_k, shift, entry, head, first_k, scale,
                bands, groups, layout, lb, lh, lr, block, ids, ib, visible, vis_b, vis_h, vis_r, vis_c,
                bias, bias_b, bias_h, bias_r, bias_c, slopes, softcap, seed, keep, threshold, half,
                NB, NG, LAYOUT, IDS, VISIBLE,
                BIAS, CAP, ALIBI, DROP,
                True)
            total += ds
    corner = grad_bias + line.to(tl.int64) * bias_rows * bias_columns
    if ONE_ROW:
        tl.store(corner + cols, tl.sum(total, 0), mask=cols < bias_columns)
    else:
        rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        keep_tile = (rows < bias_rows)[:, None] & (cols < bias_columns)[None, :]
        tl.store(corner + rows.to(tl.int64)[:, None] * bias_columns + cols[None, :], total, mask=keep_tile)
