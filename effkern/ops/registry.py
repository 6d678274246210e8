"""What the tests, the harness and `effkern doctor` need to know about an op, declared by its family.

A module of `effkern.ops` calls `register(OpSpec(...))` once per public op; nothing else has to list it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

import effkern.ops


@dataclass(frozen=True)
class Sample:
    """One call of a public op: `public(*args, **kwargs)`; `reference(*args, **kwargs)` is its oracle."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BadSample(Sample):
    """A call that must raise `error` with a message that matches the regular expression `match`."""

    error: type[Exception] = RuntimeError
    match: str = ""


@dataclass(frozen=True)
class Backend:
    """One way to run an op. `refusal` says why it cannot serve a request, or None when it can."""

    name: str
    devices: tuple[str, ...]  # empty: any device
    refusal: Callable[[str, torch.dtype, Mapping[str, int]], str | None]
    note: str = ""  # what a user should know before relying on it
    automatic: bool = True  # whether it may be chosen without being asked for


@dataclass(frozen=True)
class OpSpec:
    """One public op. `backends` stand in order of preference; `sizes` are the ones a report is made for."""

    name: str
    family: str
    public: Callable[..., Any]
    reference: Callable[..., Any]
    schemas: tuple[str, ...]  # the dispatcher ops behind it: "attention", "attention_backward", ...
    backends: tuple[Backend, ...]
    dtypes: tuple[torch.dtype, ...]
    sizes: Mapping[str, int]
    samples: Callable[[str, torch.dtype], list[Sample]]  # (device, dtype) -> calls that must work
    bad_samples: Callable[[str], list[BadSample]]
    calls: Callable[[Sample], list[tuple[str, tuple[Any, ...]]]]  # the dispatcher calls a sample leads to
    flops: Callable[..., int]
    bytes: Callable[..., int]
    double_backward: (
        str  # what the error of a second differentiation must say; "" for an op without gradients
    )
    constants: tuple[str, ...] = ()  # floating arguments, given by keyword, that have no gradient
    autocast: bool = True  # whether the positional arguments follow autocast
    batched: tuple[int, ...] | None = (
        None  # positions of the arguments whose first axis counts cases; None: all
    )
    vmap: bool = True  # torch.vmap has no way to loop over an op with lists of tensors


_SPECS: dict[str, OpSpec] = {}


def register(spec: OpSpec) -> OpSpec:
    if spec.name in _SPECS:
        raise ValueError(f"op {spec.name} is registered twice")
    _SPECS[spec.name] = spec
    return spec


def discover() -> None:
    """Imports every family of `effkern.ops`, which registers what it has."""
    for module in pkgutil.iter_modules(effkern.ops.__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"effkern.ops.{module.name}")


def specs() -> tuple[OpSpec, ...]:
    """Every registered op, by name."""
    return tuple(_SPECS[name] for name in sorted(_SPECS))


def get(name: str) -> OpSpec:
    if name not in _SPECS:
        raise KeyError(f"no op named {name}; there are {', '.join(sorted(_SPECS))}")
    return _SPECS[name]
