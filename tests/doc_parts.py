"""What the programs of README.md take for granted: small models and tensors, by the names of its hidden comments."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn


def two_layers(width: int = 64) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


def mlps() -> nn.Module:
    """A model whose layers have names like those of a transformer: block.mlp.0, block.mlp.2."""
    return nn.Sequential(OrderedDict(block=nn.Sequential(OrderedDict(mlp=two_layers()))))


def sequences() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """u, v, q of (B, H, L), a kernel of (H, L) and a skip."""
    u, v, q = (torch.randn(1, 8, 1000) for _ in range(3))
    return u, v, q, torch.randn(8, 1000), torch.randn(8)


class Residual(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(width), two_layers(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Stack(nn.Module):
    """Ordinary residual blocks in turn."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Residual() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def residual() -> nn.Module:
    return Stack()


def tokens() -> Tensor:
    return torch.randn(2, 8, 64)
