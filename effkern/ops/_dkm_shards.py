"""Differentiable k-means of a weight whose parts are held by the ranks of a process group."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from effkern import backends
from effkern.ops._dispatch import without_autocast
from effkern.reference import dkm_shards as reference


def dkm_shards(
    weight: Tensor,
    centroids: Tensor,
    temperature: float,
    iterations: int,
    tolerance: float,
    groups: int,
    dim: int,
    process_group: Any,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `effkern.reference.dkm.dkm_iterate` returns, of a rank's part of the weight."""
    import torch.distributed as dist

    name = backends.forced() if backend is None else backend
    if name is not None and backends.check_name(name) != "reference":
        reason = "process_group is served by PyTorch's own operations"
        raise backends.Unavailable("dkm", name, reason, ("reference",))
    if groups != 1:
        raise ValueError(f"dkm: groups must be 1 with a process_group, got {groups}")

    def reduce(sums: Tensor) -> Tensor:
        # One rank adds up a number and the others get it from there: no rank has other bits than another.
        dist.all_reduce(sums, group=process_group)
        return sums

    backends.record("dkm:reference")
    return _Shards.apply(weight, centroids, temperature, iterations, tolerance, dim, reduce)


class _Shards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, centroids: Tensor, *options: Any) -> tuple[Tensor, ...]:
        *_, dim, reduce = options
        out, made = reference.iterate(weight, centroids, *options)
        ctx.made, ctx.options = made, (options[0], dim, reduce)
        ctx.save_for_backward(weight)
        trajectory, counts, steps = made.padded(options[1])
        ctx.mark_non_differentiable(trajectory, counts, steps)
        return out, trajectory, counts, steps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        backends.record("dkm_backward:reference")
        (weight,) = ctx.saved_tensors
        with without_autocast(weight):
            grad = reference.gradient(grad_out, weight, ctx.made, *ctx.options)
        return grad, *(None,) * 6
