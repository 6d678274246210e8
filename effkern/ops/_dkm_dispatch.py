"""Differentiable k-means at the dispatcher: fakes, gradient, flops, and what runs on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from effkern import backends
from effkern.ops._dispatch import register_flops, register_gradient, register_kernel, without_autocast
from effkern.ops._dkm_checks import check_saved, check_start, check_tolerance, check_weight
from effkern.ops._dkm_cost import op_flops, op_flops_backward
from effkern.reference import dkm as reference

_OPS = torch.ops.effkern
DOUBLE_BACKWARD = "dkm: second derivatives are only available with backend='reference'"
Results = tuple[Tensor, Tensor, Tensor, Tensor]


def _fake_forward(
    weight: Tensor,
    centroids: Tensor,
    temperature: float,
    iterations: int = 3,
    tolerance: float = 0.0,
    groups: int = 1,
    dim: int = 1,
) -> Results:
    check_weight(weight, temperature, iterations, groups, dim)
    check_tolerance(tolerance)
    clusters = centroids.shape[1]
    return (
        weight.new_empty(weight.shape),
        weight.new_empty((groups, iterations + 1, clusters, dim), dtype=torch.float64),
        weight.new_empty((groups, iterations, clusters), dtype=torch.float32),
        weight.new_empty((groups,), dtype=torch.int64),
    )


def _fake_backward(
    grad_out: Tensor,
    weight: Tensor,
    trajectory: Tensor,
    counts: Tensor,
    steps: Tensor,
    temperature: float,
    groups: int = 1,
    dim: int = 1,
) -> Tensor:
    return weight.new_empty(weight.shape)


def _composed_forward(
    weight: Tensor,
    centroids: Tensor,
    temperature: float,
    iterations: int = 3,
    tolerance: float = 0.0,
    groups: int = 1,
    dim: int = 1,
) -> Results:
    """The key CUDA: PyTorch's own operations."""
    check_weight(weight, temperature, iterations, groups, dim)
    check_tolerance(tolerance)
    backends.record("dkm:reference")
    out, *rest = reference.dkm_iterate(weight, centroids, temperature, iterations, tolerance, groups, dim)
    return out.contiguous(), rest[0].double(), rest[1], rest[2]


def _composed_backward(
    grad_out: Tensor,
    weight: Tensor,
    trajectory: Tensor,
    counts: Tensor,
    steps: Tensor,
    temperature: float,
    groups: int = 1,
    dim: int = 1,
) -> Tensor:
    backends.record("dkm_backward:reference")
    with without_autocast(weight):
        return reference.dkm_backward(
            grad_out, weight, trajectory, counts, steps, temperature, groups, dim
        ).contiguous()


def _triton_forward(
    weight: Tensor,
    centroids: Tensor,
    temperature: float,
    iterations: int = 3,
    tolerance: float = 0.0,
    groups: int = 1,
    dim: int = 1,
) -> Results:
    check_weight(weight, temperature, iterations, groups, dim)
    check_tolerance(tolerance)
    check_start(centroids, weight, groups, dim)
    backends.select("dkm", weight.device.type, weight.dtype, _sizes(weight, centroids, groups, dim), "triton")
    from effkern._triton import dkm as launcher

    backends.record("dkm:triton")
    out, trajectory, counts, steps = launcher.dkm(
        weight, centroids, temperature, iterations, tolerance, groups
    )
    return out, trajectory.double(), counts, steps


def _triton_backward(
    grad_out: Tensor,
    weight: Tensor,
    trajectory: Tensor,
    counts: Tensor,
    steps: Tensor,
    temperature: float,
    groups: int = 1,
    dim: int = 1,
) -> Tensor:
    check_weight(weight, temperature, 1, groups, dim)
    check_saved(grad_out, weight, trajectory, counts, steps, groups, dim)
    sizes = _sizes(weight, trajectory.select(1, 0), groups, dim)
    backends.select("dkm", weight.device.type, weight.dtype, sizes, "triton")
    from effkern._triton import dkm as launcher

    backends.record("dkm_backward:triton")
    return launcher.dkm_backward(grad_out, weight, trajectory.float(), counts, steps, temperature, groups)


def _sizes(weight: Tensor, start: Tensor, groups: int, dim: int) -> dict[str, int]:
    """What a backend may refuse; start (groups, clusters, dim)."""
    return {"clusters": start.shape[1], "dim": dim, "vectors": weight.numel() // (groups * dim)}


def _context(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    weight, _, temperature, *rest = inputs
    groups_and_dim = (*rest[2:], *(1, 1)[len(rest[2:]) :])
    ctx.count, ctx.options = len(inputs), (temperature, *groups_and_dim)
    _, trajectory, counts, steps = output
    ctx.mark_non_differentiable(trajectory, counts, steps)
    ctx.save_for_backward(weight, trajectory, counts, steps)


def _gradient_of(op: str) -> Callable[..., tuple[Tensor | None, ...]]:
    backward = getattr(_OPS, f"{op}_backward")

    def gradient(ctx: Any, grad_out: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grad = backward(grad_out, *ctx.saved_tensors, *ctx.options) if ctx.needs_input_grad[0] else None
        return grad, *(None,) * (ctx.count - 1)

    return gradient


def _refuse(ctx: Any, *grads: Any) -> Any:
    raise NotImplementedError(DOUBLE_BACKWARD)


for _op in ("dkm", "dkm_triton"):
    torch.library.register_fake(f"effkern::{_op}", _fake_forward)
    torch.library.register_fake(f"effkern::{_op}_backward", _fake_backward)
    register_gradient(_op, _context, _gradient_of(_op))
    torch.library.register_autograd(f"effkern::{_op}_backward", _refuse)
    register_flops(_op, op_flops)
    register_flops(f"{_op}_backward", op_flops_backward)
register_kernel("dkm", _composed_forward, "CUDA")
register_kernel("dkm_backward", _composed_backward, "CUDA")
register_kernel("dkm_triton", _triton_forward, "CPU", "CUDA")
register_kernel("dkm_triton_backward", _triton_backward, "CPU", "CUDA")
