"""What happens between the sub-blocks of reversible networks: forward, inverse and gradient of every kind of block.

The functions at the top are all the arithmetic there is; one pass over memory each is what a fused kernel would make of
them. The classes below arrange them around calls of the sub-blocks and know neither autograd nor streams: `call(slot,
x)` runs a sub-block, `pull(slot, gradient)` takes a gradient back through the call of the same slot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Call = Callable[[int, Tensor], Tensor]
State = tuple[Tensor, ...]


def round_to_grid(x: Tensor, q: int) -> Tensor:
    """The nearest multiple of 2^-q, ties to even, in float32."""
    return x.float().mul(2.0**q).round_().mul_(2.0**-q)


def add(x: Tensor, f: Tensor, q: int | None) -> Tensor:
    return x + (f if q is None else round_to_grid(f, q))


def subtract(y: Tensor, f: Tensor, q: int | None, dtype: torch.dtype) -> Tensor:
    """Undoes `add`; `dtype` is that of the x it was given, which a wider f has promoted."""
    return (y - (f if q is None else round_to_grid(f, q))).to(dtype)


def dual_add(f: Tensor, x: Tensor, y: Tensor, alpha: float, q: int | None) -> Tensor:
    """f + alpha x + y."""
    residual = torch.add(f, x, alpha=alpha)
    return y + (residual if q is None else round_to_grid(residual, q))


def dual_subtract(
    out: Tensor, f: Tensor, x: Tensor, alpha: float, q: int | None, dtype: torch.dtype
) -> Tensor:
    """out - f - alpha x, with the roundings of `dual_add`."""
    residual = torch.add(f, x, alpha=alpha)
    return (out - (residual if q is None else round_to_grid(residual, q))).to(dtype)


def dual_gradient(through_f: Tensor, gx: Tensor, gy: Tensor, alpha: float, beta: float) -> Tensor:
    """through_f + alpha gx + beta gy."""
    return through_f.add(gx, alpha=alpha).add_(gy, alpha=beta)


class _Grid(torch.autograd.Function):
    """`round_to_grid` whose gradient is that of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, q: int) -> Tensor:
        return round_to_grid(x, q)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def straight_through_grid(x: Tensor, q: int) -> Tensor:
    return _Grid.apply(x, q)


@dataclass(frozen=True)
class Coupling:
    """One block's algebra, with its constants as they were in the forward pass."""

    invertible = True  # otherwise the inputs are stored
    keeps_shape = True  # a sub-block must return the shape of its input

    def forward(self, call: Call, state: State) -> State:
        raise NotImplementedError

    def inverse(self, call: Call, state: State, dtypes: tuple[torch.dtype, ...]) -> State:
        """The inputs, of `dtypes`, that `forward` made `state` from; calls every slot once."""
        raise NotImplementedError

    def gradient(self, pull: Call, grads: State) -> State:
        raise NotImplementedError


@dataclass(frozen=True)
class Additive(Coupling):
    """y1 = x1 + f(x2), y2 = x2 + g(y1)."""

    q: int | None = None

    def forward(self, call: Call, state: State) -> State:
        x1, x2 = state
        y1 = add(x1, call(0, x2), self.q)
        return y1, add(x2, call(1, y1), self.q)

    def inverse(self, call: Call, state: State, dtypes: tuple[torch.dtype, ...]) -> State:
        y1, y2 = state
        x2 = subtract(y2, call(1, y1), self.q, dtypes[1])
        return subtract(y1, call(0, x2), self.q, dtypes[0]), x2

    def gradient(self, pull: Call, grads: State) -> State:
        dy1, dy2 = grads
        dx1 = dy1 + pull(1, dy2)
        return dx1, dy2 + pull(0, dx1)


@dataclass(frozen=True)
class Dual(Coupling):
    """out = f(x) + alpha x + y, kept = beta x."""

    alpha: float
    beta: float
    q: int | None = None

    def forward(self, call: Call, state: State) -> State:
        x, y = state
        # A tensor of its own also for beta = 1: what autograd returns must not be what it was given.
        kept = x.detach() if self.beta == 1 else x * self.beta
        return dual_add(call(0, x), x, y, self.alpha, self.q), kept

    def inverse(self, call: Call, state: State, dtypes: tuple[torch.dtype, ...]) -> State:
        out, kept = state
        x = (kept if self.beta == 1 else kept / self.beta).to(dtypes[0])
        return x, dual_subtract(out, call(0, x), x, self.alpha, self.q, dtypes[1])

    def gradient(self, pull: Call, grads: State) -> State:
        gx, gy = grads
        return dual_gradient(pull(0, gx), gx, gy, self.alpha, self.beta), gx


@dataclass(frozen=True)
class Streamwise(Coupling):
    """y1 = f(x1), y2 = g(x2): a transition between stages, or one stream through an ordinary block."""

    invertible = False
    keeps_shape = False
    q: int | None = None

    def forward(self, call: Call, state: State) -> State:
        outs = (call(slot, x) for slot, x in enumerate(state))
        return tuple(out if self.q is None else round_to_grid(out, self.q) for out in outs)

    def gradient(self, pull: Call, grads: State) -> State:
        return tuple(pull(slot, grad) for slot, grad in enumerate(grads))
