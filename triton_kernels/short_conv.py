"""Launchers of the Triton short convolution: forward, backward, and what they support.

Tiles are POSITIONS long, and as many rows high as keep a program busy where rows are short. The backward multiplies the
gradient by the derivative of SiLU once, into memory in fp32; the gradients of the input and of the weight then are two
passes over it. Tiles and shares depend on shapes alone, nothing is tuned at run time. Unverified on hardware: runs
and timings there are still due.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton

from . import short_conv_kernels as kernels
from .attention import supports as _device_supports
from .rows import adjacent, on, steps

_TILE = 1024  # numbers of a tile
_SUMS = 4096  # products that a program of the weight gradient keeps apart
_TAPS = 16  # of such a program at most
_PROGRAMS = 528  # that fill a large GPU a few times over
_WARPS = 4


def supports(device: torch.device, dtype: torch.dtype, sizes: Mapping[str, int]) -> str | None:
    """None when the launchers take such a request, else the reason they do not."""
    return _device_supports(device, dtype, {})


class _Problem:
    """What the launches share: sizes, and arguments in the layout the kernels read."""

    def __init__(self, x, weight, bias, state):
        self.batches, self.channels, self.length = x.shape
        self.taps = weight.size(1)
        self.x, self.weight = adjacent(x), weight.contiguous()
        self.bias = None if bias is None else bias.contiguous()
        self.state = None if state is None or state.numel() == 0 else state.contiguous()
        self.sizes = (self.channels, self.batches * self.channels, self.length, self.taps)

    def tiles(self, positions: int):
        """The grid of `positions` a row, how many programs a row takes, and the shape of a tile."""
        wide = min(_TILE, triton.next_power_of_2(max(positions, 16)))
        high = _TILE // wide
        blocks = triton.cdiv(positions, wide)
        return (triton.cdiv(self.sizes[1], high) * blocks,), blocks, {"ROWS": high, "POSITIONS": wide}

    def forward(self, out, silu, grad_out=None):
        grid, blocks, shape = self.tiles(self.length)
        kernels.short_conv_forward_kernel[grid](
            self.x, self.weight, self.bias, self.state, grad_out, out, *self.sizes, blocks, *steps(self.x),
            *steps(grad_out), HAS_BIAS=self.bias is not None, HAS_STATE=self.state is not None, SILU=silu,
            GRADIENT=grad_out is not None, **shape, num_warps=_WARPS)
        return out

    def input_gradient(self, grad, grad_x, grad_state):
        """Into those of the two that are there."""
        first = 0 if grad_state is None else self.taps - 1
        grid, blocks, shape = self.tiles(first if grad_x is None else first + self.length)
        kernels.short_conv_input_gradient_kernel[grid](
            grad, self.weight, grad_x, grad_state, *self.sizes, blocks, first, *steps(grad),
            NEED_X=grad_x is not None, NEED_STATE=grad_state is not None, **shape, num_warps=_WARPS)

    def weight_gradient(self, grad):
        """(channels, taps + 1): gradients of the weight and of the bias, in fp32. Sums over blocks are those of each
        program's share in turn, then of the shares in turn."""
        high = min(_TAPS, triton.next_power_of_2(self.taps))
        wide = min(_SUMS // high, triton.next_power_of_2(max(self.length, 16)))
        blocks, tiles = triton.cdiv(self.length, wide), triton.cdiv(self.taps, high)
        count = self.batches * blocks
        parts = min(count, triton.cdiv(_PROGRAMS, self.channels * tiles))
        share = triton.cdiv(count, parts)
        parts = triton.cdiv(count, share)
        sums = torch.empty((parts, self.channels, self.taps + 1), dtype=torch.float32, device=grad.device)
        kernels.short_conv_weight_gradient_kernel[(self.channels, tiles, parts)](
            grad, self.x, self.state, sums, self.channels, self.batches, self.length, self.taps, blocks, share,
            *steps(grad), *steps(self.x), HAS_STATE=self.state is not None, TAPS=high, POSITIONS=wide,
            num_warps=_WARPS)
        return sums.sum(0)


def short_conv(x, weight, bias=None, state=None, silu=False):
    """x (B, H, L), weight (H, W) -> (B, H, L), contiguous; the other arguments as in `effkern.short_conv`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        with on(x.device):
            _Problem(x, weight, bias, state).forward(out, silu)
    return out


def short_conv_backward(grad_out, x, weight, bias=None, state=None, silu=False, need_x=True, need_weight=True,
                        need_bias=True, need_state=True):
    """(grad_x, grad_weight, grad_bias, grad_state), each of shape (0,) where it is not needed or its argument not
    there."""
    tensors = x, weight, bias, state
    needs = [need and t is not None for need, t in zip((need_x, need_weight, need_bias, need_state), tensors)]
    make = torch.empty if x.numel() else torch.zeros
    like = [x if t is None else t for t in tensors]
    grads = [make(t.shape if need else (0,), dtype=t.dtype, device=x.device) for t, need in zip(like, needs)]
    if x.numel() == 0 or not any(needs):
        return tuple(grads)
    grad_x, grad_weight, grad_bias, grad_state = (g if need and g.numel() else None for g, need in zip(grads, needs))
    problem = _Problem(x, weight, bias, state)
    grad = adjacent(grad_out)
    with on(x.device):
        if silu:
            grad = problem.forward(torch.empty(x.shape, dtype=torch.float32, device=x.device), silu, grad)
        if grad_x is not None or grad_state is not None:
            problem.input_gradient(grad, grad_x, grad_state)
        if grad_weight is not None or grad_bias is not None:
            sums = problem.weight_gradient(grad)
            if grad_weight is not None:
                grad_weight.copy_(sums[:, :-1])
            if grad_bias is not None:
                grad_bias.copy_(sums[:, -1])
    return tuple(grads)
