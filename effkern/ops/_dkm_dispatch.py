"""Differentiable k-means at the dispatcher: fakes, gradient, flops, and what runs on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effkern import backends
from effkern.ops._dispatch import register_flops, register_gradient, register_kernel
from effkern.ops._dkm_checks import check_tolerance, check_weight
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
        weight.new_empty((groups, iterations + 1, clusters, dim), dtype=torch.float32),
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
    return out.contiguous(), rest[0], rest[1], rest[2]


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
    return reference.dkm_backward(
        grad_out, weight, trajectory, counts, steps, temperature, groups, dim
    ).contiguous()


def _context(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    weight, _, temperature, *rest = inputs
    groups_and_dim = (*rest[2:], *(1, 1)[len(rest[2:]) :])
    ctx.count, ctx.options = len(inputs), (temperature, *groups_and_dim)
    _, trajectory, counts, steps = output
    ctx.mark_non_differentiable(trajectory, counts, steps)
    ctx.save_for_backward(weight, trajectory, counts, steps)


def _gradient(ctx: Any, grad_out: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    grad = _OPS.dkm_backward(grad_out, *ctx.saved_tensors, *ctx.options) if ctx.needs_input_grad[0] else None
    return grad, *(None,) * (ctx.count - 1)


def _refuse(ctx: Any, *grads: Any) -> Any:
    raise NotImplementedError(DOUBLE_BACKWARD)


torch.library.register_fake("effkern::dkm", _fake_forward)
torch.library.register_fake("effkern::dkm_backward", _fake_backward)
register_gradient("dkm", _context, _gradient)
torch.library.register_autograd("effkern::dkm_backward", _refuse)
register_kernel("dkm", _composed_forward, "CUDA")
register_kernel("dkm_backward", _composed_backward, "CUDA")
register_flops("dkm", op_flops)
register_flops("dkm_backward", op_flops_backward)
