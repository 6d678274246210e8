"""Differentiable k-means: every pass makes the assignments anew; sums are float32 in a program, float64 over programs.

Letters and formulas are those of `dkm_backward` in effkern/reference/dkm.py. A tile is (BLOCK_K, BLOCK), a weight with
all its clusters in one thread. `partial` holds what each program sums, (groups, chunks, numbers); kernels of one
program a group add that up, always in the same order. `steps` counts a group's iterations on the device: whether it
has settled is not asked by the host.
"""

import triton
import triton.language as tl

EMPTY = tl.constexpr(2.0**-100)  # soft count, as in the reference


@triton.jit
def share(pid, chunks, chunk, vectors):
    """Program -> (group, first weight of its chunk, end of the chunk). None of it goes beyond `vectors`, and so beyond
    int32."""
    group = pid // chunks
    begin = pid % chunks * chunk
    return group, begin, begin + tl.minimum(chunk, vectors - begin)


@triton.jit
def load_weights(weight, group, vectors, at, end):
    """BLOCK numbers of a group as float32, zeros behind the end."""
    return tl.load(weight + group.to(tl.int64) * vectors + at, mask=at < end, other=0.0).to(tl.float32)


@triton.jit
def load_centroids(trajectory, row, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """One row of K numbers as (BLOCK_K, 1), zeros behind K."""
    j = tl.arange(0, BLOCK_K)
    return tl.load(trajectory + row * K + j, mask=j < K, other=0.0)[:, None]


@triton.jit
def assign(w, centroids, sharpness, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """(powers (BLOCK_K, BLOCK), 1 / their sum (BLOCK), w - centroids): a_j is powers_j times the second. The nearest
    centroid's power is 1, so the sum is never 0."""
    gap = w[None, :] - centroids
    distance = gap * gap * sharpness
    if K < BLOCK_K:
        distance = tl.where((tl.arange(0, BLOCK_K) < K)[:, None], distance, float("inf"))
    power = tl.exp2(tl.min(distance, 0)[None, :] - distance)
    return power, 1.0 / tl.sum(power, 0), gap


@triton.jit
def add_up(partial, group, chunks, row, first, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr):
    """The numbers [first, first + BLOCK_K) of every part of a group, in float64."""
    j = first + tl.arange(0, BLOCK_K)
    sums = tl.zeros([BLOCK_K], tl.float64)
    base = partial + group.to(tl.int64) * chunks * row
    for start in range(0, chunks, BLOCK_C):
        part = start + tl.arange(0, BLOCK_C)
        numbers = tl.load(base + part[:, None] * row + j[None, :], mask=(part < chunks)[:, None], other=0.0)
        sums += tl.sum(numbers.to(tl.float64), 0)
    return sums


@triton.jit(do_not_specialize=["t", "vectors", "chunk", "chunks"])
def dkm_sums_kernel(weight, trajectory, live, partial, t, vectors, chunk, chunks, sharpness, ROWS: tl.constexpr,
                    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr):
    """Soft counts, and sums of the distances from the centroids, which are small numbers where the weights are not.
    Groups that have settled sum nothing."""
    group, begin, end = share(tl.program_id(0), chunks, chunk, vectors)
    end = tl.where(tl.load(live + group) != 0, end, begin)
    centroids = load_centroids(trajectory, group * ROWS + t, K, BLOCK_K)
    counts = tl.zeros([BLOCK_K, BLOCK], tl.float32)
    gaps = tl.zeros([BLOCK_K, BLOCK], tl.float32)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        w = load_weights(weight, group, vectors, at, end)
        power, inverse, gap = assign(w, centroids, sharpness, K, BLOCK_K)
        shares = power * tl.where(at < end, inverse, 0.0)[None, :]
        counts += shares
        gaps += shares * gap
    target = partial + tl.program_id(0).to(tl.int64) * (2 * BLOCK_K) + tl.arange(0, BLOCK_K)
    tl.store(target, tl.sum(counts, 1))
    tl.store(target + BLOCK_K, tl.sum(gaps, 1))


@triton.jit(do_not_specialize=["t", "chunks"])
def dkm_move_kernel(partial, trajectory, counts, steps, live, t, chunks, tolerance, ROWS: tl.constexpr,
                    STOPS: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr):
    """c^(t+1) of each group; centroids and counts of one that has settled repeat."""
    group = tl.program_id(0)
    j = tl.arange(0, BLOCK_K)
    inside = j < K
    running = tl.load(live + group) != 0
    count = add_up(partial, group, chunks, 2 * BLOCK_K, 0, BLOCK_K, BLOCK_C)
    gaps = add_up(partial, group, chunks, 2 * BLOCK_K, BLOCK_K, BLOCK_K, BLOCK_C)
    row = trajectory + (group * ROWS + t) * K + j
    kept = counts + (group * (ROWS - 1) + t) * K + j
    before = tl.load(row, mask=inside, other=0.0)
    empty = count.to(tl.float32) < EMPTY
    mean = (before.to(tl.float64) + gaps / tl.where(empty, 1.0, count)).to(tl.float32)
    after = tl.where(empty | (not running), before, mean)
    last = tl.load(kept - K, mask=inside & (t > 0), other=0.0)
    tl.store(row + K, after, mask=inside)
    tl.store(kept, tl.where(running, count.to(tl.float32), last), mask=inside)
    tl.store(steps + group, (t + 1).to(tl.int64), mask=running)
    if STOPS:
        farthest = tl.max(tl.where(inside, tl.abs(after - before), 0.0), 0)
        tl.store(live + group, (running & (farthest > tolerance)).to(tl.int32))


@triton.jit(do_not_specialize=["vectors", "chunk", "chunks"])
def dkm_output_kernel(weight, out, trajectory, steps, vectors, chunk, chunks, sharpness, ROWS: tl.constexpr,
                      K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr):
    """sum_j a_j c_j^T with the a that made c^T."""
    group, begin, end = share(tl.program_id(0), chunks, chunk, vectors)
    row = group * ROWS + tl.load(steps + group).to(tl.int32)
    before = load_centroids(trajectory, row - 1, K, BLOCK_K)
    after = load_centroids(trajectory, row, K, BLOCK_K)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        w = load_weights(weight, group, vectors, at, end)
        power, inverse, _ = assign(w, before, sharpness, K, BLOCK_K)
        clustered = tl.sum(power * after, 0) * inverse
        target = out + group.to(tl.int64) * vectors + at
        tl.store(target, clustered.to(out.dtype.element_ty), mask=at < end)


@triton.jit(do_not_specialize=["vectors", "chunk", "chunks"])
def dkm_collect_kernel(weight, grad, trajectory, steps, partial, vectors, chunk, chunks, sharpness, ROWS: tl.constexpr,
                       K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr):
    """cbar^T_j = sum_i a_ij g_i."""
    group, begin, end = share(tl.program_id(0), chunks, chunk, vectors)
    before = load_centroids(trajectory, group * ROWS + tl.load(steps + group).to(tl.int32) - 1, K, BLOCK_K)
    sums = tl.zeros([BLOCK_K, BLOCK], tl.float32)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        w = load_weights(weight, group, vectors, at, end)
        g = load_weights(grad, group, vectors, at, end)
        power, inverse, _ = assign(w, before, sharpness, K, BLOCK_K)
        sums += power * (g * inverse)[None, :]
    tl.store(partial + tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K), tl.sum(sums, 1))


@triton.jit(do_not_specialize=["t", "chunks"])
def dkm_pull_kernel(partial, counts, steps, bar, pulls, t, chunks, ROWS: tl.constexpr, K: tl.constexpr,
                    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr):
    """q^t of each group that came to iteration t, from cbar^t, which stays in `bar`: what the pass before has summed,
    and what an empty cluster of iteration t + 1 passes on."""
    group = tl.program_id(0)
    j = tl.arange(0, BLOCK_K)
    inside = j < K
    last = tl.load(steps + group).to(tl.int32)
    kept = counts + (group * (ROWS - 1) + t - 1) * K + j
    later = tl.load(kept + K, mask=inside & (t < last), other=1.0)
    passed = tl.load(bar + group * BLOCK_K + j, mask=later < EMPTY, other=0.0)
    found = add_up(partial, group, chunks, BLOCK_K, 0, BLOCK_K, BLOCK_C) + passed
    tl.store(bar + group * BLOCK_K + j, found, mask=inside & (t <= last))
    count = tl.load(kept, mask=inside, other=0.0)
    empty = count < EMPTY
    pull = tl.where(empty, 0.0, found / tl.where(empty, 1.0, count).to(tl.float64))
    tl.store(pulls + (group * (ROWS - 1) + t - 1) * K + j, pull.to(tl.float32), mask=inside & (t <= last))


@triton.jit
def pulled(w, g, after, pull):
    """h: the output's gradient g enters in the last iteration only, it is 0 in the others."""
    return pull * (w[None, :] - after) + g[None, :] * after


@triton.jit(do_not_specialize=["t", "vectors", "chunk", "chunks"])
def dkm_reverse_kernel(weight, grad, trajectory, pulls, steps, partial, t, vectors, chunk, chunks, sharpness, slope,
                       ROWS: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr):
    """cbar^(t-1)_j = 2 / tau sum_i a_ij (h_ij - H_i) (w_i - p_j); groups that came not so far
    keep what is there."""
    group, begin, end = share(tl.program_id(0), chunks, chunk, vectors)
    last = tl.load(steps + group).to(tl.int32)
    end = tl.where(t <= last, end, begin)
    before = load_centroids(trajectory, group * ROWS + t - 1, K, BLOCK_K)
    after = load_centroids(trajectory, group * ROWS + t, K, BLOCK_K)
    pull = load_centroids(pulls, group * (ROWS - 1) + t - 1, K, BLOCK_K)
    sums = tl.zeros([BLOCK_K, BLOCK], tl.float32)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        w = load_weights(weight, group, vectors, at, end)
        g = load_weights(grad, group, vectors, at, tl.where(t == last, end, begin))
        power, inverse, gap = assign(w, before, sharpness, K, BLOCK_K)
        h = pulled(w, g, after, pull)
        mean = tl.sum(power * h, 0) * inverse
        lean = power * tl.where(at < end, slope * inverse, 0.0)[None, :]
        sums += lean * (h - mean[None, :]) * gap
    target = partial + tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    tl.store(target, tl.sum(sums, 1), mask=(tl.arange(0, BLOCK_K) < K) & (t <= last))


@triton.jit(do_not_specialize=["vectors", "chunk", "chunks"])
def dkm_gradient_kernel(weight, grad, out, trajectory, pulls, steps, vectors, chunk, chunks, sharpness, slope,
                        ROWS: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr):
    """sum_t sum_j a_j (q_j + 2 / tau (h_j - H) (p_j - P)), the iterations in order."""
    group, begin, end = share(tl.program_id(0), chunks, chunk, vectors)
    last = tl.load(steps + group).to(tl.int32)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        w = load_weights(weight, group, vectors, at, end)
        sent = load_weights(grad, group, vectors, at, end)
        sums = tl.zeros([BLOCK], tl.float32)
        for t in range(1, last + 1):
            before = load_centroids(trajectory, group * ROWS + t - 1, K, BLOCK_K)
            after = load_centroids(trajectory, group * ROWS + t, K, BLOCK_K)
            pull = load_centroids(pulls, group * (ROWS - 1) + t - 1, K, BLOCK_K)
            power, inverse, gap = assign(w, before, sharpness, K, BLOCK_K)
            h = pulled(w, tl.where(t == last, sent, 0.0), after, pull)
            mean = tl.sum(power * h, 0) * inverse
            centre = tl.sum(power * gap, 0) * inverse  # w - P
            change = pull + slope * (h - mean[None, :]) * (centre[None, :] - gap)
            sums += tl.sum(power * change, 0) * inverse
        target = out + group.to(tl.int64) * vectors + at
        tl.store(target, sums.to(out.dtype.element_ty), mask=at < end)
