"""Reversible networks: blocks whose inputs are computed from their outputs, so that no activation is stored."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from effkern.nn import _reversible_schedule as schedules
from effkern.nn._reversible_couplings import Additive, Coupling, Streamwise
from effkern.nn._reversible_engine import Tape
from effkern.nn._reversible_sides import accepted, named


class Coupled(nn.Module):
    """A block of two streams; subclasses name their sub-blocks and their coupling."""

    def parts(self) -> list[tuple[str, nn.Module]]:
        """The sub-blocks, in the order of the coupling's slots, with their names."""
        raise NotImplementedError

    def coupling(self, q: int | None) -> Coupling:
        """The block's algebra as it is now; `q` is that of `ReversibleSequence(exact=q)`."""
        raise NotImplementedError

    def forward(
        self, x1: Tensor, x2: Tensor, *args: Any, _tape: Tape | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        parts = self.parts()
        if _tape is None:
            owner = type(self).__name__
            check_streams(owner, x1, x2)
            args, kwargs = named(owner, [part for _, part in parts], args, kwargs)
            _tape = Tape(owner, 1, schedules.Schedule())
        calls = [accepted(part, args, kwargs) for _, part in parts]
        y1, y2 = _tape.run(self, self.coupling(_tape.q), parts, (x1, x2), calls)
        return y1, y2


class ReversibleBlock(Coupled):
    """A residual block of two streams that is undone by two subtractions.

        y1 = x1 + f(x2)        y2 = x2 + g(y1)

    Backward computes x2 = y2 - g(y1) and x1 = y1 - f(x2), and differentiates f and g where it has just run them: one
    more forward pass, and no activation stored but the outputs. In a `ReversibleSequence` the outputs of the last block
    are enough for all.

    Args:
        f, g: any modules that return a floating-point tensor of the shape of their input. They run twice in a training
            step: forward hooks on them and on what is inside them fire twice, running statistics (BatchNorm) are
            updated twice. Random numbers drawn from torch's default generators are drawn again; the second run must
            not differ from the first in anything else.

    Calling it:
        block(x1, x2, *args, **kwargs) -> (y1, y2). x1 and x2 (any shape) of equal shape; extra arguments go to those of
        f and g that take them by name, may be nested, and get gradients. The block is differentiable in x1, x2, the
        extra tensors and the parameters, once.

    Raises:
        TypeError: f or g is no module or returns no tensor; an extra argument that neither takes, or, while gradients
            are recorded, of a class in which autograd sees no tensors.
        RuntimeError: shapes or devices do not fit; f or g changed its input in place; in backward, an output or a
            parameter was modified in place, or a parameter is another one than in the forward pass; double backward.

    Numerics:
        The recovered inputs differ from the true ones by the roundings of one addition and one subtraction in the
        dtype of the streams; `ReversibleSequence(exact=...)` makes them bit-identical.

    Source: Gomez et al. 2017 (The Reversible Residual Network), equations 6 to 8.
    """

    def __init__(self, f: nn.Module, g: nn.Module) -> None:
        super().__init__()
        check_modules("ReversibleBlock", f=f, g=g)
        self.f, self.g = f, g

    def parts(self) -> list[tuple[str, nn.Module]]:
        return [("f", self.f), ("g", self.g)]

    def coupling(self, q: int | None) -> Coupling:
        return Additive(q)


class ReversibleTransition(Coupled):
    """What is between two stages of a `ReversibleSequence`: y1 = f(x1), y2 = g(x2), any shapes, not reversible.

    Downsampling, a wider stage, a change of layout. The two inputs are stored, nothing inside f and g is. Under
    autocast the outputs are as wide as the inputs, for streams are sums of many small numbers.

    Args:
        f: module for the first stream.
        g: module for the second one; None takes f for both, with the same parameters.
    """

    def __init__(self, f: nn.Module, g: nn.Module | None = None) -> None:
        super().__init__()
        check_modules("ReversibleTransition", f=f, g=f if g is None else g)
        self.f, self.g = f, g

    def parts(self) -> list[tuple[str, nn.Module]]:
        return [("f", self.f), ("f", self.f) if self.g is None else ("g", self.g)]

    def coupling(self, q: int | None) -> Coupling:
        return Streamwise(q, streams=True)


def check_modules(owner: str, **modules: Any) -> None:
    for name, module in modules.items():
        if not isinstance(module, nn.Module):
            raise TypeError(f"{owner}: {name} must be a torch.nn.Module, got {type(module).__name__}")


def check_streams(owner: str, x1: Any, x2: Any) -> None:
    for name, x in (("x1", x1), ("x2", x2)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{owner}: {name} must be a tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise RuntimeError(f"{owner}: {name} must be of a floating dtype, got {x.dtype}")
    if x1.shape != x2.shape or x1.device != x2.device:
        raise RuntimeError(
            f"{owner}: x1 and x2 must have one shape and one device, got {tuple(x1.shape)} on {x1.device} and "
            f"{tuple(x2.shape)} on {x2.device}"
        )
