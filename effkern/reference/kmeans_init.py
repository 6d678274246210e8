"""Start values of weight clustering in plain PyTorch: the dynamic programme with all its candidates, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["kmeans_cost", "kmeans_init"]

ROUNDS = 25  # of Lloyd's iterations
_MASK = (1 << 64) - 1


def kmeans_init(
    weight: Tensor, clusters: int, *, groups: int = 1, dim: int = 1, importance: Tensor | None = None
) -> Tensor:
    """`effkern.kmeans_init`. For dim 1 memory and time grow with the square of the weights of a group."""
    _assert(weight.isfinite().all(), "kmeans_init: weight has entries that are not finite")
    values = weight.detach().double().reshape(groups, -1, dim)
    mass = torch.ones_like(values[..., 0])
    if importance is not None:
        usable = (importance >= 0).all() & importance.isfinite().all()
        _assert(usable, "kmeans_init: importance has entries that are negative or not finite")
        given = importance.detach().double().reshape(groups, -1, dim).mean(-1)
        mass = torch.where(given.sum(-1, keepdim=True) > 0, given, mass)
    centroids = _exact(values[..., 0], mass, clusters) if dim == 1 else _lloyd(values, mass, clusters)
    if groups == 1:
        centroids = centroids[0]
    return centroids.to(torch.float64 if weight.dtype == torch.float64 else torch.float32)


def kmeans_cost(
    weight: Tensor, centroids: Tensor, *, groups: int = 1, dim: int = 1, importance: Tensor | None = None
) -> Tensor:
    """What k-means minimises, one number a group, in float64: squared distances to the nearest centroid, each times its
    importance, summed."""
    values = weight.detach().double().reshape(groups, -1, dim)
    table = centroids.detach().double().reshape(groups, -1, dim)
    nearest = (values[:, :, None] - table[:, None]).square().sum(-1).amin(-1)
    if importance is not None:
        nearest = nearest * importance.detach().double().reshape(groups, -1, dim).mean(-1)
    return nearest.sum(-1)


def _assert(condition: Tensor, message: str) -> None:
    """An error that a compiler can trace; there is none to be had of tensors without data."""
    if condition.device.type != "meta":
        torch._assert_async(condition, message)


def _exact(values: Tensor, mass: Tensor, clusters: int) -> Tensor:
    """Of (groups, n): cost[j] = min_i before[i] + spread of the points from i up to j, cluster after cluster."""
    n = values.shape[1]
    values, order = values.sort(dim=-1, stable=True)
    mass = mass.gather(-1, order)
    centre = values[:, n // 2, None]
    moments = [(mass * (values - centre) ** power).cumsum(-1) for power in range(3)]
    total, first, second = (torch.nn.functional.pad(m, (1, 0)) for m in moments)  # (groups, n + 1)

    def between(sums: Tensor) -> Tensor:
        return sums[:, None, :] - sums[:, :, None]  # [i, j]: the points from i up to j

    count = between(total)
    spread = between(second) - between(first).square() / torch.where(count > 0, count, 1.0)
    positions = torch.arange(n + 1, device=values.device)
    spread = torch.where(count > 0, spread.clamp(min=0.0), 0.0)
    spread = spread.masked_fill(positions[:, None] > positions, torch.inf)
    # Clusters start at a new value, and at one that counts: two that are equal belong together.
    starts = torch.ones_like(total, dtype=torch.bool)
    starts[:, 1:n] = (values[:, 1:] > values[:, :-1]) & (mass[:, 1:] > 0)
    spread = spread.masked_fill(~starts[:, :, None], torch.inf)

    cost = spread[:, 0]
    choices = []
    for _ in range(clusters - 1):
        cost, choice = (cost[:, :, None] + spread).min(1)
        choices.append(choice)
    end = torch.full_like(positions[:1], n).expand(values.shape[0], 1)
    bounds = [end]
    for choice in reversed(choices):
        end = choice.gather(1, end)
        bounds.append(end)
    bounds.append(torch.zeros_like(end))
    edges = torch.cat(bounds[::-1], -1)  # (groups, clusters + 1)
    held = total.gather(1, edges).diff(dim=-1)
    means = centre + first.gather(1, edges).diff(dim=-1) / torch.where(held > 0, held, 1.0)
    # A cluster that no value was left for repeats the largest.
    largest = torch.where(held > 0, means, -torch.inf).amax(-1, keepdim=True)
    return torch.where(held > 0, means, largest).sort(-1).values


def _draw(counter: int) -> float:
    """Uniform on [0, 1): SplitMix64 of a counter, as in csrc/kmeans_init/lloyd.cpp."""
    z = (counter + 1) * 0x9E3779B97F4A7C15 & _MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & _MASK
    return ((z ^ z >> 31) >> 11) * 2.0**-53


def _lloyd(values: Tensor, mass: Tensor, clusters: int) -> Tensor:
    """k-means++ and Lloyd's iterations on (groups, n, dim)."""
    groups, n, dim = values.shape
    chosen: list[Tensor] = []
    nearest = torch.ones_like(mass)
    for j in range(clusters):
        if chosen:
            distance = (values - chosen[-1]).square().sum(-1)
            nearest = distance if j == 1 else torch.minimum(nearest, distance)
        sums = (mass * nearest).cumsum(-1)
        draws = [_draw(group * clusters + j) for group in range(groups)]
        target = sums[:, -1:] * torch.tensor(draws, dtype=torch.float64, device=values.device)[:, None]
        index = torch.searchsorted(sums, target, right=True).clamp(max=n - 1)
        chosen.append(values.gather(1, index[..., None].expand(-1, -1, dim)))  # (groups, 1, dim)
    centroids = torch.cat(chosen, 1)
    for _ in range(ROUNDS):
        nearest_one = (values[:, :, None] - centroids[:, None]).square().sum(-1).argmin(-1)
        member = torch.nn.functional.one_hot(nearest_one, clusters).double() * mass[..., None]
        held = member.sum(1)[..., None]  # (groups, clusters, 1)
        means = member.mT @ values / torch.where(held > 0, held, 1.0)
        centroids = torch.where(held > 0, means, centroids)
    return centroids
