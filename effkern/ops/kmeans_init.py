"""Start values of weight clustering: k-means, for single weights its exact optimum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effkern import backends
from effkern.ops import registry
from effkern.ops._cluster_checks import check_clusters, check_groups, check_weight, require
from effkern.ops._dispatch import (
    FAST_DTYPES,
    refuse_all_but_fast,
    refuse_all_but_floating,
    register_flops,
    register_kernel,
    without_autocast,
)
from effkern.ops._kmeans_init_samples import bad_samples, calls, samples
from effkern.reference import kmeans_init as reference

__all__ = ["kmeans_bytes", "kmeans_flops", "kmeans_init"]

_OPS = torch.ops.effkern
NAME = "kmeans_init"


def kmeans_flops(weight: Tensor, clusters: int, groups: int = 1, dim: int = 1, *_: Any, **__: Any) -> int:
    """One addition a weight for dim 1, to count the values. Else 3 a weight, cluster and pass: k-means++ and 25 of
    Lloyd's iterations."""
    return weight.numel() * (1 if dim == 1 else 3 * clusters * (1 + reference.ROUNDS))


def kmeans_bytes(
    weight: Tensor,
    clusters: int,
    groups: int = 1,
    dim: int = 1,
    importance: Tensor | None = None,
    **_: Any,
) -> int:
    """Weights and importances once for dim 1, else once a pass."""
    passes = 1 if dim == 1 else clusters + reference.ROUNDS
    read = weight.nbytes + (0 if importance is None else importance.nbytes)
    return passes * read + 4 * groups * clusters * dim


def kmeans_init(
    weight: Tensor,
    clusters: int,
    *,
    groups: int = 1,
    dim: int = 1,
    importance: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The centroids of weighted k-means, where differentiable clustering starts and plain clustering ends.

        minimise  sum_i importance_i min_j |w_i - c_j|^2

    For single weights (dim 1) this is the optimum, found exactly; for runs of `dim` weights k-means++ and Lloyd's
    iterations find a local one.

    Args:
        weight: (rows, ...), rows are outputs, as in torch.nn.Linear. float32, bfloat16 or float16; float64 through the
            reference. Any strides; detached.
        clusters: k, 1 to 256.
        groups: how many tables. It divides the rows, which share the tables in order: group g has the rows from
            g rows / groups on.
        dim: 1, 2 or 4; runs of `dim` neighbours along the last axis, which it divides, are clustered as one vector.
        importance: weight's shape, any floating dtype, finite and not negative: how much an error counts. A vector
            counts as much as its numbers do on average. In a group of zeros throughout, all weights count alike.
        backend: "cpu" or "reference"; None leaves the choice to `effkern.backends`.

    Returns:
        centroids (k), with groups (groups, k), with dim above 1 (k, dim) or (groups, k, dim). float32; float64 of a
        float64 weight. For dim 1 ascending; where a group has fewer distinct values than clusters, those are the
        centroids, and the largest is repeated. No gradients.

    Raises:
        TypeError: weight or importance is not a tensor.
        ValueError: clusters, groups, dim or backend is out of its range or does not divide.
        RuntimeError: weight or importance has entries that are not finite, importance has negative ones, weight is
            empty, or shapes, dtypes or devices do not fit; the message names the argument.
        effkern.backends.Unavailable: the backend asked for cannot run.

    Numerics:
        dim 1: 16-bit weights are counted by value, float32 ones sorted. Boundaries are searched with sums in float64;
        where what they cost is below 1e-6 of the cost of one cluster, with sums in the longest format the compiler has
        (on x86 with 64 bits of precision), so that clusters far from each other keep what is inside them. Centroids are
        always made of such sums. The centroid of a cluster of one value is that value. -0 counts as 0. Otherwise
        distances in float32, sums in float64, and the draws of k-means++ come from a fixed sequence. Deterministic: the
        bits do not depend on the number of threads. Autocast changes nothing.

    Cost:
        `kmeans_flops`, `kmeans_bytes`. dim 1: one pass over 16-bit weights, or a sort of float32 ones, and a search.
        Below 24 clusters its time hardly depends on the number of weights: boundaries are bracketed to ever finer cells
        by bounds of the cost, and only the last, small brackets are searched position by position. From 24 clusters and
        4096 distinct values on it is some passes over the distinct values, each at another price of a cluster, until
        the optimum has the number asked for; after 100 passes, or where that needs the longer format, the search above,
        whose time grows with the number of clusters. The reference, in float64, takes time and memory with the square
        of the weights.

    Source:
        Groenlund et al. 2017 (Fast exact k-means, k-medians and Bregman divergence clustering in 1D); Arthur and
        Vassilvitskii 2007 (k-means++); importance as in Kim et al. 2023 (SqueezeLLM), section 4.1.
    """
    check_weight(NAME, weight)
    check_clusters(NAME, clusters)
    check_groups(NAME, weight, groups, dim)
    if importance is not None:
        kind = type(importance).__name__
        require(NAME, isinstance(importance, Tensor), f"importance must be a tensor, got {kind}", TypeError)
        require(NAME, importance.is_floating_point(), f"importance must be floating, got {importance.dtype}")
        require(
            NAME,
            importance.shape == weight.shape,
            f"importance has shape {tuple(importance.shape)}, weight has {tuple(weight.shape)}",
        )
        require(NAME, importance.device == weight.device, "importance is on another device than weight")
    name = backends.forced() if backend is None else backend
    if name is not None:
        backends.check_name(name)
        if name != "reference":
            backends.select(NAME, weight.device.type, weight.dtype, {}, name)
    usable = weight.dtype in FAST_DTYPES and weight.device.type in ("cpu", "cuda", "meta")
    weight = weight.detach()
    with without_autocast(weight):
        if name == "reference" or not usable:
            backends.record(f"{NAME}:reference")
            return reference.kmeans_init(weight, clusters, groups=groups, dim=dim, importance=importance)
        counts = None if importance is None else _single(importance.detach(), groups)
        return _OPS.kmeans_init(weight, clusters, groups, dim, counts)


def _single(importance: Tensor, groups: int) -> Tensor:
    """In float32. What counts are the ratios inside a group, which its largest number as unit keeps in range."""
    if importance.dtype == torch.float64:
        rows = importance.reshape(groups, -1)
        unit = rows.amax(1, keepdim=True)
        usable = (unit > 0) & unit.isfinite()
        importance = (rows / torch.where(usable, unit, 1.0)).reshape(importance.shape)
    return importance.float()


def _fake(
    weight: Tensor, clusters: int, groups: int = 1, dim: int = 1, importance: Tensor | None = None
) -> Tensor:
    check_weight(NAME, weight)
    check_clusters(NAME, clusters)
    check_groups(NAME, weight, groups, dim)
    shape = ([groups] if groups > 1 else []) + [clusters] + ([dim] if dim > 1 else [])
    return weight.new_empty(shape, dtype=torch.float32)


def _from_device(
    weight: Tensor, clusters: int, groups: int = 1, dim: int = 1, importance: Tensor | None = None
) -> Tensor:
    """The key CUDA: the host does it, once before a training run."""
    counts = None if importance is None else importance.cpu()
    return _OPS.kmeans_init(weight.cpu(), clusters, groups, dim, counts).to(weight.device)


torch.library.register_fake("effkern::kmeans_init", _fake)
register_kernel("kmeans_init", _from_device, "CUDA")
register_flops("kmeans_init", kmeans_flops)

registry.register(
    registry.OpSpec(
        name=NAME,
        family="dkm",
        public=kmeans_init,
        reference=reference.kmeans_init,
        schemas=(NAME,),
        backends=(
            registry.Backend("cpu", ("cpu", "cuda"), refuse_all_but_fast, note="on the host"),
            registry.Backend("reference", (), refuse_all_but_floating, note="plain PyTorch"),
        ),
        dtypes=(*FAST_DTYPES, torch.float64),
        sizes={},
        samples=samples,
        bad_samples=bad_samples,
        calls=calls,
        flops=kmeans_flops,
        bytes=kmeans_bytes,
        double_backward="",
        autocast=False,
        batched=(0,),
    )
)
