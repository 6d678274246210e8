"""Flops and bytes of differentiable k-means."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def flops_of(numbers: int, clusters: int, iterations: int, dim: int, backward: bool) -> int:
    """Of the plain algorithm, whatever the dtype: a pass over all weights and clusters makes the distance (3 a number
    of a vector), an exponential and its share of the sum (4 a vector), and adds to sums or to the output (3 a number).
    There are T + 1 passes forward, 2 T backward, which cost twice as much behind the exponential."""
    vectors = numbers // dim
    passes = 2 * iterations if backward else iterations + 1
    return passes * vectors * clusters * ((9 if backward else 6) * dim + 4)


def dkm_flops(
    weight: Tensor,
    centroids: Tensor,
    *,
    iterations: int = 3,
    groups: int = 1,
    dim: int = 1,
    backward: bool = False,
    **_: Any,
) -> int:
    """3 dim + 4 + 3 dim a vector and cluster, T + 1 times; backward 9 dim + 4, 2 T times. What 16-bit weights save by
    their codes is not subtracted."""
    clusters = centroids.numel() // (groups * dim)
    return flops_of(weight.numel(), clusters, iterations, dim, backward)


def dkm_bytes(weight: Tensor, centroids: Tensor, *, backward: bool = False, **_: Any) -> int:
    """The weight, its gradients and the output once each; the centroids are little beside them."""
    return (3 if backward else 2) * weight.nbytes + 2 * centroids.nbytes


def op_flops(
    weight: Tensor,
    centroids: Tensor,
    temperature: float,
    iterations: int = 3,
    tolerance: float = 0.0,
    groups: int = 1,
    dim: int = 1,
    **_: Any,
) -> int:
    """The same, of the dispatcher's op."""
    return dkm_flops(weight, centroids, iterations=iterations, groups=groups, dim=dim)


def op_flops_backward(
    grad_out: Tensor,
    weight: Tensor,
    trajectory: Tensor,
    counts: Tensor,
    steps: Tensor,
    temperature: float,
    groups: int = 1,
    dim: int = 1,
    **_: Any,
) -> int:
    return flops_of(weight.numel(), counts.shape[2], counts.shape[1], dim, True)
