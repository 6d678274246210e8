"""What a second run needs in order to be the first one again: random numbers, autocast, forced backends, hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effkern import backends

RngState = dict[torch.device, Tensor]


def rng_state(device: torch.device) -> RngState:
    """The generators that a sub-block on `device` may draw from."""
    states = {torch.device("cpu"): torch.get_rng_state()}
    if device.type not in ("cpu", "meta"):
        states[device] = torch.get_device_module(device).get_rng_state(device)
    return states


def set_rng_state(states: RngState) -> None:
    for device, state in states.items():
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state, device)


def same_numbers(before: RngState, now: RngState) -> bool:
    """Whether nothing was drawn in between."""
    return all(torch.equal(before[key], now[key]) for key in before)


@contextlib.contextmanager
def replayed_rng(states: RngState, device: torch.device) -> Iterator[None]:
    """Draws the numbers that followed `states`, then puts the generators back to where the user has them."""
    current = rng_state(device)
    set_rng_state(states)
    try:
        yield
    finally:
        set_rng_state(current)


@dataclass(frozen=True)
class Autocast:
    """The autocast state of the forward pass: (device type, enabled, dtype) for the CPU and the device of the data."""

    states: tuple[tuple[str, bool, torch.dtype], ...]

    @classmethod
    def now(cls, device: torch.device) -> Autocast:
        kinds = {"cpu", device.type} - {"meta"}
        return cls(
            tuple((k, torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in sorted(kinds))
        )

    def replayed(self) -> AbstractContextManager[Any]:
        if not any(enabled or torch.is_autocast_enabled(kind) for kind, enabled, _ in self.states):
            return contextlib.nullcontext()
        stack = contextlib.ExitStack()
        for kind, enabled, dtype in self.states:
            # No cache: a cast weight that one stream has made may not be ready on another.
            stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
        return stack


def forced_again(name: str | None) -> AbstractContextManager[Any]:
    """The backend in force in the forward pass."""
    return contextlib.nullcontext() if name == backends.forced() else backends.force(name)


def without_hooks(parameters: Iterable[Tensor]) -> AbstractContextManager[Any]:
    """Tensor hooks of parameters run when autograd receives the block's gradient, not already inside the block."""
    hooked = [p._backward_hooks for p in parameters if p._backward_hooks]
    return _emptied(hooked) if hooked else contextlib.nullcontext()


@contextlib.contextmanager
def _emptied(dicts: list[dict[int, Any]]) -> Iterator[None]:
    saved = [dict(entries) for entries in dicts]
    for entries in dicts:
        entries.clear()
    try:
        yield
    finally:
        for entries, before in zip(dicts, saved):
            entries.update(before)
