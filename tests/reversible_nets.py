"""Small networks for the tests of reversible blocks, and the same networks with every activation stored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from effkern.nn import DualResidualBlock, ReversibleBlock, ReversibleTransition

WIDTH = 8
Net = Callable[..., tuple[Tensor, Tensor]]


class Branch(nn.Module):
    """A residual branch with an optional conditioning, dropout, and small weights as after training."""

    def __init__(self, width: int = WIDTH, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, condition: Tensor | None = None, *, scale: Tensor | None = None) -> Tensor:
        hidden = torch.tanh(self.up(self.norm(x)))
        out = self.down(self.dropout(hidden))
        if condition is not None:
            out = out * condition
        return out if scale is None else out * scale


class Plain(nn.Module):
    """A branch that takes nothing but its input."""

    def __init__(self, width: int = WIDTH, dropout: float = 0.0) -> None:
        super().__init__()
        self.branch = Branch(width, dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x)


def blocks(depth: int, width: int = WIDTH, dropout: float = 0.0) -> list[nn.Module]:
    return [ReversibleBlock(Branch(width, dropout), Plain(width, dropout)) for _ in range(depth)]


def stored(parts: Iterable[nn.Module], x1: Tensor, x2: Tensor, **kwargs: Tensor) -> tuple[Tensor, Tensor]:
    """The stack as autograd runs it by itself; side inputs go to `f`."""
    for block in parts:
        if isinstance(block, ReversibleBlock):
            x1 = x1 + block.f(x2, **kwargs)
            x2 = x2 + block.g(x1)
        elif isinstance(block, DualResidualBlock):
            x1, x2 = block.f(x1, **kwargs) + block.alpha * x1 + x2, block.beta * x1
        else:
            assert isinstance(block, ReversibleTransition)
            x1, x2 = block.f(x1), (block.f if block.g is None else block.g)(x2)
    return x1, x2


def gradients(
    net: Net, module: nn.Module, inputs: Sequence[Tensor], **kwargs: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and gradients of a loss in which every entry counts differently: inputs, side inputs, parameters."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    sides = {name: x.detach().clone().requires_grad_() for name, x in kwargs.items()}
    module.zero_grad()
    y1, y2 = net(*leaves, **sides)
    weight = torch.linspace(0.5, 1.5, y1.numel(), dtype=y1.dtype).view_as(y1)
    ((y1 * weight).sum() + (y2 * y2 * weight).sum()).backward()
    found = [*leaves, *sides.values(), *module.parameters()]
    assert all(t.grad is not None for t in found)
    return [y1.detach(), y2.detach()], [t.grad.clone() for t in found]


def assert_same(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-10) -> None:
    """Equal to `tolerance` relative to the largest entry of each tensor."""
    assert len(found) == len(expected)
    for place, (a, b) in enumerate(zip(found, expected)):
        error = (a - b).abs().max().item() / max(b.abs().max().item(), 1.0)
        assert error <= tolerance, f"tensor {place} is off by {error:.3g}"


def two(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(*shape, dtype=dtype), torch.randn(*shape, dtype=dtype)
