"""Where RECOVER and GRADS of the blocks run: one after the other, on two streams, or with a second thread."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from effkern.nn import _reversible_watch as watch
from effkern.nn._reversible_step import Replay, Source, Step

if TYPE_CHECKING:
    from effkern.nn._reversible_couplings import State
    from effkern.nn._reversible_engine import Tape

_GAIN = 0.95  # a second thread has to be this much faster to be taken


@dataclass(frozen=True)
class Promise:
    """A RECOVER that another thread runs."""

    step: Step
    future: Future[Replay]

    def replay(self) -> Replay:
        return self.future.result()


class Schedule:
    """One block after the other, and within a block one sub-block after the other: the graphs of one at a time."""

    def __init__(self, report: Callable[[type[Schedule], float], None] | None = None) -> None:
        self._report = report

    def run(
        self, tape: Tape, here: Source | Replay | Promise, before: Source | None, grads: State
    ) -> tuple[Tensor | None, ...]:
        """The gradients of block `here`; leaves in `tape.waiting` what the node of `before` starts from."""
        if isinstance(here, Source) and not watch.watched():
            replay, found = here.unwind(grads)
        else:  # whoever looks on sees RECOVER and GRADS apart
            replay = here.replay()
            found = replay.gradients(grads)
        if before is not None:
            tape.waiting[before.step.index] = _follow(before, replay)
        return found

    def finished(self, seconds: float, size: int) -> None:
        """Told how long the backward pass of the stack took, and the numbers in one of its states."""
        if self._report is not None:
            self._report(type(self), seconds / max(size, 1))


def _follow(before: Source, replay: Replay) -> Source:
    """`before` with the state it starts from: the inputs that `replay` has found, unless it has stored ones."""
    if not before.step.stored:
        before.state = replay.state
    return before


class Streams(Protocol):
    """What the two-stream schedule needs of a device; tests record the calls instead."""

    def current(self) -> Any: ...
    def side(self) -> Any: ...
    def use(self, stream: Any) -> AbstractContextManager[Any]: ...
    def record(self, stream: Any) -> Any: ...
    def wait(self, stream: Any, event: Any) -> None: ...
    def keep(self, tensor: Tensor, stream: Any) -> None: ...


class CudaStreams:
    """The current stream, one side stream a device, and events between them; the host never waits."""

    _sides: dict[torch.device, torch.cuda.Stream] = {}  # noqa: RUF012 - one for the process: streams own memory pools

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def current(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device)

    def side(self) -> torch.cuda.Stream:
        if self._device not in self._sides:
            self._sides[self._device] = torch.cuda.Stream(self._device)
        return self._sides[self._device]

    def use(self, stream: torch.cuda.Stream) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream)

    def record(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        return stream.record_event()

    def wait(self, stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        stream.wait_event(event)

    def keep(self, tensor: Tensor, stream: torch.cuda.Stream) -> None:
        if tensor.is_cuda:
            tensor.record_stream(stream)


class TwoStreams(Schedule):
    """GRADS(i) on one stream, RECOVER(i - 1) on the other.

    Autograd runs a backward node on the stream of its forward, so RECOVER and GRADS of a block share a stream and
    neighbours alternate. Counted from the last block, which is on the caller's stream: then nothing depends on the
    number of blocks being even. The caller's stream waits for every GRADS before its results are returned.
    """

    def __init__(self, streams: Streams) -> None:
        super().__init__()
        self._streams = streams

    def run(
        self, tape: Tape, here: Source | Replay | Promise, before: Source | None, grads: State
    ) -> tuple[Tensor | None, ...]:
        streams = self._streams
        main, side = streams.current(), streams.side()
        step = here.step
        last_block = step is tape.steps[-1]  # with which backward begins
        own, other = (main, side) if (tape.count - 1 - step.index) % 2 == 0 else (side, main)
        arrived = streams.record(main)
        replay = here.replay()
        if last_block:
            replay.ready = streams.record(main)
        if before is not None:
            following = _follow(before, replay)
            if last_block or not before.step.stored:
                streams.wait(other, replay.ready if not before.step.stored else arrived)
            for tensor in (*following.state, *following.sides):
                streams.keep(tensor, other)
            with streams.use(other):
                following.prepare()
                recovered = following.recover()
            recovered.ready = streams.record(other)
            tape.waiting[before.step.index] = recovered
        if own is main:
            return replay.gradients(grads)
        streams.wait(own, arrived)
        for tensor in grads:
            streams.keep(tensor, own)
        with streams.use(own):
            found = replay.gradients(grads)
        streams.wait(main, streams.record(own))
        for result in found:
            if result is not None:
                streams.keep(result, main)
        return found


class Worker(Schedule):
    """RECOVER(i - 1) in a second thread while this one runs GRADS(i), for CPUs with cores to spare.

    There is one such thread in a process. Where it has work, as for a stack around this one, or is itself the thread
    that asks, blocks run one after the other: waiting for it could be waiting for oneself.
    """

    _pool: ThreadPoolExecutor | None = None
    _idle = threading.Lock()

    def run(
        self, tape: Tape, here: Source | Replay | Promise, before: Source | None, grads: State
    ) -> tuple[Tensor | None, ...]:
        replay = here.replay()
        if before is not None:
            following = _follow(before, replay)
            # What moves the generators of the process for a while is not to run beside other work.
            alone = before.step.alone() or not Worker._idle.acquire(blocking=False)
            tape.waiting[before.step.index] = following if alone else self._promise(following)
        return replay.gradients(grads)

    @staticmethod
    def _promise(source: Source) -> Promise:
        idle = Worker._idle

        def recover() -> Replay:
            try:
                return source.recover()
            finally:
                idle.release()

        try:
            source.prepare()
            if Worker._pool is None:
                Worker._pool = ThreadPoolExecutor(1, "effkern-recover")
            return Promise(source.step, Worker._pool.submit(recover))
        except BaseException:
            idle.release()
            raise

    @staticmethod
    def forget() -> None:
        """The thread: a forked process has none, whatever its memory says."""
        Worker._pool, Worker._idle = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=Worker.forget)


class Probe:
    """Decides for the CPU: times backward passes of either kind, the first of each to warm up, and keeps the faster."""

    _TRIALS = (Schedule, Worker, Schedule, Worker)

    def __init__(self) -> None:
        self.choice: type[Schedule] | None = None
        self.seconds: list[float] = []  # of the trials, per number in a state

    def schedule(self) -> Schedule:
        if self.choice is not None:
            return self.choice()
        return self._TRIALS[len(self.seconds)](self._record)

    def _record(self, kind: type[Schedule], seconds: float) -> None:
        # Passes that overlap in time, as several forward passes before one backward, may be of a kind already timed.
        if self.choice is not None or kind is not self._TRIALS[len(self.seconds)]:
            return
        self.seconds.append(seconds)
        if len(self.seconds) == len(self._TRIALS):
            self.choice = Worker if self.seconds[3] < _GAIN * self.seconds[2] else Schedule


def check_overlap(owner: str, overlap: Any) -> None:
    if not (isinstance(overlap, bool) or overlap == "auto"):
        raise ValueError(f"{owner}: overlap must be 'auto', True or False, got {overlap!r}")


def choose(device: torch.device, overlap: bool | str, probe: Probe) -> Schedule:
    """The schedule for data on `device`; "auto" is what `probe` finds to be faster on a CPU, and no overlap elsewhere.

    Two streams have not run on hardware yet, and nothing unverified is chosen for users.
    """
    if overlap is False or watch.serial():
        return Schedule()
    if device.type == "cuda":
        return TwoStreams(CudaStreams(device)) if overlap is True else Schedule()
    if device.type != "cpu":
        return Schedule()
    return Worker() if overlap is True else probe.schedule()
