"""Streams that only write down what is asked of them, and a judge of the record: would it have been right on a GPU?

Every operation that autograd or a module runs is one entry on the stream that is current, with the memory it reads and
writes. The judge orders entries by stream order and by events, as a device would, and reports what may go wrong.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from effkern.nn._reversible_schedule import CudaStreams

Clock = dict[str, int]


@dataclass
class Entry:
    stream: str
    clock: Clock  # entries of each stream that are certainly done before this one ends
    label: str

    def after(self, other: Entry) -> bool:
        return self.clock.get(other.stream, 0) >= other.clock[other.stream]


def _host(*_: object) -> None:
    raise AssertionError("the host waits")


class Event:
    """In the place of torch.cuda.Event."""

    clock: Clock

    def __init__(self, enable_timing: bool = False) -> None:
        pass

    def record(self, stream: Stream) -> None:
        self.clock = dict(stream.recorder.clocks[stream.name])

    def wait(self, stream: Stream) -> None:
        stream.recorder.wait(stream.name, self)

    synchronize = query = _host


@dataclass(frozen=True)
class Stream:
    """In the place of torch.cuda.Stream, whose own methods it has."""

    recorder: Recorder
    name: str

    record_event, wait_event = torch.cuda.Stream.record_event, torch.cuda.Stream.wait_event
    synchronize = query = wait_stream = _host


@dataclass
class Memory:
    stream: str  # whose pool it is from
    writer: Entry
    users: dict[str, int] = field(default_factory=dict)  # last entry of each stream
    kept: set[str] = field(default_factory=set)


class Recorder(TorchDispatchMode):
    """A device for `CudaStreams` after `patch`; use it as a context manager around the whole training step."""

    def __init__(self) -> None:
        super().__init__()
        self.stream = "main"
        self.clocks: dict[str, Clock] = {"main": {"main": 0}, "side": {"side": 0}}
        self.faults: list[str] = []
        self.marks: dict[str, tuple[Entry, Entry]] = {}  # first and last entry of a stretch of work
        self._memory: dict[int, Memory] = {}
        self._stretch: list[str] = []

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> CudaStreams:
        """The real class, on streams, events and tensors that are not of a GPU."""
        cuda, self.sides = torch.cuda, 0

        def side(device: torch.device) -> Stream:
            self.sides += 1
            return Stream(self, "side")

        monkeypatch.setattr(cuda.streams, "Event", Event)
        monkeypatch.setattr(cuda, "Event", Event)
        monkeypatch.setattr(cuda, "Stream", side)
        monkeypatch.setattr(cuda, "current_stream", lambda device: Stream(self, self.stream))
        monkeypatch.setattr(cuda, "stream", lambda stream: self.use(stream.name))
        monkeypatch.setattr(cuda, "synchronize", _host)
        monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: self.keep(tensor, stream.name))
        monkeypatch.setattr(Tensor, "is_cuda", True)
        monkeypatch.setattr(CudaStreams, "_sides", {})
        return CudaStreams(torch.device("cuda", 0))

    @contextlib.contextmanager
    def use(self, stream: str) -> Iterator[None]:
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    def wait(self, stream: str, event: Event) -> None:
        clock = self.clocks[stream]
        for name, count in event.clock.items():
            clock[name] = max(clock.get(name, 0), count)

    def keep(self, tensor: Tensor, stream: str) -> None:
        memory = self._memory.get(tensor.untyped_storage()._cdata)
        if memory is not None:
            memory.kept.add(stream)

    @contextlib.contextmanager
    def stretch(self, name: str) -> Iterator[None]:
        """Entries meanwhile belong to `name`."""
        self._stretch.append(name)
        try:
            yield
        finally:
            self._stretch.pop()

    def _forget(self, key: int) -> None:
        """Memory goes back to its stream's pool, which may hand it out again: other streams must be done with it."""
        memory = self._memory.pop(key)
        done = self.clocks[memory.stream]
        for user in (name for name, count in memory.users.items() if count > done.get(name, 0)):
            if user in memory.kept:
                continue
            self.faults.append(
                f"memory of {memory.stream} is freed while {user} may use it ({memory.writer.label})"
            )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        clock = self.clocks[self.stream]
        clock[self.stream] += 1
        entry = Entry(self.stream, dict(clock), " ".join([*self._stretch, str(func)]))
        for name in self._stretch:
            self.marks[name] = (self.marks.get(name, (entry, entry))[0], entry)
        read = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for key in read:
            memory = self._memory.get(key)
            if memory is not None:
                memory.users[self.stream] = clock[self.stream]
                if not entry.after(memory.writer):
                    self.faults.append(f"{entry.label} does not wait for {memory.writer.label}")
        written = func._schema.is_mutable
        for tensor in (t for t in tree_leaves(out) if isinstance(t, Tensor)):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._memory and key not in read:  # memory from before the recording is nobody's
                self._memory[key] = Memory(self.stream, entry)
                weakref.finalize(storage, self._forget, key)
            elif written and key in self._memory:
                self._memory[key].writer = entry
        return out
