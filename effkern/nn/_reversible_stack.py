"""Residual blocks of a pretrained model as dual-residual ones, called as a single one of them was."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from effkern._residual_trace import Call, Marker, Residual, same
from effkern.nn._reversible_sides import opaque
from effkern.nn.dual_residual import DualResidualBlock
from effkern.nn.reversible_sequence import ReversibleSequence

_OWNER = "ReversibleStack"
# By custom different for every block; one call of the stack cannot know the others'.
_PER_BLOCK = frozenset({"layer_past", "head_mask", "layer_head_mask"})


class ReversibleStack(nn.Module):
    """Residual blocks that were called one after the other; `effkern.convert.reversible` makes it.

    Calling it:
        stack(x, *args, **kwargs), as one of the blocks was called, returns what the last of them did: a tensor, or a
        tuple of it and None. Arguments that the blocks handed to their children are handed on, and get gradients.

    Raises:
        TypeError: an argument that the blocks used in another way than to hand it to a child, or that differs from
            block to block, is not its default.
        RuntimeError: an argument is an object that a call may change, as a cache of keys, while gradients are recorded.
    """

    def __init__(self, blocks: Sequence[nn.Module], traces: Sequence[Residual], **options: Any) -> None:
        super().__init__()
        first = traces[0]
        self._signature, self._nones = first.signature, first.nones
        self._passed, self._extra = stack_key(first)
        branches = [
            DualResidualBlock(ResidualBranch(block, trace, index), options["alpha"], options["beta"])
            for block, trace in zip(blocks, traces)
            for index in range(len(trace.branches))
        ]
        kept = {name: value for name, value in options.items() if name not in ("alpha", "beta")}
        self.sequence = ReversibleSequence(branches, **kept)
        for module in (self, self.sequence, self.sequence.blocks, *branches, *(b.f for b in branches)):
            module.training = blocks[0].training  # not that of the blocks' children, which may be frozen

    @property
    def arguments(self) -> tuple[str, ...]:
        """The arguments that are handed on, without those that the blocks have no names for."""
        return tuple(sorted(self._passed))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor | None, ...]:
        (_, x), *others = self._signature.bind(*args, **kwargs).arguments.items()
        sides: dict[str, Any] = {}
        for name, value in others:
            parameter = self._signature.parameters[name]
            if parameter.kind is parameter.VAR_KEYWORD:
                for key, extra in value.items():
                    self._take(sides, key, extra, None, self._extra)
            else:
                value = value or None if parameter.kind is parameter.VAR_POSITIONAL else value
                self._take(sides, name, value, parameter.default, name in self._passed)
        out, _ = self.sequence(x, **sides)
        return out if self._nones is None else (out, *[None] * self._nones)

    def _take(self, sides: dict[str, Any], name: str, value: Any, default: Any, passed: bool) -> None:
        if not passed:
            default = None if default is inspect.Parameter.empty else default
            off = (value is None or value is False) and (default is None or default is False)
            if not (off or same(value, default)):
                raise TypeError(
                    f"{_OWNER}: argument {name!r} must be {default!r}, got {type(value).__name__}: the blocks do more "
                    "with it than to hand it to a child, or each has its own"
                )
            return
        odd = opaque(value)
        if odd is not None and torch.is_grad_enabled():
            raise RuntimeError(
                f"{_OWNER}: argument {name!r} holds a {type(odd).__name__}, which a second run of the blocks may "
                "find changed by the first; leave caches out while training (use_cache=False)"
            )
        sides[name] = value

    def extra_repr(self) -> str:
        return f"arguments={', '.join(self.arguments)}"


def stack_key(trace: Residual) -> tuple[frozenset[str], bool]:
    """The arguments that blocks of this kind hand on, and whether those that they do not name too."""
    return frozenset(trace.places) - _PER_BLOCK, bool(trace.extra)


class ResidualBranch(nn.Module):
    """One residual branch of a block: children of the block, under their names, called as the block called them."""

    def __init__(self, block: nn.Module, trace: Residual, index: int) -> None:
        super().__init__()
        self._calls: tuple[Call, ...] = trace.branches[index]
        self._places = {
            name: [(call, key) for branch, call, key in places if branch == index]
            for name, places in trace.places.items()
        }
        self._extra = [call for branch, call in trace.extra if branch == index]
        for call in self._calls:
            self.add_module(call.child, block.get_submodule(call.child))

    def forward(self, x: Tensor, /, **sides: Any) -> Tensor:
        for index, call in enumerate(self._calls):
            given = call.given()
            for name, value in sides.items():
                known = name in self._places
                for place, key in self._places[name] if known else [(c, name) for c in self._extra]:
                    if place == index:
                        given[key] = value
            given = {key: x if value is Marker.STREAM else value for key, value in given.items()}
            args = [given[position] for position in range(len(call.args))]
            kwargs = {key: value for key, value in given.items() if isinstance(key, str)}
            out = getattr(self, call.child)(*args, **kwargs)
            x = out[0] if call.packed else out
        return x
