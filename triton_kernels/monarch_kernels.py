"""Monarch matmul kernels: two block-diagonal factors with a shuffle between them, fp32 accumulation, no atomics.

Number m of the middle is row m % Q of block m // Q of w1 (K, Q, P) and input m // L of block m % L of w2 (L, S, R).
Between kernels the middle is stored (L, tokens, R), so that each block of w2 reads a dense matrix.
"""

import triton
import triton.language as tl


@triton.jit
def within(index, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """index < SIZE, known to be true where whole blocks cover SIZE: such masks cost nothing."""
    return (index < SIZE) | (SIZE % BLOCK == 0)


@triton.jit
def middle(col, block, Q: tl.constexpr, L: tl.constexpr):
    """Column of block `block` of w1 -> (row of the block, block l of w2, input r of it). Where L divides Q the columns
    are taken with r fastest, so that neighbours are neighbours in memory; rows of w1 are dense in either order."""
    if Q % L == 0:
        each: tl.constexpr = Q // L
        inner = col % each
        outer = col // each
        return inner * L + outer, outer, block * each + inner
    else:
        m = block * Q + col
        return col, m % L, m // L


@triton.jit(do_not_specialize=["tokens"])
def monarch_fused_kernel(
        x, w1, w2, bias, out, tokens, x_row, K: tl.constexpr, Q: tl.constexpr, P: tl.constexpr, L: tl.constexpr,
        S: tl.constexpr, R: tl.constexpr, L_MAJOR: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr,
        BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr, PRECISION: tl.constexpr):
    """One program per (outputs of an l block, l block, token tile): the rows of w1 that feed the l block, a tile of r
    at a time, straight into the second product."""
    tiles: tl.constexpr = (S + BLOCK_S - 1) // BLOCK_S
    most: tl.constexpr = (Q + L - 1) // L  # rows of one block of w1 that feed one l
    parts: tl.constexpr = (most + BLOCK_R - 1) // BLOCK_R
    pid = tl.program_id(0)
    si = pid % tiles * BLOCK_S + tl.arange(0, BLOCK_S)
    li = pid // tiles % L
    rows = pid // (tiles * L) * BLOCK_M + tl.arange(0, BLOCK_M)
    keep = rows < tokens
    inputs = x + rows.to(tl.int64)[:, None] * x_row
    second = w2 + li.to(tl.int64) * (S * R)
    in_s = within(si, S, BLOCK_S)
    acc = tl.zeros([BLOCK_M, BLOCK_S], tl.float32)
    for step in range(K * parts):
        block = step // parts
        if Q % L == 0:  # the division below hides that the start is aligned
            begin = block * most
            end = begin + most
        else:
            begin = (block * Q - li + L - 1) // L
            end = ((block + 1) * Q - li + L - 1) // L
        ri = begin + step % parts * BLOCK_R + tl.arange(0, BLOCK_R)
        in_r = (ri < end) | (Q % L == 0 and most % BLOCK_R == 0)
        first = w1 + tl.cast(block, tl.int64) * (Q * P) + (ri * L + li - block * Q)[:, None] * P
        if P <= BLOCK_P:
            pi = tl.arange(0, BLOCK_P)
            in_p = within(pi, P, BLOCK_P)
            xt = tl.load(inputs + (block * P + pi)[None, :], mask=keep[:, None] & in_p[None, :], other=0.0)
            wt = tl.load(first + pi[None, :], mask=in_r[:, None] & in_p[None, :], other=0.0)
            mid = tl.dot(xt, wt.T, input_precision=PRECISION)
        else:
            mid = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
            for start in range(0, P, BLOCK_P):
                pi = start + tl.arange(0, BLOCK_P)
                in_p = within(pi, P, BLOCK_P)
                xt = tl.load(inputs + (block * P + pi)[None, :], mask=keep[:, None] & in_p[None, :], other=0.0)
                wt = tl.load(first + pi[None, :], mask=in_r[:, None] & in_p[None, :], other=0.0)
                mid = tl.dot(xt, wt.T, mid, input_precision=PRECISION)
        vt = tl.load(second + si[:, None] * R + ri[None, :], mask=in_s[:, None] & in_r[None, :], other=0.0)
        acc = tl.dot(mid.to(vt.dtype), vt.T, acc, input_precision=PRECISION)
    col = li * S + si if L_MAJOR else si * L + li
    if HAS_BIAS:
        acc += tl.load(bias + col, mask=in_s, other=0.0).to(tl.float32)[None, :]
    target = out + rows.to(tl.int64)[:, None] * (L * S) + col[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=keep[:, None] & in_s[None, :])


@triton.jit(do_not_specialize=["tokens"])
def monarch_product_kernel(
        a, w, bias, out, tokens, a_block, a_row, out_block, out_row, BLOCKS: tl.constexpr, N: tl.constexpr,
        C: tl.constexpr, Q: tl.constexpr, L: tl.constexpr, R: tl.constexpr, MIDDLE_IN: tl.constexpr,
        MIDDLE_OUT: tl.constexpr, TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr):
    """One program per (N tile, block, token tile) of a block-diagonal product: out = a w^T with w (BLOCKS, N, C), or
    a w with w (BLOCKS, C, N) when TRANSPOSED. MIDDLE_IN, MIDDLE_OUT: that side is stored (L, tokens, R)."""
    tiles: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    ni = pid % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    block = pid // tiles % BLOCKS
    rows = pid // (tiles * BLOCKS) * BLOCK_M + tl.arange(0, BLOCK_M)
    keep = rows < tokens
    token = rows.to(tl.int64)[:, None]
    plane = tl.cast(tokens, tl.int64) * R
    weights = w + block.to(tl.int64) * (N * C)
    in_n = within(ni, N, BLOCK_N)
    wn = ni
    target = block.to(tl.int64) * out_block + ni
    if MIDDLE_OUT:
        wn, li, ri = middle(ni, block, Q, L)
        target = li.to(tl.int64) * plane + ri
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, C, BLOCK_C):
        ci = start + tl.arange(0, BLOCK_C)
        in_c = within(ci, C, BLOCK_C)
        wc = ci
        source = block.to(tl.int64) * a_block + ci
        if MIDDLE_IN:
            wc, li, ri = middle(ci, block, Q, L)
            source = li.to(tl.int64) * plane + ri
        at = tl.load(a + token * a_row + source[None, :], mask=keep[:, None] & in_c[None, :], other=0.0)
        if TRANSPOSED:
            wt = tl.load(weights + wc[:, None] * N + wn[None, :], mask=in_c[:, None] & in_n[None, :], other=0.0)
            acc = tl.dot(at, wt, acc, input_precision=PRECISION)
        else:
            wt = tl.load(weights + wn[:, None] * C + wc[None, :], mask=in_n[:, None] & in_c[None, :], other=0.0)
            acc = tl.dot(at, wt.T, acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias + target, mask=in_n, other=0.0).to(tl.float32)[None, :]
    value = acc.to(out.dtype.element_ty)
    tl.store(out + token * out_row + target[None, :], value, mask=keep[:, None] & in_n[None, :])


@triton.jit
def interleaved(mid, w2, bias, rows, keep, plane, depth, si, first, L: tl.constexpr, S: tl.constexpr, R: tl.constexpr,
                HAS_BIAS: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr, BLOCK_M: tl.constexpr,
                BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr):
    """(BLOCK_M, BLOCK_S * COUNT): outputs of the COUNT l blocks first, first + STEP, ..., l fastest, rounded."""
    if COUNT == 1:
        some = first < L
        in_s = within(si, S, BLOCK_S) & some
        source = mid + first.to(tl.int64) * plane + rows.to(tl.int64)[:, None] * R
        weights = w2 + first.to(tl.int64) * (S * R) + si[:, None] * R
        acc = tl.zeros([BLOCK_M, BLOCK_S], tl.float32)
        for start in range(0, depth, BLOCK_R):
            ri = start + tl.arange(0, BLOCK_R)
            in_r = within(ri, R, BLOCK_R)
            mt = tl.load(source + ri[None, :], mask=(keep & some)[:, None] & in_r[None, :], other=0.0)
            wt = tl.load(weights + ri[None, :], mask=in_s[:, None] & in_r[None, :], other=0.0)
            acc = tl.dot(mt, wt.T, acc, input_precision=PRECISION)
        if HAS_BIAS:
            acc += tl.load(bias + si * L + first, mask=in_s, other=0.0).to(tl.float32)[None, :]
        return acc.to(mid.dtype.element_ty)
    else:
        even = interleaved(mid, w2, bias, rows, keep, plane, depth, si, first, L, S, R, HAS_BIAS, 2 * STEP, COUNT // 2,
                           BLOCK_M, BLOCK_S, BLOCK_R, PRECISION)
        odd = interleaved(mid, w2, bias, rows, keep, plane, depth, si, first + STEP, L, S, R, HAS_BIAS, 2 * STEP,
                          COUNT // 2, BLOCK_M, BLOCK_S, BLOCK_R, PRECISION)
        return tl.join(even, odd).reshape(BLOCK_M, BLOCK_S * COUNT)


@triton.jit(do_not_specialize=["tokens", "depth"])
def monarch_interleave_kernel(
        mid, w2, bias, out, tokens, depth, L: tl.constexpr, S: tl.constexpr, R: tl.constexpr, HAS_BIAS: tl.constexpr,
        GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr,
        PRECISION: tl.constexpr):
    """Second factor into the order (s, l): one program per (s tile, GROUP neighbouring l, token tile). One l alone
    would write every L-th number, a memory sector each."""
    tiles: tl.constexpr = (S + BLOCK_S - 1) // BLOCK_S
    groups: tl.constexpr = (L + GROUP - 1) // GROUP
    pid = tl.program_id(0)
    corner = pid % tiles * BLOCK_S
    first = pid // tiles % groups * GROUP
    rows = pid // (tiles * groups) * BLOCK_M + tl.arange(0, BLOCK_M)
    keep = rows < tokens
    value = interleaved(mid, w2, bias, rows, keep, tl.cast(tokens, tl.int64) * R, depth,
                        corner + tl.arange(0, BLOCK_S), first, L, S, R, HAS_BIAS, 1, GROUP, BLOCK_M, BLOCK_S, BLOCK_R,
                        PRECISION)
    col = tl.arange(0, BLOCK_S * GROUP)
    si = corner + col // GROUP
    li = first + col % GROUP
    inside = within(si, S, BLOCK_S) & within(li, L, GROUP)
    target = out + rows.to(tl.int64)[:, None] * (S * L) + (si * L + li)[None, :]
    tl.store(target, value, mask=keep[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["tokens"])
def monarch_unshuffle_kernel(source, target, tokens, row, L: tl.constexpr, S: tl.constexpr, BLOCK_L: tl.constexpr,
                             BLOCK_S: tl.constexpr):
    """(tokens, S, L) -> (L, tokens, S): one program per (s tile, l tile, token), turned in shared memory."""
    tiles: tl.constexpr = (S + BLOCK_S - 1) // BLOCK_S
    groups: tl.constexpr = (L + BLOCK_L - 1) // BLOCK_L
    pid = tl.program_id(0)
    si = pid % tiles * BLOCK_S + tl.arange(0, BLOCK_S)
    li = pid // tiles % groups * BLOCK_L + tl.arange(0, BLOCK_L)
    token = (pid // (tiles * groups)).to(tl.int64)
    inside = within(si, S, BLOCK_S)[:, None] & within(li, L, BLOCK_L)[None, :]
    value = tl.load(source + token * row + si[:, None] * L + li[None, :], mask=inside)
    plane = li.to(tl.int64) * (tl.cast(tokens, tl.int64) * S) + token * S
    tl.store(target + plane[None, :] + si[:, None], value, mask=inside)


@triton.jit(do_not_specialize=["tokens", "span"])
def monarch_weight_gradient_kernel(
        a, x, grad, tokens, span, a_block, a_row, x_block, x_row, BLOCKS: tl.constexpr, N: tl.constexpr,
        C: tl.constexpr, Q: tl.constexpr, L: tl.constexpr, R: tl.constexpr, MIDDLE: tl.constexpr, FIRST: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr):
    """grad[part, block] (N, C) = a^T x over one span of tokens, added to what earlier chunks left unless FIRST: one
    program per (C tile, N tile, block, span), tokens in order. MIDDLE: a is stored (L, tokens, R)."""
    across: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    down: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    ci = pid % across * BLOCK_C + tl.arange(0, BLOCK_C)
    ni = pid // across % down * BLOCK_N + tl.arange(0, BLOCK_N)
    block = pid // (across * down) % BLOCKS
    part = pid // (across * down * BLOCKS)
    in_c = within(ci, C, BLOCK_C)
    in_n = within(ni, N, BLOCK_N)
    row = ni
    source = block.to(tl.int64) * a_block + ni
    if MIDDLE:
        row, li, ri = middle(ni, block, Q, L)
        source = li.to(tl.int64) * (tl.cast(tokens, tl.int64) * R) + ri
    inputs = x + block.to(tl.int64) * x_block + ci[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    end = tl.minimum((part + 1) * span, tokens)
    for start in range(part * span, end, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        keep = (rows < end)[:, None]
        token = rows.to(tl.int64)[:, None]
        at = tl.load(a + token * a_row + source[None, :], mask=keep & in_n[None, :], other=0.0)
        xt = tl.load(inputs + token * x_row, mask=keep & in_c[None, :], other=0.0)
        acc = tl.dot(at.T, xt, acc, input_precision=PRECISION)
    target = grad + (part * BLOCKS + block).to(tl.int64) * (N * C) + row[:, None] * C + ci[None, :]
    inside = in_n[:, None] & in_c[None, :]
    if not FIRST:
        acc += tl.load(target, mask=inside, other=0.0)
    tl.store(target, acc, mask=inside)
