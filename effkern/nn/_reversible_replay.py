"""What a second run of a sub-block needs in order to be the first one again: random numbers, autocast, hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

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


def drawn_since(before: RngState, device: torch.device) -> RngState | None:
    """`before` where random numbers were drawn since; None saves its memory and the replay."""
    now = rng_state(device)
    return None if all(torch.equal(before[key], now[key]) for key in before) else before


@contextlib.contextmanager
def replayed_rng(states: RngState | None, device: torch.device) -> Iterator[None]:
    """Draws the numbers that followed `states`, then puts the generators back to where the user has them."""
    if states is None:
        yield
        return
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

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for kind, enabled, dtype in self.states:
                if enabled or torch.is_autocast_enabled(kind):
                    # No cache: a cast weight that one stream has made may not be ready on another.
                    stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
            yield


@contextlib.contextmanager
def without_hooks(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Tensor hooks of parameters run when autograd receives the block's gradient, not already inside the block."""
    hooked = [p._backward_hooks for p in parameters if p._backward_hooks]
    saved = [dict(hooks) for hooks in hooked]
    for hooks in hooked:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, entries in zip(hooked, saved):
            hooks.update(entries)
