"""Stacks of transformer blocks in plain PyTorch: every activation stored, checkpointed, or recovered by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from effkern.nn import ReversibleBlock

Runner = Callable[[Tensor], Tensor]


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        # (B, S, 3 E) -> three times (B, H, S, D)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Residual(nn.Module):
    """An ordinary block, of the same branches as a reversible one."""

    def __init__(self, f: nn.Module, g: nn.Module) -> None:
        super().__init__()
        self.f, self.g = f, g

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.f(x)
        return x + self.g(x)


def stored(blocks: list[nn.Module]) -> Runner:
    def run(x: Tensor) -> Tensor:
        return _through(blocks, x, lambda call, *state: call(*state))

    return run


def checkpointed(blocks: list[nn.Module]) -> Runner:
    def run(x: Tensor) -> Tensor:
        return _through(blocks, x, lambda call, *state: checkpoint(call, *state, use_reentrant=False))

    return run


def _through(blocks: list[nn.Module], x: Tensor, wrapped: Callable[..., Any]) -> Tensor:
    if not isinstance(blocks[0], ReversibleBlock):
        for block in blocks:
            x = wrapped(block, x)
        return x
    state = x, x
    for block in blocks:
        state = wrapped(_plain_step(block), *state)
    return state[0] + state[1]


def _plain_step(block: Any) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def step(x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        y1 = x1 + block.f(x2)
        return y1, x2 + block.g(y1)

    return step


class _ByHand(torch.autograd.Function):
    """The whole stack as one node that recovers its states: what the equations of the paper say, and no more."""

    @staticmethod
    def forward(ctx: Any, blocks: list[Any], x: Tensor, *weights: Tensor) -> Tensor:
        x1 = x2 = x
        for block in blocks:
            x1, x2 = _plain_step(block)(x1, x2)
        ctx.blocks, ctx.weights, ctx.autocast = blocks, weights, torch.is_autocast_enabled(x.device.type)
        ctx.save_for_backward(x1, x2)
        return x1 + x2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (y1, y2), d1, d2 = ctx.saved_tensors, grad, grad
        found: dict[int, Tensor] = {}

        def through(part: nn.Module, x: Tensor, sent: Tensor) -> tuple[Tensor, Tensor]:
            leaves = [x.detach().requires_grad_(), *part.parameters()]
            with torch.enable_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=ctx.autocast):
                out = part(leaves[0])
            passed, *grads = torch.autograd.grad(out, leaves, sent.to(out.dtype))
            found.update((id(p), g) for p, g in zip(leaves[1:], grads, strict=True))
            return out.detach(), passed

        for block in reversed(ctx.blocks):
            out, passed = through(block.g, y1, d2)
            y2, d1 = y2 - out, d1 + passed
            out, passed = through(block.f, y2, d1)
            y1, d2 = y1 - out, d2 + passed
        return None, d1 + d2, *(found[id(weight)] for weight in ctx.weights)


def by_hand(blocks: list[nn.Module]) -> Runner:
    weights = [p for block in blocks for p in block.parameters()]
    return lambda x: _ByHand.apply(blocks, x, *weights)
