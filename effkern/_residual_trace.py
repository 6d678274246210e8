"""Finds the residual branches of a block, x = x + f(x) one after the other, by running it on stand-ins.

What a block computes is in its forward, not in the names of its children: a pre-norm and a post-norm block may have
the same ones. A stand-in takes the place of each child, computes an elementwise function of its own, and notes with
what it was called. Where the result of the block is the sum of its input and of what chains of stand-ins returned, the
chains are its branches. The real children are neither run nor changed.
"""

from __future__ import annotations

import copy
import enum
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

# What foreign code may raise over arguments that it does not know; the message becomes the reason.
_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_TUPLES = (2, 3)  # an attention may return its output with weights, and with a cache
_EXTRA = "effkern_probe"  # an argument that no forward names


class Untraceable(Exception):
    """The block is no sequence of residual branches; the message is the reason."""


class Marker(enum.Enum):
    """In place of a tensor in the arguments of a child; the one object also in a copy of it."""

    STREAM = enum.auto()


@dataclass(frozen=True)
class Call:
    """How a block calls a child: its arguments, with `Marker.STREAM` for what the child before it returned."""

    child: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    packed: bool  # the child returns a tuple, whose first is used

    def given(self) -> dict[int | str, Any]:
        """The arguments by position or name."""
        found: dict[int | str, Any] = dict(enumerate(self.args))
        found.update(self.kwargs.items())
        return found


Branch = tuple[Call, ...]
Place = tuple[int, int, int | str]  # branch, call, position or name


@dataclass(frozen=True)
class Residual:
    """A block as a sequence of residual branches."""

    branches: tuple[Branch, ...]
    nones: int | None  # the block returns (x, None, ...), with so many; None: x itself
    signature: inspect.Signature  # of its forward, without self
    places: dict[str, tuple[Place, ...]]  # where an argument of the block goes
    extra: tuple[tuple[int, int], ...]  # the calls that get arguments it has no name for


def trace(block: nn.Module) -> Residual:
    """The branches of `block`; raises `Untraceable`."""
    if "forward" in vars(block):
        raise Untraceable("its forward was replaced")
    signature = _plain_signature(block)
    _, *parameters = signature.parameters.values()
    # An argument without a default is left out as most callers mean it.
    given = {p.name: None for p in parameters if p.default is p.empty and p.kind in _NAMED}
    tuples = _which_return_tuples(block, given)
    branches, nones = _both_modes(block, tuples, given)
    places: dict[str, tuple[Place, ...]] = {}
    extra: tuple[tuple[int, int], ...] = ()
    for parameter in parameters:
        name = parameter.name if parameter.kind in _NAMED else _EXTRA
        if parameter.kind is parameter.VAR_POSITIONAL:
            continue
        sent = object()
        try:
            found, same = _both_modes(block, tuples, {**given, name: sent})
            where = _places(branches, found, sent)
        except Untraceable:
            continue  # it changes what the block computes
        if same != nones or not where:
            continue
        if name == _EXTRA:
            extra = tuple((branch, call) for branch, call, key in where if key == _EXTRA)
        else:
            places[name] = where
    return Residual(branches, nones, signature, places, extra)


_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _plain_signature(block: nn.Module) -> inspect.Signature:
    signature = inspect.signature(block.forward)
    # Without annotations it can be pickled wherever the block can.
    plain = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    if not plain or plain[0].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
        raise Untraceable("its forward does not name its input")
    return signature.replace(parameters=plain, return_annotation=signature.empty)


@dataclass
class _Seen:
    """A call of a stand-in. Tensors are told apart as objects; the copies show what was changed since."""

    call: Call
    x: Tensor
    x_then: Tensor
    out: Tensor
    out_then: Tensor


@dataclass
class _Recorder:
    tuples: Mapping[str, int]
    seen: list[_Seen] = field(default_factory=list)

    def run(self, child: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = {id(t): t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)}
        leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if len(tensors) != 1 or any(id(leaf) not in tensors for leaf in leaves):
            raise Untraceable(f"{child} is called with {len(leaves)} tensors of the block")
        (x,) = tensors.values()
        out = torch.sin(x + len(self.seen) + 1)  # another function in every call
        length = self.tuples.get(child)
        call = Call(
            child,
            tuple(Marker.STREAM if a is x else a for a in args),
            {name: Marker.STREAM if a is x else a for name, a in kwargs.items()},
            length is not None,
        )
        self.seen.append(_Seen(call, x, x.clone(), out, out.clone()))
        return out if length is None else (out, *[None] * (length - 1))


class _StandIn(nn.Module):
    def __init__(self, recorder: _Recorder, child: str) -> None:
        super().__init__()
        self.recorder, self.child = recorder, child

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.recorder.run(self.child, args, kwargs)


def _run(
    block: nn.Module, tuples: Mapping[str, int], given: Mapping[str, Any], training: bool
) -> tuple[tuple[Branch, ...], int | None]:
    recorder = _Recorder(tuples)
    probe = copy.copy(block)
    children = {
        name: None if child is None else _StandIn(recorder, name) for name, child in block._modules.items()
    }
    vars(probe).update(_modules=children, training=training)
    x = torch.linspace(-1, 1, 24, dtype=torch.float64).view(2, 3, 4)
    try:
        with torch.no_grad():
            out = probe.forward(x.clone(), **given)
    except _ERRORS as error:
        first = str(error).partition("\n")[0]
        raise Untraceable(
            f"its forward does more than add branches ({type(error).__name__}: {first})"
        ) from error
    nones = None
    if isinstance(out, tuple):
        out, *others = out
        nones = len(others)
        if any(other is not None for other in others):
            raise Untraceable("it returns more than one tensor")
    if not isinstance(out, Tensor):
        raise Untraceable(f"it returns {type(out).__name__}, not a tensor")
    return _chains(recorder.seen, x, out), nones


def _chains(seen: Sequence[_Seen], x: Tensor, out: Tensor) -> tuple[Branch, ...]:
    branches: list[list[Call]] = []
    previous: _Seen | None = None
    for here in seen:
        if previous is not None and here.x is previous.out:
            if not torch.equal(here.x_then, previous.out_then):
                raise Untraceable(
                    f"what {previous.call.child} returns is changed before {here.call.child} gets it"
                )
        else:
            if previous is not None:
                x = x + previous.out_then
            if not _close(here.x_then, x):
                raise Untraceable(f"{here.call.child} gets neither what came before it nor the sum so far")
            branches.append([])
        branches[-1].append(here.call)
        previous = here
    if previous is None:
        raise Untraceable("its forward calls none of its children")
    if not _close(out, x + previous.out_then):
        raise Untraceable("its output is not its input plus what its branches return")
    return tuple(tuple(branch) for branch in branches)


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=1e-12, atol=1e-12)


def _both_modes(
    block: nn.Module, tuples: Mapping[str, int], given: Mapping[str, Any]
) -> tuple[tuple[Branch, ...], int | None]:
    found, evaluated = (_run(block, tuples, given, training) for training in (True, False))
    _places(found[0], evaluated[0], None)
    if found[1] != evaluated[1]:
        raise Untraceable("in training it returns something else")
    return found


def _which_return_tuples(block: nn.Module, given: Mapping[str, Any]) -> dict[str, int]:
    """The children whose output the block takes out of a tuple, and how many that has: none, or one of them."""
    children = [name for name, child in block._modules.items() if child is not None]
    options = [{name: length} for name in children for length in _TUPLES]
    plain = _refusal(block, {}, given)
    if plain is None:
        return {}
    for tuples in options:
        if _refusal(block, tuples, given) is None:
            return tuples
    raise Untraceable(plain)


def _refusal(block: nn.Module, tuples: Mapping[str, int], given: Mapping[str, Any]) -> str | None:
    try:
        _run(block, tuples, given, True)
    except Untraceable as reason:
        return str(reason)
    return None


def _places(expected: Sequence[Branch], found: Sequence[Branch], sent: object) -> tuple[Place, ...]:
    """Where `sent` is in the calls of `found`, which otherwise have to be those `expected`."""
    where: list[Place] = []
    if [len(branch) for branch in expected] != [len(branch) for branch in found]:
        raise Untraceable("in training it calls other children")
    for b, (branch, again) in enumerate(zip(expected, found)):
        for c, (call, other) in enumerate(zip(branch, again)):
            known, now = call.given(), other.given()
            added = {key for key in now if key not in known}
            if call.child != other.child or known.keys() - now.keys() or added - {_EXTRA}:
                raise Untraceable("in training it calls other children")
            for key, value in now.items():
                if sent is not None and value is sent:
                    where.append((b, c, key))
                elif key in added or not same(value, known[key]):
                    raise Untraceable(f"in training it calls {call.child} with other arguments")
    return tuple(where)


def same(a: object, b: object) -> bool:
    """Whether two arguments mean the same; only of plain values can one be sure."""
    return a is b or (type(a) is type(b) and isinstance(a, (bool, int, float, str)) and a == b)
