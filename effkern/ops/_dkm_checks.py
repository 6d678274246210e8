"""Argument checks of differentiable k-means in Python, in the words of csrc/dkm/cpu.cpp."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from effkern.ops._cluster_checks import DIMS, MOST_CLUSTERS
from effkern.ops._dispatch import FAST_DTYPES, dtype_name

DTYPES = (*FAST_DTYPES, torch.float64)


# Messages are functions: a compiler to which numbers are symbols cannot write them out, and need not.
def _require(condition: bool, message: Callable[[], str]) -> None:
    if not condition:
        raise RuntimeError(f"dkm: {message()}")


def check_kinds(
    weight: object,
    centroids: object,
    temperature: object,
    tolerance: object,
    iterations: object,
    groups: object,
    dim: object,
) -> None:
    for name, tensor in (("weight", weight), ("centroids", centroids)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"dkm: {name} must be a tensor, got {type(tensor).__name__}")
    for name, number in (("temperature", temperature), ("tolerance", tolerance)):
        if not isinstance(number, int | float | torch.SymFloat | torch.SymInt):
            raise TypeError(f"dkm: {name} must be a number, got {type(number).__name__}")
    for name, number in (("iterations", iterations), ("groups", groups), ("dim", dim)):
        if not isinstance(number, int | torch.SymInt):
            raise TypeError(f"dkm: {name} must be an integer, got {type(number).__name__}")


def check_weight(weight: Tensor, temperature: float, iterations: int, groups: int, dim: int) -> None:
    kind = dtype_name(weight.dtype)
    _require(weight.dtype in DTYPES, lambda: f"weight must be float32, bfloat16 or float16, got {kind}")
    _require(weight.dim() > 0, lambda: "weight must have at least one dimension, got shape ()")
    _require(
        0 < temperature < math.inf, lambda: f"temperature must be positive and finite, got {temperature}"
    )
    _require(iterations >= 1, lambda: f"iterations must be at least 1, got {iterations}")
    _require(dim in DIMS, lambda: f"dim must be 1, 2 or 4, got {dim}")
    _require(groups >= 1, lambda: f"groups must be at least 1, got {groups}")
    rows, last = weight.shape[0], weight.shape[-1]
    _require(rows % groups == 0, lambda: f"groups is {groups}, which does not divide weight's {rows} rows")
    _require(last % dim == 0, lambda: f"dim is {dim}, which does not divide weight's last axis of {last}")
    _require(
        weight.numel() % (groups * dim) == 0,
        lambda: f"groups of {rows // groups} rows do not hold whole vectors of dim {dim}",
    )


def check_tolerance(tolerance: float) -> None:
    _require(0 <= tolerance < math.inf, lambda: f"tolerance must be finite and not negative, got {tolerance}")


def check_centroids(centroids: Tensor, weight: Tensor, groups: int, dim: int) -> None:
    """Of the shape that a user gives."""
    lead, tail = (groups,) if groups > 1 else (), (dim,) if dim > 1 else ()
    shape = tuple(centroids.shape)
    axes = len(lead) + 1 + len(tail)
    expected = ", ".join(["groups"] * len(lead) + ["clusters"] + ["dim"] * len(tail))
    _require(
        len(shape) == axes and shape[: len(lead)] == lead and shape[len(lead) + 1 :] == tail,
        lambda: f"centroids must have shape ({expected}) with groups {groups} and dim {dim}, got {shape}",
    )
    clusters = shape[len(lead)]
    _require(
        1 <= clusters <= MOST_CLUSTERS,
        lambda: f"centroids has {clusters} clusters, expected 1 to {MOST_CLUSTERS}",
    )
    found, wanted = dtype_name(centroids.dtype), dtype_name(weight.dtype)
    _require(
        centroids.dtype in (weight.dtype, torch.float32),
        lambda: f"centroids is {found}, expected {wanted} as weight or float32",
    )
    _require(centroids.device == weight.device, lambda: "centroids is on another device than weight")
