"""Extra arguments of reversible blocks: to which sub-blocks they go, and their tensors where autograd can see them."""

from __future__ import annotations

import enum
import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from effkern.masks import Mask

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class _Signature:
    names: tuple[str, ...]  # that can be given by position, after the input
    keywords: frozenset[str]
    any_position: bool
    any_keyword: bool

    def takes(self, name: str) -> bool:
        return self.any_keyword or name in self.keywords


def _read(function: Callable[..., Any], skip: int) -> _Signature:
    parameters = list(inspect.signature(function).parameters.values())
    kinds = [p.kind for p in parameters]
    extra = parameters[skip:]
    named = [p.name for p in extra if p.kind is p.POSITIONAL_OR_KEYWORD]
    only = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    nameless = any(p.kind is p.POSITIONAL_ONLY for p in extra)  # and then those after it are not the first
    return _Signature(
        () if nameless else tuple(named),
        frozenset(named + only),
        inspect.Parameter.VAR_POSITIONAL in kinds,
        inspect.Parameter.VAR_KEYWORD in kinds,
    )


_read_once = functools.lru_cache(maxsize=256)(_read)


def _signature(module: nn.Module) -> _Signature:
    # A compiled module takes anything and hands it to the one it was made from.
    forward = getattr(module, "_orig_mod", module).forward
    function = getattr(forward, "__func__", None)
    return _read(forward, 1) if function is None else _read_once(function, 2)


def named(
    owner: str, modules: Iterable[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Arguments:
    """The extra arguments with names; TypeError for one that none of the sub-blocks `modules` takes.

    Positional ones get the names that the first sub-block with enough parameters has for them. Where none has names
    they stay positional, for the sub-blocks with *args.
    """
    if not args and not kwargs:
        return args, kwargs
    signatures = [_signature(module) for module in modules]
    if args:
        names = next((s.names[: len(args)] for s in signatures if len(s.names) >= len(args)), None)
        if names is not None:
            twice = set(names) & set(kwargs)
            if twice:
                raise TypeError(f"{owner}: argument {min(twice)!r} is given by position and by name")
            args, kwargs = (), {**dict(zip(names, args)), **kwargs}
        elif not any(s.any_position for s in signatures):
            raise TypeError(f"{owner}: no sub-block takes {len(args)} extra positional argument(s)")
    for name in kwargs:
        if not any(s.takes(name) for s in signatures):
            raise TypeError(f"{owner}: no sub-block takes an argument named {name!r}")
    return args, kwargs


def accepted(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """What of `named` arguments the sub-block takes."""
    if not args and not kwargs:
        return args, kwargs
    signature = _signature(module)
    kept = {name: value for name, value in kwargs.items() if signature.takes(name)}
    return (args if signature.any_position else ()), kept


# What a second run finds as the first one did, and nothing in it that autograd would have to know.
_PLAIN = (
    *(Tensor, Mask, bool, int, float, complex, str, bytes, type(None), enum.Enum, slice, range),
    *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
)


def opaque(value: Any) -> Any:
    """An object in `value` that may hold tensors or change; None where there is none."""
    for leaf in pytree.tree_leaves(value):
        # Functions without a closure hold nothing.
        if not (
            isinstance(leaf, _PLAIN) or (inspect.isroutine(leaf) and not getattr(leaf, "__closure__", None))
        ):
            return leaf
    return None


class Sides:
    """The arguments of a block's sub-blocks, with their tensors taken out so that autograd can see and save them."""

    def __init__(self, calls: Sequence[Arguments]) -> None:
        self.tensors: list[Tensor] = []
        self._calls = calls
        # Most blocks have none; flattening would then be a good part of what a block costs on the host.
        self._empty = not any(args or kwargs for args, kwargs in calls)
        if self._empty:
            return
        leaves, self._spec = pytree.tree_flatten(list(calls))
        unique = {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}
        self.tensors = list(unique.values())
        places = {key: place for place, key in enumerate(unique)}
        self._places = [places.get(id(leaf)) for leaf in leaves]
        # The tensors themselves are autograd's to keep.
        self._leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._calls = ()
        self._odd = next((leaf for leaf in self._leaves if opaque(leaf) is not None), None)

    def check(self, label: str) -> None:
        """TypeError where tensors may hide from autograd."""
        if not self._empty and self._odd is not None:
            raise TypeError(
                f"{label}: an extra argument holds a {type(self._odd).__name__}, whose tensors would get no gradients; "
                "pass the tensors themselves, or in tuples, lists and dicts"
            )

    def calls(self, tensors: Sequence[Tensor]) -> Sequence[Arguments]:
        """The arguments with `tensors` in the places of `self.tensors`."""
        if self._empty:
            return self._calls
        leaves = [
            leaf if place is None else tensors[place] for leaf, place in zip(self._leaves, self._places)
        ]
        return pytree.tree_unflatten(leaves, self._spec)
