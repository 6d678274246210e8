"""Differentiable k-means a chunk of the weight at a time, in plain PyTorch; other processes may hold other parts of it.

Memory is that of the weight, of its gradients, and of one chunk times the clusters. `reduce` adds up a small tensor
over the processes, and returns the same bits to each of them; the identity where there are no others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from effkern.reference.dkm import COLDEST, EMPTY, _assign

CHUNK = 1 << 15  # vectors; with their shares they stay in the cache
Reduce = Callable[[Tensor], Tensor]


class Iterations(NamedTuple):
    """What the backward needs: t + 1 times centroids (K, dim), t times soft counts (K, 1) in float64."""

    centroids: list[Tensor]
    counts: list[Tensor]

    def padded(self, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
        """As `effkern.reference.dkm.dkm_iterate` returns them, with one group: the last ones repeat."""
        left = iterations - len(self.counts)
        path = self.centroids + self.centroids[-1:] * left
        counts = [count[:, 0] for count in self.counts + self.counts[-1:] * left]
        steps = torch.tensor([len(self.counts)], device=path[0].device)
        return torch.stack(path)[None], torch.stack(counts)[None], steps


def compute_dtype(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _chunks(dim: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Vectors (n, dim) of each, in the dtype that is computed in."""
    dtype = compute_dtype(tensors[0])
    for parts in zip(*(t.detach().reshape(-1, dim).split(CHUNK) for t in tensors), strict=True):
        yield tuple(part.to(dtype) for part in parts)


def _shares(vectors: Tensor, centroids: Tensor, temperature: float) -> Tensor:
    return _assign(vectors[None], centroids[None], temperature)[0]


@torch.no_grad()
def iterate(
    weight: Tensor,
    centroids: Tensor,
    temperature: float,
    iterations: int,
    tolerance: float,
    dim: int,
    reduce: Reduce,
) -> tuple[Tensor, Iterations]:
    """The clustered weight, in its dtype; as `effkern.reference.dkm` with one group."""
    now = centroids.detach().to(compute_dtype(weight)).reshape(-1, dim)
    if now.device.type != "meta" and not now.isfinite().all():  # the same on all processes
        raise RuntimeError("dkm: centroids has entries that are not finite")
    path, counts = [now], []
    for _ in range(iterations):
        sums = torch.zeros(len(now), 1 + dim, dtype=torch.float64, device=weight.device)
        for (vectors,) in _chunks(dim, weight):
            shares = _shares(vectors, now, temperature)
            sums[:, 0] += shares.sum(0, dtype=torch.float64)
            sums[:, 1:] += shares.mT @ vectors
        sums = reduce(sums)
        if sums.device.type != "meta" and not sums.isfinite().all():  # on all processes, whoever has it
            raise RuntimeError("dkm: weight has entries that are not finite")
        count = sums[:, :1]
        mean = (sums[:, 1:] / torch.where(count < EMPTY, 1.0, count)).to(now.dtype)
        moved = torch.where(count < EMPTY, now, mean)
        path.append(moved)
        counts.append(count)
        settled = tolerance > 0 and bool((moved - now).abs().amax() <= tolerance)
        now = moved
        if settled:
            break
    out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    for part, (vectors,) in zip(out.view(-1, dim).split(CHUNK), _chunks(dim, weight), strict=True):
        part.copy_(_shares(vectors, path[-2], temperature) @ now)
    return out, Iterations(path, counts)


@torch.no_grad()
def gradient(
    grad_out: Tensor, weight: Tensor, made: Iterations, temperature: float, dim: int, reduce: Reduce
) -> Tensor:
    """The gradient of the clustered weight, by the formulas of `effkern.reference.dkm.dkm_backward`."""
    path, counts = made
    slope = 2 / max(temperature, COLDEST)
    grads = torch.zeros(weight.numel() // dim, dim, dtype=compute_dtype(weight), device=weight.device)
    bar = torch.zeros(path[0].shape, dtype=torch.float64, device=weight.device)
    for vectors, sent in _chunks(dim, weight, grad_out):
        bar += _shares(vectors, path[-2], temperature).mT @ sent
    bar = reduce(bar)
    for t in range(len(counts), 0, -1):
        before, after, empty = path[t - 1], path[t], counts[t - 1] < EMPTY
        q = torch.where(empty, 0.0, bar / torch.where(empty, 1.0, counts[t - 1])).to(after.dtype)
        earlier = torch.zeros_like(bar)
        for grad, (vectors, sent) in zip(grads.split(CHUNK), _chunks(dim, weight, grad_out), strict=True):
            shares = _shares(vectors, before, temperature)
            h = ((vectors[:, None] - after) * q).sum(-1)
            if t == len(counts):
                h = h + sent @ after.mT
            centred = shares * (h - (shares * h).sum(1, keepdim=True)) * slope
            moved = before - (shares @ before)[:, None]
            grad += shares @ q + (centred[..., None] * moved).sum(1)
            earlier += (centred[..., None] * (vectors[:, None] - before)).sum(0, dtype=torch.float64)
        if t > 1:
            bar = reduce(earlier) + torch.where(empty, bar, 0.0)
    return grads.reshape(weight.shape).to(weight.dtype)
