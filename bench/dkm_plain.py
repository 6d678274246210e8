"""Differentiable k-means in plain PyTorch: as autograd would have it, and a chunk at a time for weights of any size."""

from __future__ import annotations

import torch
from torch import Tensor

from effkern.reference import dkm_shards


def unrolled(weight: Tensor, start: Tensor, *, temperature: float, iterations: int) -> Tensor:
    """What the paper's layer does, intermediates in the weight's dtype; autograd keeps weights x clusters of them."""
    column, centroids = weight.reshape(-1, 1), start.to(weight.dtype)
    for _ in range(iterations):
        shares = _shares(column, centroids, temperature)
        centroids = (shares * column).sum(0) / shares.sum(0)
    return (shares @ centroids).reshape(weight.shape)


def _shares(column: Tensor, centroids: Tensor, temperature: float) -> Tensor:
    return torch.softmax(-(column - centroids).square() / temperature, 1)


def chunked(
    weight: Tensor,
    start: Tensor,
    *,
    temperature: float,
    iterations: int,
    grad_out: Tensor | None = None,
) -> Tensor:
    """The clustered weight, or with `grad_out` its gradient in closed form; in float64 for a float64 weight, else in
    float32 and rounded once."""
    out, made = dkm_shards.iterate(weight, start, temperature, iterations, 0.0, 1, _alone)
    if grad_out is None:
        return out
    return dkm_shards.gradient(grad_out.to(weight.dtype), weight, made, temperature, 1, _alone)


def _alone(sums: Tensor) -> Tensor:
    return sums
