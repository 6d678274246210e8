"""What happens to one (query, key) pair between its product and its weight: mask terms, score terms, dropout.

Queries i and keys j come as two-dimensional index tiles that broadcast against each other, (M, 1) and (1, N) or the
other way round, so that query-stationary and key-stationary kernels share every line. Flags are constexpr: what a call
does not have is not compiled.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def floor_divide(a, b):
    return tl.where(a >= 0, a // b, -((b - 1 - a) // b))


@triton.jit
def visible_pairs(i, j, sq, sk, shift, batch, head, half, bands, groups, layout, lb, lh, lr, block, ids, ib,
                  visible, vb, vh, vr, vc, first_k, NB: tl.constexpr, NG: tl.constexpr, LAYOUT: tl.constexpr,
                  IDS: tl.constexpr, VISIBLE: tl.constexpr):
    """Whether query i sees key j; pairs outside the sequence are not visible."""
    p = i + shift
    inside = (i < sq) & (j < sk)
    seen = inside
    for n in tl.static_range(NB):
        left = tl.load(bands + 3 * n)
        right = tl.load(bands + 3 * n + 1)
        sink = tl.load(bands + 3 * n + 2)
        seen = seen & (j <= p + right) & ((j >= p - left) | (j < sink))
    for n in tl.static_range(NG):
        size = tl.load(groups + n)
        offset = tl.where(head >= half, size // 2, 0)
        seen = seen & (floor_divide(p + offset, size) == (j + offset) // size)
    if LAYOUT:
        line = layout + batch.to(tl.int64) * lb + head.to(tl.int64) * lh
        seen = seen & (tl.load(line + (i // block) * lr + j // block, mask=inside, other=0) != 0)
    if IDS:
        line = ids + batch.to(tl.int64) * ib + first_k
        known = (p >= 0) & (p < sk)
        mine = tl.load(line + p, mask=known, other=0)
        theirs = tl.load(line + j, mask=j < sk, other=0)
        seen = seen & known & (mine == theirs)
    if VISIBLE:
        line = visible + batch.to(tl.int64) * vb + head.to(tl.int64) * vh
        seen = seen & (tl.load(line + i.to(tl.int64) * vr + j.to(tl.int64) * vc, mask=inside, other=0) != 0)
    return seen


@triton.jit
def tanh(x):
    """A polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel, and that elsewhere."""
    size = tl.abs(x)
    square = x * x
    poly = -5.70498872745e-3 * square + 2.06390887954e-2
    poly = poly * square - 5.37397155531e-2
    poly = poly * square + 1.33314422036e-1
    poly = poly * square - 3.33332819422e-1
    near = poly * square * x + x
    far = 1.0 - 2.0 / (tl.exp2(tl.minimum(size, 10.0) * (2.0 * LOG2E)) + 1.0)
    return tl.where(size > 0.625, tl.where(x < 0, -far, far), near)


@triton.jit
def shaped_scores(s, i, j, sq, sk, shift, batch, head, scale, softcap, bias, bb, bh, br, bc, slopes,
                  BIAS: tl.constexpr, CAP: tl.constexpr, ALIBI: tl.constexpr):
    """(z in base 2, dz / d(scale q.k)) of products s; the slope is 1 without a softcap."""
    z = s * scale
    slope = 1.0
    if CAP:
        t = tanh(z / softcap)
        z = softcap * t
        slope = 1.0 - t * t
    if BIAS:
        line = bias + batch.to(tl.int64) * bb + head.to(tl.int64) * bh
        inside = (i < sq) & (j < sk)
        z += tl.load(line + i.to(tl.int64) * br + j.to(tl.int64) * bc, mask=inside, other=0.0).to(tl.float32)
    if ALIBI:
        z -= tl.load(slopes + head) * tl.abs(i + shift - j).to(tl.float32)
    return z * LOG2E, slope


@triton.jit
def kept_weights(i, j, first_row, seed, keep, threshold, DROP: tl.constexpr):
    """0 where dropout drops the pair, else `keep`. The words are those of Philox4x32-10 for the counter
    (j / 4, row, row >> 32, 0), as on every other backend."""
    factor = 1.0
    if DROP:
        row = first_row + i.to(tl.int64)
        quad = (j >> 2).to(tl.uint32) + tl.zeros_like(i + j).to(tl.uint32)
        low = (row & 0xFFFFFFFF).to(tl.uint32) + tl.zeros_like(i + j).to(tl.uint32)
        high = ((row >> 32) & 0xFFFFFFFF).to(tl.uint32) + tl.zeros_like(i + j).to(tl.uint32)
        w0, w1, w2, w3 = tl.philox(tl.load(seed), quad, low, high, quad * 0)
        pick = j & 3
        word = tl.where(pick == 0, w0, tl.where(pick == 1, w1, tl.where(pick == 2, w2, w3)))
        factor = tl.where(word >= threshold.to(tl.uint32), keep, 0.0)
    return factor
