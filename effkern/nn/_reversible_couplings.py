"""What happens between the sub-blocks of reversible networks: forward, inverse and gradient of every kind of block.

The functions at the top are all the arithmetic there is, one pass over memory each: `effkern.coupling`, or PyTorch's
own sum where there is nothing else to do. The classes below arrange them around calls of the sub-blocks and know
neither autograd nor streams: `call(slot, x)` runs a sub-block, `pull(slot, gradient)` takes a gradient back through the
call of the same slot. On a grid they also say the largest magnitude in each result, to whoever gives them a list for
it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from effkern import backends
from effkern.ops.coupling import couple

Call = Callable[[int, Tensor], Tensor]
State = tuple[Tensor, ...]
Magnitudes = list[Tensor]


def _backend(*tensors: Tensor) -> str | None:
    """The one in force for couplings too, if they have it for all tensors, else PyTorch's own operations.

    Whoever forces a backend speaks of the ops that a network calls. There is no CUDA C++ for couplings, and networks
    are not to fail because of what their blocks do between those.
    """
    name = backends.forced()
    if name is None:
        return None
    return name if all(_serves(name, t.device.type, t.dtype) for t in tensors) else "reference"


@functools.lru_cache(maxsize=64)
def _serves(name: str, device: str, dtype: torch.dtype) -> bool:
    """Asked for every sum; the answer looks for packages and devices, which do not change."""
    return name in backends.would_work("coupling", device, dtype, {})


def _coupled(
    f: Tensor, *streams: Tensor, largest: Magnitudes | None = None, q: int | None = None, **how: Any
) -> tuple[Tensor, Tensor]:
    """out and kept of `effkern.coupling`, in f's order of axes in memory: convolutions have one of their own."""
    backend = _backend(f, *streams)
    if f.is_contiguous():
        out, kept, magnitude = couple(f, *streams, q=q, backend=backend, **how)
    else:
        order = sorted(range(f.dim()), key=f.stride, reverse=True)
        back = sorted(range(f.dim()), key=order.__getitem__)
        out, kept, magnitude = couple(*(t.permute(order) for t in (f, *streams)), q=q, backend=backend, **how)
        out, kept = (t.permute(back) if t.dim() == f.dim() else t for t in (out, kept))
    if largest is not None and q is not None:
        largest.append(magnitude)
    return out, kept


def round_to_grid(x: Tensor, q: int, largest: Magnitudes | None = None) -> Tensor:
    """The nearest multiple of 2^-q, ties to even, in float32."""
    return _coupled(x, q=q, largest=largest)[0]


def _plain(a: Tensor, b: Tensor, q: int | None) -> bool:
    """Whether PyTorch's own sum is one pass: on the CPU it first makes a copy of what it has to widen."""
    return q is None and (a.dtype == b.dtype or a.device.type != "cpu")


def add(x: Tensor, f: Tensor, q: int | None, largest: Magnitudes | None = None) -> Tensor:
    return x + f if _plain(x, f, q) else _coupled(f, x, q=q, largest=largest)[0]


def subtract(y: Tensor, f: Tensor, q: int | None, dtype: torch.dtype) -> Tensor:
    """Undoes `add`; `dtype` is that of the x it was given, which a wider f has promoted."""
    return (y - f if _plain(y, f, q) else _coupled(f, y, q=q, subtract=True)[0]).to(dtype)


def dual_add(
    f: Tensor,
    x: Tensor,
    y: Tensor,
    alpha: float,
    beta: float,
    q: int | None,
    largest: Magnitudes | None = None,
) -> tuple[Tensor, Tensor]:
    """f + alpha x + y, and beta x."""
    if beta != 1:
        return _coupled(f, y, x, alpha=alpha, keep=beta, q=q, largest=largest)
    # A tensor of its own: what autograd returns must not be what it was given.
    return _coupled(f, y, x, alpha=alpha, q=q, largest=largest)[0], x.detach()


def dual_subtract(
    out: Tensor, f: Tensor, x: Tensor, alpha: float, q: int | None, dtype: torch.dtype
) -> Tensor:
    """out - f - alpha x, with the roundings of `dual_add`."""
    return _coupled(f, out, x, alpha=alpha, q=q, subtract=True)[0].to(dtype)


def dual_gradient(through_f: Tensor, gx: Tensor, gy: Tensor, alpha: float, beta: float) -> Tensor:
    """through_f + alpha gx + beta gy."""
    return _coupled(through_f, gy, gx, alpha=alpha, beta=beta)[0]


class _Grid(torch.autograd.Function):
    """`round_to_grid` whose gradient is that of the identity, and the largest magnitude in its result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, q: int) -> tuple[Tensor, Tensor]:
        largest: Magnitudes = []
        out = round_to_grid(x, q, largest)
        ctx.mark_non_differentiable(largest[0])
        return out, largest[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None]:
        return grad, None


def straight_through_grid(x: Tensor, q: int) -> tuple[Tensor, Tensor]:
    """x on the grid, differentiable as if it were x itself, and its largest magnitude."""
    return _Grid.apply(x, q)


@dataclass(frozen=True)
class Coupling:
    """One block's algebra, with its constants as they were in the forward pass."""

    keeps_shape: ClassVar[bool] = True  # a sub-block must return the shape of its input
    unwinds: ClassVar[bool] = False  # whether there is an `unwind`
    reads: ClassVar[int | None] = None  # how many of the inputs, from the first on, `rerun` needs; None: all

    @property
    def invertible(self) -> bool:
        """Otherwise the inputs are stored."""
        return True

    def forward(self, call: Call, state: State, largest: Magnitudes | None = None) -> State:
        """The outputs; on a grid `largest` gets the largest magnitude of each that is not an input as it was."""
        raise NotImplementedError

    def rerun(self, call: Call, state: State) -> None:
        """Calls every slot once, as `forward` does, for nothing but the calls."""
        raise NotImplementedError

    def inverse(self, call: Call, state: State, dtypes: tuple[torch.dtype, ...]) -> State:
        """The inputs, of `dtypes`, that `forward` made `state` from; calls every slot once."""
        raise NotImplementedError

    def gradient(self, pull: Call, grads: State) -> State:
        raise NotImplementedError

    def unwind(
        self, call: Call, pull: Call, state: State, dtypes: tuple[torch.dtype, ...], grads: State
    ) -> tuple[State, State]:
        """What `inverse` and `gradient` return, with calls and pulls in turns: one sub-block's graph at a time."""
        raise NotImplementedError


@dataclass(frozen=True)
class Additive(Coupling):
    """y1 = x1 + f(x2), y2 = x2 + g(y1)."""

    unwinds: ClassVar[bool] = True
    q: int | None = None

    def forward(self, call: Call, state: State, largest: Magnitudes | None = None) -> State:
        x1, x2 = state
        y1 = add(x1, call(0, x2), self.q, largest)
        return y1, add(x2, call(1, y1), self.q, largest)

    def rerun(self, call: Call, state: State) -> None:
        x1, x2 = state
        call(1, add(x1, call(0, x2), self.q))

    def inverse(self, call: Call, state: State, dtypes: tuple[torch.dtype, ...]) -> State:
        y1, y2 = state
        x2 = subtract(y2, call(1, y1), self.q, dtypes[1])
        return subtract(y1, call(0, x2), self.q, dtypes[0]), x2

    def gradient(self, pull: Call, grads: State) -> State:
        dy1, dy2 = grads
        dx1 = dy1 + pull(1, dy2)
        return dx1, dy2 + pull(0, dx1)

    def unwind(
        self, call: Call, pull: Call, state: State, dtypes: tuple[torch.dtype, ...], grads: State
    ) -> tuple[State, State]:
        (y1, y2), (dy1, dy2) = state, grads
        x2 = subtract(y2, call(1, y1), self.q, dtypes[1])
        dx1 = dy1 + pull(1, dy2)
        x1 = subtract(y1, call(0, x2), self.q, dtypes[0])
        return (x1, x2), (dx1, dy2 + pull(0, dx1))


@dataclass(frozen=True)
class Dual(Coupling):
    """out = f(x) + alpha x + y, kept = beta x."""

    alpha: float
    beta: float
    q: int | None = None
    reads: ClassVar[int | None] = 1

    @property
    def invertible(self) -> bool:
        return self.beta != 0

    def forward(self, call: Call, state: State, largest: Magnitudes | None = None) -> State:
        x, y = state
        return dual_add(call(0, x), x, y, self.alpha, self.beta, self.q, largest)

    def rerun(self, call: Call, state: State) -> None:
        call(0, state[0])

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

    keeps_shape: ClassVar[bool] = False
    q: int | None = None
    streams: bool = False  # whether blocks that are undone may follow

    @property
    def invertible(self) -> bool:
        return False

    def forward(self, call: Call, state: State, largest: Magnitudes | None = None) -> State:
        outs = (self._as_wide(x, call(slot, x)) for slot, x in enumerate(state))
        return tuple(out if self.q is None else round_to_grid(out, self.q, largest) for out in outs)

    def _as_wide(self, x: Tensor, out: Tensor) -> Tensor:
        """`out`, as wide as x where autocast has narrowed it: all later sums would be of the dtype of its products."""
        if not (self.streams and torch.is_autocast_enabled(x.device.type)):
            return out
        return out.to(torch.promote_types(out.dtype, x.dtype))

    def rerun(self, call: Call, state: State) -> None:
        for slot, x in enumerate(state):
            call(slot, x)

    def gradient(self, pull: Call, grads: State) -> State:
        return tuple(pull(slot, grad) for slot, grad in enumerate(grads))
