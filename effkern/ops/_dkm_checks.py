"""Argument checks of differentiable k-means in Python, in the words of csrc/dkm/cpu.cpp."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from effkern.ops._cluster_checks import MOST_CLUSTERS, check_clusters, check_form, check_groups
from effkern.ops._dispatch import dtype_name, require_dense


# Messages are functions: a compiler to which numbers are symbols cannot write them out, and need not.
def _require(condition: bool, message: Callable[[], str], error: type[Exception] = RuntimeError) -> None:
    if not condition:
        raise error(f"dkm: {message()}")


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
        require_dense("dkm", **{name: tensor})
    for name, number in (("temperature", temperature), ("tolerance", tolerance)):
        if not isinstance(number, int | float | torch.SymFloat | torch.SymInt):
            raise TypeError(f"dkm: {name} must be a number, got {type(number).__name__}")
    for name, number in (("iterations", iterations), ("groups", groups), ("dim", dim)):
        if not isinstance(number, int | torch.SymInt):
            raise TypeError(f"dkm: {name} must be an integer, got {type(number).__name__}")


def check_weight(weight: Tensor, temperature: float, iterations: int, groups: int, dim: int) -> None:
    check_form("dkm", weight)
    fits = 0 < temperature < math.inf
    _require(fits, lambda: f"temperature must be positive and finite, got {temperature}", ValueError)
    _require(iterations >= 1, lambda: f"iterations must be at least 1, got {iterations}", ValueError)
    check_groups("dkm", weight, groups, dim)


def check_tolerance(tolerance: float) -> None:
    fits = 0 <= tolerance < math.inf
    _require(fits, lambda: f"tolerance must be finite and not negative, got {tolerance}", ValueError)


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
    check_clusters("dkm", shape[len(lead)], "clusters of centroids")
    found, wanted = dtype_name(centroids.dtype), dtype_name(weight.dtype)
    _require(
        centroids.dtype in (weight.dtype, torch.float32),
        lambda: f"centroids is {found}, expected {wanted} as weight or float32",
    )
    _require(centroids.device == weight.device, lambda: "centroids is on another device than weight")


def check_start(centroids: Tensor, weight: Tensor, groups: int, dim: int) -> None:
    """Of the shape that the dispatcher gets."""
    shape = tuple(centroids.shape)
    _require(centroids.device == weight.device, lambda: "centroids is on another device than weight")
    found = dtype_name(centroids.dtype)
    _require(centroids.dtype == torch.float32, lambda: f"centroids is {found}, expected float32")
    _require(
        len(shape) == 3 and shape[0] == groups and shape[2] == dim,
        lambda: f"centroids must have shape ({groups}, clusters, {dim}), got {shape}",
    )
    check_clusters("dkm", shape[1], "clusters of centroids")


def check_saved(
    grad_out: Tensor, weight: Tensor, trajectory: Tensor, counts: Tensor, steps: Tensor, groups: int, dim: int
) -> None:
    """What a backward gets."""
    shapes = tuple(tuple(t.shape) for t in (trajectory, counts, steps))
    fits = counts.dim() == 3 and 1 <= counts.shape[2] <= MOST_CLUSTERS
    fits = fits and shapes == (
        (groups, counts.shape[1] + 1, counts.shape[2], dim),
        (groups, *counts.shape[1:]),
        (groups,),
    )
    _require(fits, lambda: f"trajectory, counts and steps have shapes {shapes}, not those of a forward")
    _require(
        grad_out.shape == weight.shape,
        lambda: f"grad_out has shape {tuple(grad_out.shape)}, weight has {tuple(weight.shape)}",
    )
    same = all(t.device == weight.device for t in (grad_out, trajectory, counts, steps))
    _require(same, lambda: "grad_out, trajectory, counts or steps is on another device than weight")
