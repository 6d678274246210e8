"""Interleaved timing: every candidate takes its turn in every round, so drift of the machine hits all."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

Thunk = Callable[[], object]
Context = Callable[[], contextlib.AbstractContextManager[object]]

# One sample spans at least this long; a shorter call is repeated inside the sample (over rotating inputs).
SAMPLE_SECONDS = 0.4e-3
# Head start of the host over the GPU, in clock cycles: event pairs around a short kernel would otherwise time
# the gap in which the GPU waits for the host.
GPU_HEAD_START_CYCLES = 1_000_000


@dataclass(frozen=True)
class Candidate:
    """One implementation: a thunk per input set, and a `context` that is entered outside the timing. One that is timed
    `once` takes part in the first round only, and has run before: it gets no warm-up."""

    name: str
    thunks: Sequence[Thunk]
    context: Context = contextlib.nullcontext
    once: bool = False


@dataclass
class Timing:
    samples_ms: list[float] = field(default_factory=list)

    @property
    def median_ms(self) -> float:
        return statistics.median(self.samples_ms)

    @property
    def p10_ms(self) -> float:
        return self._deciles()[0]

    @property
    def p90_ms(self) -> float:
        return self._deciles()[-1]

    def _deciles(self) -> list[float]:
        if len(self.samples_ms) == 1:
            return self.samples_ms
        return statistics.quantiles(self.samples_ms, n=10, method="inclusive")


def interleave(
    candidates: Sequence[Candidate],
    device: torch.device,
    *,
    seconds: float,
    min_rounds: int = 5,
    max_rounds: int = 200,
) -> dict[str, Timing]:
    """Time the candidates round-robin for about `seconds` in all, after a warm-up that sizes the samples.

    The candidates walk the input sets at a distance from each other, so that none finds the inputs another
    one has just pulled into the cache, and the order inside a round rotates, so that none always runs after
    the same neighbour.
    """
    estimate = {c.name: SAMPLE_SECONDS if c.once else _warm_up(c, device) for c in candidates}
    repeats = {name: max(1, round(SAMPLE_SECONDS / max(t, 1e-9))) for name, t in estimate.items()}
    timings = {c.name: Timing() for c in candidates}
    cursor = {c.name: i * len(c.thunks) // len(candidates) for i, c in enumerate(candidates)}
    end = time.perf_counter() + seconds
    with _no_gc():
        for turn in range(max_rounds):
            if turn >= min_rounds and time.perf_counter() > end:
                break
            for position in range(len(candidates)):
                candidate = candidates[(turn + position) % len(candidates)]
                if candidate.once and turn > 0:
                    continue
                count = repeats[candidate.name]
                start = cursor[candidate.name]
                calls = [candidate.thunks[(start + i) % len(candidate.thunks)] for i in range(count)]
                cursor[candidate.name] = start + count
                with candidate.context():
                    sample = _sample_ms(calls, device)
                timings[candidate.name].samples_ms.append(sample / count)
                if candidate.once:
                    end += sample * 1e-3  # it takes nothing from the time of the others
    return timings


def timed_ms(call: Thunk, device: torch.device) -> tuple[float, object]:
    """Wall time of one call, device work included, and its result: for the first call of a kernel."""
    _synchronize(device)
    start = time.perf_counter()
    result = call()
    _synchronize(device)
    return (time.perf_counter() - start) * 1e3, result


def host_us(call: Thunk, device: torch.device, *, seconds: float = 0.3) -> float:
    """Host time of a call in microseconds: enqueueing on a GPU, a call on a tiny shape on the CPU.

    With one thread: those of a parallel loop over a tiny tensor would otherwise be most of what is measured.
    """
    samples: list[float] = []
    calls = 1
    with _no_gc(), _one_thread():
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(samples) < 3:
            _synchronize(device)
            start = time.perf_counter()
            for _ in range(calls):
                call()
            samples.append((time.perf_counter() - start) / calls)
            # The first samples warm up, and find how many calls make a sample long against the clock
            if calls < 40 and samples[-1] * calls < 1e-3:
                calls, samples = 2 * calls, []
    _synchronize(device)
    return statistics.median(samples) * 1e6


def _warm_up(candidate: Candidate, device: torch.device) -> float:
    """Seconds a call takes once warm. The first call is thrown away, unless the candidate is slow."""
    with candidate.context():
        first, _ = timed_ms(candidate.thunks[0], device)
        if first > 200:
            return first * 1e-3
        best = min(timed_ms(candidate.thunks[i % len(candidate.thunks)], device)[0] for i in range(1, 4))
    return best * 1e-3


def _sample_ms(calls: Sequence[Thunk], device: torch.device) -> float:
    if device.type == "cuda":
        return _sample_cuda_ms(calls)
    start = time.perf_counter_ns()
    for call in calls:
        call()
    return (time.perf_counter_ns() - start) * 1e-6


def _sample_cuda_ms(calls: Sequence[Thunk]) -> float:
    begin = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(GPU_HEAD_START_CYCLES)
    begin.record()
    for call in calls:
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _no_gc() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
