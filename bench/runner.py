"""Runs the cases: verify, then time, one (case, pass) at a time, and tells a listener what happens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from effkern import backends

from . import cases as case_list
from .cases import Baseline, Case
from .end_to_end import train
from .machine import binding_roof, default_device, last_level_cache_bytes, measure_roofs, new_results
from .memory import peak_extra_bytes
from .results import Results, Row
from .timing import Candidate, Timing, host_us, interleave
from .verify import Problem, Verified

END_TO_END = "end to end on real text"
MOST_SETS = 256
# Results keep their memory while the inputs rotate; a machine with a huge cache must not run out of it.
MOST_SET_BYTES = 2 << 30


@dataclass(frozen=True)
class Options:
    full: bool = False
    families: Sequence[str] = ()
    pattern: str | None = None
    backends: Sequence[str] = ()  # empty: the automatic choice
    threads: int | None = None
    end_to_end: bool = True
    end_to_end_seconds: float = 60.0
    end_to_end_steps: int | None = None
    seconds: float = 1.2  # of timing, a pass


@dataclass
class Listener:
    """Receives what happens; the base class ignores it all."""

    def machine(self, results: Results) -> None: ...
    def begin(self, units: Sequence[tuple[str, float]]) -> None:
        """The work ahead: a name and its expected seconds each."""

    def unit(self, name: str) -> None: ...
    def step(self, fraction: float, what: str) -> None: ...
    def done(self, rows: Sequence[Row]) -> None: ...
    def note(self, text: str) -> None: ...


@dataclass
class Run:
    """State of one run."""

    options: Options
    listener: Listener
    device: torch.device
    results: Results
    host_times: dict[tuple[Case, str, str], float] = field(default_factory=dict)

    def measure(self, case: Case, pass_: str) -> list[Row]:
        problem = Problem.build(case, pass_, self.device)
        ours, theirs = self._candidates(case, pass_)
        checked: dict[str, Verified] = {}
        paths: dict[str, str] = {}
        for name, candidate in {**ours, **theirs}.items():
            try:
                checked[name] = problem.verify(candidate)
            except backends.Unavailable as error:
                self.listener.note(f"{case.name} {pass_}: skipped, {error}")
                continue
            except RuntimeError as error:
                reason = str(error).strip().partition("\n")[0]
                if name not in ours:
                    self.listener.note(f"{case.name} {pass_}: no baseline {name}, {reason}")
                    continue
                checked[name] = Verified("fail", None, None, reason)
            if name in ours:
                paths[name] = backends.last()
                if checked[name].reason:
                    self.listener.note(f"{case.name} {pass_}, {name}: FAILED, {checked[name].reason}")
        good = {name: c for name, c in {**ours, **theirs}.items() if name in checked}
        good = {name: c for name, c in good.items() if name in theirs or checked[name].verdict == "pass"}
        timings: dict[str, Timing] = {}
        warm = False
        if any(name in ours for name in good):
            timings, warm = self._time(problem, good)
        rows = []
        for name in ours:
            if name in checked:
                peak = self._peak(problem, ours[name]) if name in timings else None
                against: list[str | None] = [b for b in theirs if b in checked] or [None]
                rows += [
                    self._row(problem, name, baseline, checked, paths.get(name, ""), timings, peak, warm)
                    for baseline in against
                ]
        return rows

    def _candidates(self, case: Case, pass_: str) -> tuple[dict[str, Baseline], dict[str, Baseline]]:
        wanted: Sequence[str | None] = self.options.backends or [None]
        ours = {f"effkern {name or 'automatic'}": Baseline(case.ours(name)) for name in wanted}
        return ours, case.baselines(self.device, pass_, self.options.full)

    def _time(self, problem: Problem, chosen: dict[str, Baseline]) -> tuple[dict[str, Timing], bool]:
        cache = last_level_cache_bytes(self.device)
        most = max(1, min(MOST_SETS, MOST_SET_BYTES // problem.set_bytes()))
        count = min(most, max(2, math.ceil(2 * cache / problem.set_bytes())))
        sets = problem.sets(count)
        with torch.set_grad_enabled(problem.grad_out is not None):
            candidates = []
            for name, candidate in chosen.items():
                with candidate.context():
                    thunks = [problem.thunk(candidate.call, inputs) for inputs in sets]
                candidates.append(Candidate(name, thunks, candidate.context))
            timings = interleave(candidates, self.device, seconds=self.options.seconds)
        return timings, count * problem.set_bytes() <= cache

    def _peak(self, problem: Problem, candidate: Baseline) -> int | None:
        with torch.set_grad_enabled(problem.grad_out is not None):
            return peak_extra_bytes(problem.thunk(candidate.call, problem.inputs), self.device)

    def _host(self, case: Case, pass_: str, name: str, candidate: Baseline) -> float:
        tiny = case.tiny()
        key = (tiny, pass_, name)
        if key not in self.host_times:
            problem = Problem.build(tiny, pass_, self.device)
            with torch.set_grad_enabled(pass_ == "backward"):
                thunk = problem.thunk(candidate.call, problem.inputs)
                self.host_times[key] = host_us(thunk, self.device)
        return self.host_times[key]

    def _row(
        self,
        problem: Problem,
        name: str,
        baseline: str | None,
        checked: dict[str, Verified],
        path: str,
        timings: dict[str, Timing],
        peak: int | None,
        warm: bool,
    ) -> Row:
        case, mine = problem.case, checked[name]
        dtype = str(case.dtype).removeprefix("torch.")
        row = Row(
            family=case.family,
            op=case.op,
            case=case.name,
            shape=case.shape,
            dtype=dtype,
            pass_=problem.pass_,
            backend=_backend_of(path, name),
            path=path,
            verdict=mine.verdict,
            error=mine.error,
            error_baseline=checked[baseline].error if baseline else None,
            median_ms=None,
            p10_ms=None,
            p90_ms=None,
            baseline=baseline,
            baseline_ms=None,
            ratio=None,
            roof=None,
            share_of_roof=None,
            peak_extra_bytes=peak,
            host_us=None,
            first_call_ms=mine.first_call_ms,
            warm=warm,
        )
        timing = timings.get(name)
        if timing is None:
            return row
        row.median_ms, row.p10_ms, row.p90_ms = timing.median_ms, timing.p10_ms, timing.p90_ms
        if baseline:
            row.baseline_ms = timings[baseline].median_ms
            row.ratio = row.baseline_ms / row.median_ms
        flops, nbytes = case.flops(problem.pass_), case.bytes(problem.pass_)
        row.roof, seconds = binding_roof(self.results.roofs, dtype, flops, nbytes)
        row.share_of_roof = seconds * 1e3 / row.median_ms
        row.host_us = self._host(case, problem.pass_, name, self._candidates(case, problem.pass_)[0][name])
        return row


def run(options: Options, listener: Listener | None = None) -> Results:
    """Everything `effkern bench` does short of writing files. Ctrl-C ends it early and keeps what is done."""
    listener = listener or Listener()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = _device(options.backends)
    pairs = case_list.choose(
        case_list.discover(), full=options.full, families=options.families, pattern=options.pattern
    )
    state = Run(options, listener, device, new_results(device))
    results = state.results
    results.roofs = measure_roofs(device)
    listener.machine(results)
    units = [(f"{case.name} {pass_}", 2.0 * options.seconds) for case, pass_ in pairs]
    if options.end_to_end:
        units.append((END_TO_END, options.end_to_end_seconds))
    listener.begin(units)
    try:
        for (case, pass_), (name, _) in zip(pairs, units, strict=False):
            listener.unit(name)
            rows = state.measure(case, pass_)
            results.rows += rows
            listener.done(rows)
        if options.end_to_end:
            listener.unit(END_TO_END)
            results.end_to_end = train(
                device,
                seconds=options.end_to_end_seconds,
                steps=options.end_to_end_steps,
                progress=lambda step, steps, what: listener.step(step / steps, what),
            )
            listener.done(())
    except KeyboardInterrupt:
        listener.note("interrupted: keeping what is done")
    return results


def _device(wanted: Sequence[str]) -> torch.device:
    devices = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}
    for name in wanted:
        backends.check_name(name)
    kinds = {devices[name] for name in wanted if name in devices}
    if len(kinds) > 1:
        raise ValueError(
            f"bench: backends {', '.join(wanted)} run on different devices; time them in separate runs"
        )
    if kinds == {"cuda"} and not torch.cuda.is_available():
        raise ValueError(f"bench: backend {', '.join(wanted)} needs a CUDA GPU, and torch sees none")
    return torch.device(kinds.pop()) if kinds else default_device()


def _backend_of(path: str, name: str) -> str:
    """The path's backend ("attention:cpu/avx2" -> "cpu"), or what was asked for if nothing ran."""
    return path.partition(":")[2].partition("/")[0] or name.removeprefix("effkern ")
