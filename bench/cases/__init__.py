"""The cases, one module a family: a module here with `cases() -> list[Case]` is found by itself."""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from ..timing import Context

Call = Callable[..., Tensor]


@dataclass(frozen=True)
class Baseline:
    """What a user would pick instead. `context` is entered around a call, outside the timed interval.

    A baseline may have weights of its own: `prepare` makes its arguments from the inputs, outside the timed interval.
    Its gradients are then those of its arguments; `results` says which of the oracle's gradients each one is, None for
    none. One that `accumulates` has its gradients in `.grad` after `backward()`, where `torch.autograd.grad` does not
    look. A call that takes very long is timed `once`.
    """

    call: Call
    context: Context = contextlib.nullcontext
    prepare: Callable[..., tuple[Any, ...]] | None = None
    results: tuple[int | None, ...] | None = None
    accumulates: bool = False
    once: bool = False


@dataclass(frozen=True)
class Oracle:
    """Exact results for the part of the outputs that `select` picks, and the errors they allow.

    `exact` is computed in float64. `composition` is the same computation in the case's dtype by plain PyTorch
    operations, every intermediate rounded: ours may be at most twice as far off, plus a floor.
    """

    select: Callable[[Sequence[Tensor]], list[Tensor]]
    exact: list[Tensor]
    composition: list[Tensor]
    note: str


@dataclass(frozen=True)
class Case(ABC):
    """One shape and dtype of one op. `--quick` times the passes in `quick`, `--full` those in `passes`."""

    name: str
    dtype: torch.dtype
    passes: tuple[str, ...]
    quick: tuple[str, ...]

    family = ""
    op = ""
    tensors_only = False  # the peak is that of torch's tensors, to the byte, and not that of the process

    @property
    @abstractmethod
    def shape(self) -> str:
        """The shape in words, as the results show it."""

    @abstractmethod
    def inputs(self, device: torch.device, seed: int) -> tuple[Tensor, ...]:
        """Plain tensors; the backward pass turns all of them into leaves that require gradients."""

    @abstractmethod
    def ours(self, backend: str | None) -> Call: ...

    def candidate(self, backend: str | None) -> Baseline:
        """Ours as it is timed, with what is prepared outside the timed interval."""
        return Baseline(self.ours(backend))

    @abstractmethod
    def baselines(self, device: torch.device, pass_: str, full: bool) -> dict[str, Baseline]: ...

    @abstractmethod
    def oracle(self, inputs: Sequence[Tensor], grad_out: Tensor | None) -> Oracle:
        """Exact output, or with `grad_out` the exact gradients of all inputs."""

    @abstractmethod
    def flops(self, pass_: str) -> float: ...

    @abstractmethod
    def bytes(self, pass_: str) -> float: ...

    def included(self, device: torch.device) -> bool:
        """Whether a run times the case on `device` though nobody asked for it by name."""
        return True

    @abstractmethod
    def tiny(self) -> Case:
        """The same op on so small a shape that a call is host overhead and little else."""


def discover() -> list[Case]:
    found: list[Case] = []
    for module in pkgutil.iter_modules(__path__):
        found += importlib.import_module(f"{__name__}.{module.name}").cases()
    return found


def choose(
    cases: Sequence[Case],
    *,
    full: bool,
    device: torch.device,
    families: Sequence[str] = (),
    pattern: str | None = None,
) -> list[tuple[Case, str]]:
    """The (case, pass) pairs of a run on `device`. A pattern looks through all cases, included or not."""
    known = {case.family for case in cases}
    for family in families:
        if family not in known:
            raise ValueError(f"bench: no family {family!r}; there are {', '.join(sorted(known))}")
    pairs = []
    for case in cases:
        if families and case.family not in families:
            continue
        if pattern is not None and not fnmatchcase(case.name, pattern):
            continue
        if pattern is None and not case.included(device):
            continue
        wanted = case.passes if full or pattern is not None else case.quick
        pairs += [(case, pass_) for pass_ in wanted]
    if not pairs:
        raise ValueError(
            f"bench: no case matches {pattern!r}" if pattern else "bench: no case is left to run"
        )
    return pairs
