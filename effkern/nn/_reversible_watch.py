"""Looking on while blocks run: forward, RECOVER and GRADS of each. `effkern.reversible.timeline` does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from effkern.nn._reversible_engine import Step

Kind = Literal["forward", "recover", "gradients"]


class Watcher(Protocol):
    serial: bool  # one after the other whatever the schedule, so that each can be timed alone

    def span(self, kind: Kind, step: Step) -> AbstractContextManager[Any]: ...


# One for the process: a backward pass runs in other threads than the one that asks for it.
_watcher: Watcher | None = None


def span(kind: Kind, step: Step) -> AbstractContextManager[Any]:
    """Around a piece of work; nothing where nobody looks on."""
    return contextlib.nullcontext() if _watcher is None else _watcher.span(kind, step)


def watched() -> bool:
    return _watcher is not None


def serial() -> bool:
    return _watcher is not None and _watcher.serial


@contextlib.contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    global _watcher
    if _watcher is not None:
        raise RuntimeError("timeline: another one is being taken")
    _watcher = watcher
    try:
        yield
    finally:
        _watcher = None
