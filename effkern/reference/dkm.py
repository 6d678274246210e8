"""Differentiable k-means clustering in plain PyTorch: the unrolled iterations, and their gradient in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

# A cluster whose soft count is below this is empty: it keeps its centroid. Far from what any float32 sum of weights
# that matter can be, and far enough from float32's smallest number for a mean to be exact above it.
EMPTY = 2.0**-100
COLDEST = 1e-30  # temperatures below act as this one: their inverse would not be a float32 number


def _vectors(weight: Tensor, groups: int, dim: int) -> Tensor:
    """(groups, N, dim) in the dtype that sums are made in."""
    compute = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return weight.to(compute).reshape(groups, weight.numel() // (groups * dim), dim)


def _assign(vectors: Tensor, centroids: Tensor, temperature: float) -> Tensor:
    """a (groups, N, K): how much each vector belongs to each centroid.

    Distances count from the nearest centroid's, which is 0 at any temperature. Those of vectors that are so far from
    all centroids that squares overflow are taken in a unit of their own.
    """
    gaps = vectors[:, :, None] - centroids[:, None]
    nearest = gaps.detach().abs().amax(-1).amin(-1)[..., None]  # (groups, N, 1)
    unit = torch.where(nearest > 2.0**60, nearest, 1.0)
    distances = (gaps / unit[..., None]).square().sum(-1)
    beyond = (distances - distances.detach().amin(-1, keepdim=True)) * unit
    return torch.softmax(-beyond / max(temperature, COLDEST) * unit, -1)


def dkm_iterate(
    weight: Tensor,
    centroids: Tensor,
    temperature: float,
    iterations: int,
    tolerance: float,
    groups: int,
    dim: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the kernel returns: clustered weight, all centroids (groups, T+1, K, dim), soft counts (groups, T, K), and
    how many iterations each group made (groups). Behind its last iteration a group's centroids and counts repeat."""
    vectors = _vectors(weight, groups, dim)
    now = centroids.detach().to(vectors.dtype).reshape(groups, -1, dim)
    trajectory, counts = [now], []
    running = torch.ones(groups, dtype=torch.bool, device=weight.device)
    steps = torch.zeros(groups, dtype=torch.int64, device=weight.device)
    shares = count = None
    for _ in range(iterations):
        found = _assign(vectors, now, temperature)
        shares = found if shares is None else torch.where(running[:, None, None], found, shares)
        found = shares.sum(1)
        count = found if count is None else torch.where(running[:, None], found, count)
        empty = (count < EMPTY)[..., None]
        mean = (shares.mT @ vectors) / torch.where(empty, 1.0, count[..., None])
        moved = torch.where(empty | ~running[:, None, None], now, mean)
        steps = steps + running
        if tolerance > 0:
            running = running & ((moved - now).abs().amax((1, 2)) > tolerance)
        now = moved
        trajectory.append(now)
        counts.append(count)
    assert shares is not None
    clustered = (shares @ now).reshape(weight.shape).to(weight.dtype)
    return clustered, torch.stack(trajectory, 1), torch.stack(counts, 1), steps


def dkm(
    weight: Tensor,
    centroids: Tensor,
    *,
    temperature: float,
    iterations: int = 3,
    tolerance: float = 0.0,
    groups: int = 1,
    dim: int = 1,
) -> tuple[Tensor, Tensor]:
    """Shapes as `effkern.dkm`; 16-bit dtypes are widened once and rounded once. Takes memory for N x K numbers an
    iteration, several times over."""
    clustered, trajectory, _, _ = dkm_iterate(
        weight, centroids, temperature, iterations, tolerance, groups, dim
    )
    return clustered, trajectory[:, -1].detach().clone().reshape(centroids.shape)


def dkm_backward(
    grad_out: Tensor,
    weight: Tensor,
    trajectory: Tensor,
    counts: Tensor,
    steps: Tensor,
    temperature: float,
    groups: int,
    dim: int,
) -> Tensor:
    """The gradient of the clustered weight in closed form, as the kernels compute it, a group at a time.

    With p = c^(t-1), c = c^t, S = S^t, and cbar^t the gradient that reaches c^t:

        q_j     = cbar^t_j / S_j, 0 for an empty cluster, whose cbar goes on to c^(t-1) as it is
        h_ij    = q_j (w_i - c_j), and g_i c_j more in the last iteration
        grad_i += sum_j a_ij q_j + 2/tau sum_j a_ij (h_ij - H_i) (p_j - P_i),     H_i = sum_j a_ij h_ij, P_i likewise
        cbar^(t-1)_j = 2/tau sum_i a_ij (h_ij - H_i) (w_i - p_j)
    """
    vectors, grads = _vectors(weight, groups, dim), _vectors(grad_out, groups, dim)
    slope = 2 / max(temperature, COLDEST)
    result = torch.zeros_like(vectors)
    for group in range(groups):
        w, g, path = vectors[group], grads[group], trajectory[group].to(vectors.dtype)
        last = int(steps[group])
        bar = torch.zeros_like(path[0])
        for t in range(last, 0, -1):
            before, after = path[t - 1], path[t]
            a = _assign(w[None], before[None], temperature)[0]
            count = counts[group, t - 1].to(w.dtype)[:, None]
            empty = count < EMPTY
            if t == last:
                bar = a.mT @ g
            q = torch.where(empty, 0.0, bar / torch.where(empty, 1.0, count))
            h = ((w[:, None] - after) * q).sum(-1)
            if t == last:
                h = h + g @ after.mT
            centred = a * (h - (a * h).sum(-1, keepdim=True)) * slope
            result[group] += a @ q + (centred[..., None] * (before - (a @ before)[:, None])).sum(1)
            bar = (centred[..., None] * (w[:, None] - before)).sum(0) + torch.where(empty, bar, 0.0)
    return result.reshape(weight.shape).to(weight.dtype)
