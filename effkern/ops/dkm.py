"""Differentiable k-means: clusters a weight softly, differentiable through its iterations, in next to no memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from effkern import backends
from effkern.ops import registry
from effkern.ops._dispatch import (
    FAST_DTYPES,
    refuse_all_but_fast,
    refuse_all_but_floating,
    refuse_forward_mode,
    triton_refusal,
    without_autocast,
)
from effkern.ops._dkm_checks import check_centroids, check_kinds, check_tolerance, check_weight
from effkern.ops._dkm_convergence import DkmConvergence
from effkern.ops._dkm_cost import dkm_bytes, dkm_flops
from effkern.ops._dkm_dispatch import DOUBLE_BACKWARD
from effkern.ops._dkm_samples import bad_samples, calls, samples
from effkern.ops._dkm_shards import dkm_shards
from effkern.reference import dkm as reference

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["DkmConvergence", "dkm", "dkm_bytes", "dkm_flops"]

_OPS = torch.ops.effkern


def _kernel(weight: Tensor, asked: str | None) -> Any:
    """The dispatcher op for a request, None for the reference."""
    name = backends.forced() if asked is None else asked
    if name is not None:
        backends.check_name(name)
    if name is None:
        usable = weight.dtype in FAST_DTYPES and weight.device.type in ("cpu", "cuda", "meta")
        return _OPS.dkm.default if usable else None
    if name == "reference":
        return None
    backends.select("dkm", weight.device.type, weight.dtype, {}, name)
    return (_OPS.dkm_triton if name == "triton" else _OPS.dkm).default


def _refuse_non_finite(weight: Tensor, centroids: Tensor) -> None:
    """What the CPU kernel does while it reads, before the reference. Values are not looked at where there are none, or
    a transform hides them."""
    if weight.device.type != "cpu" or torch.compiler.is_compiling():
        return
    for name, t in (("weight", weight), ("centroids", centroids)):
        if (
            type(t) is Tensor
            and not torch._C._functorch.is_functorch_wrapped_tensor(t)
            and not t.isfinite().all()
        ):
            raise RuntimeError(f"dkm: {name} has entries that are not finite")


@overload
def dkm(
    weight: Tensor,
    centroids: Tensor,
    *,
    temperature: float,
    iterations: int = ...,
    tolerance: float = ...,
    groups: int = ...,
    dim: int = ...,
    convergence: Literal[False] = ...,
    process_group: ProcessGroup | None = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def dkm(
    weight: Tensor,
    centroids: Tensor,
    *,
    temperature: float,
    iterations: int = ...,
    tolerance: float = ...,
    groups: int = ...,
    dim: int = ...,
    convergence: Literal[True],
    process_group: ProcessGroup | None = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor, DkmConvergence]: ...


def dkm(
    weight: Tensor,
    centroids: Tensor,
    *,
    temperature: float,
    iterations: int = 3,
    tolerance: float = 0.0,
    groups: int = 1,
    dim: int = 1,
    convergence: bool = False,
    process_group: ProcessGroup | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, DkmConvergence]:
    """Clusters a weight by soft k-means, so that training feels where its values will be rounded to.

    With c^0 the centroids given, for t = 1 to T:

        a_ij  = softmax_j(-|w_i - c_j^(t-1)|^2 / temperature)
        c_j^t = sum_i a_ij w_i / sum_i a_ij

    and clustered_i = sum_j a_ij c_j^T with the last a. The gradient is that of all of it, the iterations included.

    Args:
        weight: (rows, ..., columns), at least one axis. float32, bfloat16 or float16; float64 through the reference.
            Any strides; one that is not contiguous is copied once.
        centroids: where to start, weight's dtype or float32: (K) from 1 to 256 of them; (groups, K) with groups;
            (K, dim) or (groups, K, dim) with dim. They take no gradient.
        temperature: how soft the assignment is, in squares of the weight's unit. Near 0 it is hard.
        iterations: T, at least 1.
        tolerance: above 0 a group stops after an iteration in which none of its centroids moved by more than this.
        groups: how many parts of consecutive rows have centroids of their own. Must divide rows.
        dim: 1, 2 or 4: clusters vectors of so many consecutive numbers along the last axis. Must divide columns.
        convergence: also return how many iterations each group made, how far its centroids moved in each, and the soft
            counts of its clusters: a `DkmConvergence`.
        process_group: the ranks of which each calls with its own part of the weight, some rows (or none), and with the
            same centroids and options; all of them go backward, too. An iteration sends (dim + 1) K numbers in float64
            around, its backward dim K. Served by PyTorch's own operations, with groups 1, once differentiable.
        backend: "cpu", "triton" (dim 1, up to 16 clusters) or "reference"; None leaves the choice to
            `effkern.backends`.

    Returns:
        clustered, weight's shape and dtype, contiguous, differentiable in weight; and the centroids c^T, shaped like
        those given, in float32 (float64 for a float64 weight), outside the graph; with `convergence`, a
        `DkmConvergence` as well.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the number of clusters, temperature, iterations, tolerance, groups or dim is out of its range or
            does not divide, or the backend is unknown.
        RuntimeError: shapes, dtypes or devices do not fit; or, on the CPU, weight or centroids has entries that are not
            finite (a GPU would have to be waited for: there, and through Triton, they make all of their group NaN). The
            message names the argument, what was expected and what came.
        effkern.backends.Unavailable: the backend asked for cannot run.
        NotImplementedError: differentiated twice or in forward mode, on any backend but the reference.

    Numerics:
        On the CPU distances, centroids between the iterations and their sums in float64, exponentials and the terms of
        the gradient in float32: for dim 1 within 1e-5 of the exact gradient, also where the temperature is far below
        the squared gap of neighbouring centroids. Where it is above a sixty-sixth of that square, distances of groups
        with 1024 weights a cluster are in float32 as well, within the same bound; each iteration of a group decides by
        its centroids and by the range of the weights. Elsewhere in float32.
        A cluster whose soft count sum_i a_ij is below 2^-100 is empty: it keeps its centroid,
        and passes its gradient on to the iteration before. Temperatures below 1e-30 act as 1e-30. -0.0 is 0.0.
        Deterministic: the bits do not depend on the number of threads. Autocast changes nothing.

    Cost:
        `dkm_flops`, `dkm_bytes`. Nothing of the size of weight times K is made. Saved for the backward are the weight
        and (T + 1) K dim + T K + 1 numbers a group. 16-bit weights with dim 1 and 32,768 numbers a group or more are
        counted first: the iterations then run over their distinct values, of which there are at most 65,536, and output
        and gradient are looked up. Others take T + 1 passes over the weight, and backward as many in float32, else 2 T.
        Through Triton all are streamed; there a group that has settled costs its remaining launches, as the host is not
        asked.

    Source:
        Cho et al. 2022 (DKM: Differentiable k-Means Clustering Layer for Neural Network Compression), section 3; Cho et
        al. 2023 (eDKM), section 2, for 16-bit weights by their values.
    """
    check_kinds(weight, centroids, temperature, tolerance, iterations, groups, dim)
    kernel = _kernel(weight, backend)
    check_weight(weight, temperature, iterations, groups, dim)
    check_tolerance(tolerance)
    check_centroids(centroids, weight, groups, dim)
    with without_autocast(weight):
        if process_group is not None:
            options = temperature, iterations, tolerance, groups, dim
            clustered, *path = dkm_shards(weight, centroids, *options, process_group, backend)
        elif kernel is None:
            _refuse_non_finite(weight, centroids)
            backends.record("dkm:reference")
            clustered, *path = reference.dkm_iterate(
                weight, centroids, temperature, iterations, tolerance, groups, dim
            )
        else:
            refuse_forward_mode("dkm", weight)
            start = centroids.detach().float().reshape(groups, centroids.numel() // (groups * dim), dim)
            clustered, *path = kernel(weight, start, temperature, iterations, tolerance, groups, dim)
        trajectory, counts, steps = (t.detach() for t in path)
        dtype = weight.dtype if weight.dtype == torch.float64 else torch.float32
        found = trajectory.select(1, iterations).to(dtype, copy=True).reshape(centroids.shape)
    if convergence:
        return clustered, found, DkmConvergence.of(trajectory, counts, steps)
    return clustered, found


registry.register(
    registry.OpSpec(
        name="dkm",
        family="dkm",
        public=dkm,
        reference=reference.dkm,
        schemas=("dkm", "dkm_backward", "dkm_triton", "dkm_triton_backward"),
        backends=(
            registry.Backend("cpu", ("cpu",), refuse_all_but_fast),
            registry.Backend(
                "triton", (), triton_refusal("dkm"), note="unverified on hardware", automatic=False
            ),
            registry.Backend("reference", (), refuse_all_but_floating, note="plain PyTorch"),
        ),
        dtypes=(*FAST_DTYPES, torch.float64),
        sizes={},
        samples=samples,
        bad_samples=bad_samples,
        calls=calls,
        flops=dkm_flops,
        bytes=dkm_bytes,
        double_backward=DOUBLE_BACKWARD,
        constants=("centroids",),
        autocast=False,
    )
)
