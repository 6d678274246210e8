"""Launchers of the Triton differentiable k-means: forward, backward, and what they support.

Forward T pairs of launches (sums by chunk, then new centroids) and one for the output; backward T + 1 passes over the
weight, of which the last makes all T assignments again, with T small launches between them. Nothing is asked of the
host on the way: a group that has settled within the tolerance costs its remaining launches, which return at once.
Chunks depend on shapes alone, so the bits do not depend on the GPU. Unverified on hardware: runs and timings there are
still due.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton

from . import dkm_kernels as kernels
from .attention import architecture
from .attention import supports as _device_supports
from .rows import on

MAX_CLUSTERS = 16
_LOG2E = 1.4426950408889634
_COLDEST = 1e-30  # temperature, as on the CPU
_PROGRAMS = 1056  # that fill a large GPU
_WARPS = 4  # every thread holds one weight with all its clusters
_LEAST = 4096  # weights of a chunk: fewer would be all launch
_INTERPRETED = 512  # weights of a tile
_MOST = 2**31 - 1024  # weights of a group: the last tile is counted in int32 as well


def supports(device: torch.device, dtype: torch.dtype, sizes: Mapping[str, int]) -> str | None:
    """None when the launchers take such a request, else the reason they do not; sizes: clusters, dim and vectors of a
    group, where known."""
    reason = _device_supports(device, dtype, {})
    if reason is not None:
        return reason
    if sizes.get("dim", 1) != 1:
        return f"triton kernels cluster single numbers, not vectors of dim {sizes['dim']}"
    if sizes.get("clusters", 1) > MAX_CLUSTERS:
        return f"triton kernels take up to {MAX_CLUSTERS} clusters, not {sizes['clusters']}"
    if sizes.get("vectors", 1) > _MOST:
        return f"triton kernels take groups of up to {_MOST} weights, not {sizes['vectors']}"
    return None


class _Problem:
    """What the launches share: sizes, chunks, and the arguments that every pass over the weight ends with."""

    def __init__(self, weight, temperature, groups, clusters, iterations):
        self.weight, self.groups, self.on = weight.contiguous(), groups, weight.device
        self.iterations, self.clusters = iterations, clusters
        self.vectors = weight.numel() // groups
        block = 32 * _WARPS if architecture(self.on) else _INTERPRETED
        even = triton.cdiv(self.vectors * groups, _PROGRAMS)
        self.chunk = triton.cdiv(max(_LEAST, even), block) * block
        self.chunks = triton.cdiv(self.vectors, self.chunk)
        temperature = max(temperature, _COLDEST)
        self.sharpness, self.slope = _LOG2E / temperature, 2.0 / temperature
        self.sizes = (self.vectors, self.chunk, self.chunks)
        self.padded = triton.next_power_of_2(clusters)
        common = dict(ROWS=iterations + 1, K=clusters, BLOCK_K=self.padded)
        self.over_weights = dict(common, BLOCK=block, num_warps=_WARPS)
        self.over_chunks = dict(common, BLOCK_C=128, num_warps=_WARPS)

    def empty(self, *shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=self.on)

    def pass_over(self, kernel, *args, **flags):
        """A program for every chunk, if there are any."""
        if self.chunks:
            kernel[(self.groups * self.chunks,)](*args, **flags, **self.over_weights)

    def per_group(self, kernel, *args, **flags):
        kernel[(self.groups,)](*args, **flags, **self.over_chunks)


def dkm(weight, centroids, temperature, iterations=3, tolerance=0.0, groups=1):
    """weight, centroids (groups, K, 1) float32 -> (clustered, trajectory (groups, T+1, K, 1), counts (groups, T, K),
    steps (groups)), as the CPU has them."""
    p = _Problem(weight, temperature, groups, centroids.size(1), iterations)
    out = torch.empty(weight.shape, dtype=weight.dtype, device=p.on)
    trajectory = p.empty(groups, iterations + 1, p.clusters, 1)
    trajectory[:, 0] = centroids
    counts, steps = p.empty(groups, iterations, p.clusters), p.empty(groups, dtype=torch.int64)
    live = torch.ones(groups, dtype=torch.int32, device=p.on)
    partial = p.empty(groups, p.chunks, 2, p.padded)
    with on(p.on):
        for t in range(iterations):
            p.pass_over(kernels.dkm_sums_kernel, p.weight, trajectory, live, partial, t, *p.sizes, p.sharpness)
            p.per_group(kernels.dkm_move_kernel, partial, trajectory, counts, steps, live, t, p.chunks,
                        float(tolerance), STOPS=tolerance > 0)
        p.pass_over(kernels.dkm_output_kernel, p.weight, out, trajectory, steps, *p.sizes, p.sharpness)
    return out, trajectory, counts, steps


def dkm_backward(grad_out, weight, trajectory, counts, steps, temperature, groups=1):
    """The gradient of weight, in its dtype."""
    p = _Problem(weight, temperature, groups, counts.size(2), counts.size(1))
    sent = grad_out.contiguous()
    grad = torch.empty(weight.shape, dtype=weight.dtype, device=p.on)
    partial, pulls = p.empty(groups, p.chunks, p.padded), p.empty(groups, p.iterations, p.clusters)
    bar = p.empty(groups, p.padded, dtype=torch.float64)
    with on(p.on):
        p.pass_over(kernels.dkm_collect_kernel, p.weight, sent, trajectory, steps, partial, *p.sizes, p.sharpness)
        for t in range(p.iterations, 0, -1):
            p.per_group(kernels.dkm_pull_kernel, partial, counts, steps, bar, pulls, t, p.chunks)
            if t > 1:  # the first centroids have no gradient
                p.pass_over(kernels.dkm_reverse_kernel, p.weight, sent, trajectory, pulls, steps, partial, t, *p.sizes,
                            p.sharpness, p.slope)
        p.pass_over(kernels.dkm_gradient_kernel, p.weight, sent, grad, trajectory, pulls, steps, *p.sizes, p.sharpness,
                    p.slope)
    return grad
