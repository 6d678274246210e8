"""A small byte-level transformer whose parts can be swapped one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effkern.nn import MonarchLinear, ReversibleBlock, ReversibleSequence

AttentionCall = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Config:
    layers: int = 4
    width: int = 128
    heads: int = 2
    context: int = 1024
    vocabulary: int = 256

    def describe(self) -> str:
        return f"{self.layers} layers, width {self.width}, {self.heads} heads of {self.width // self.heads}"


def sdpa_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class AttentionMixer(nn.Module):
    """Causal self-attention with rotary positions; `call` is the attention under test."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: Config, call: AttentionCall) -> None:
        super().__init__()
        self.heads, self.call = config.heads, call
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        half = config.width // config.heads // 2
        rate = 10000.0 ** -(torch.arange(half) / half)
        angle = torch.arange(config.context)[:, None] * rate  # (S, D/2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def rotate(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        cos, sin = self.cos[: x.shape[-2]].to(x.dtype), self.sin[: x.shape[-2]].to(x.dtype)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        # (B, S, 3 * W) -> three times (B, H, S, D)
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = self.call(self.rotate(q), self.rotate(k), v)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


def dense_mlp(config: Config) -> nn.Module:
    return nn.Sequential(
        nn.Linear(config.width, 4 * config.width), nn.GELU(), nn.Linear(4 * config.width, config.width)
    )


def monarch_mlp(config: Config, nblocks: int) -> nn.Module:
    wide = 4 * config.width
    return nn.Sequential(
        MonarchLinear(config.width, wide, nblocks), nn.GELU(), MonarchLinear(wide, config.width, nblocks)
    )


class Block(nn.Module):
    def __init__(self, config: Config, mixer: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.norm_mixer, self.norm_mlp = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.mixer, self.mlp = mixer, mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm_mixer(x))
        return x + self.mlp(self.norm_mlp(x))


def sequential(blocks: Sequence[Block]) -> nn.Module:
    return nn.Sequential(*blocks)


class TwoStreams(nn.Module):
    """The blocks' mixers and MLPs as the two halves of reversible blocks, the streams summed at the end.

    `stored` is the same network as autograd runs it, with every activation stored.
    """

    def __init__(self, blocks: Sequence[Block], stored: bool = False, **options: Any) -> None:
        super().__init__()
        halves = [
            (nn.Sequential(block.norm_mixer, block.mixer), nn.Sequential(block.norm_mlp, block.mlp))
            for block in blocks
        ]
        self.stored = stored
        self.sequence = ReversibleSequence([ReversibleBlock(f, g) for f, g in halves], **options)

    def forward(self, x: Tensor) -> Tensor:
        if not self.stored:
            y1, y2 = self.sequence(x)
            return y1 + y2
        x1 = x2 = x
        for block in self.sequence.blocks:
            f, g = (part for _, part in cast(ReversibleBlock, block).parts())
            x1 = x1 + f(x2)
            x2 = x2 + g(x1)
        return x1 + x2


@dataclass(frozen=True)
class Parts:
    """What a variant may swap: how positions mix, the MLP, and how the blocks are strung together."""

    mixer: Callable[[Config], nn.Module]
    mlp: Callable[[Config], nn.Module] = dense_mlp
    stack: Callable[[Sequence[Block]], nn.Module] = sequential


class ByteModel(nn.Module):
    def __init__(self, config: Config, parts: Parts) -> None:
        super().__init__()
        self.embed = nn.Embedding(config.vocabulary, config.width)
        self.blocks = parts.stack(
            [Block(config, parts.mixer(config), parts.mlp(config)) for _ in range(config.layers)]
        )
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(tokens))))


def loss_nats(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of the next byte, in nats."""
    return F.cross_entropy(model(tokens).flatten(0, 1).float(), targets.flatten())
