"""One (case, pass): verify every candidate, time those that passed in turns, and write down the rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from effkern import backends

from .cases import Baseline, Case
from .machine import binding_roof, last_level_cache_bytes
from .memory import peak_extra_bytes, peak_tensor_bytes
from .results import Row
from .timing import Candidate, Timing, host_us, interleave
from .verify import Problem, Verified

MOST_SETS = 256
# Results keep their memory while the inputs rotate; a machine with a huge cache must not run out of it.
MOST_SET_BYTES = 2 << 30


@dataclass
class Outcome:
    """What is known of one candidate; a time only if it passed."""

    verified: Verified
    path: str = ""
    timing: Timing | None = None
    peak: int | None = None
    host_us: float | None = None


@dataclass
class Bench:
    """Measures cases on one device. `wanted` are our backends, None the automatic choice."""

    device: torch.device
    roofs: dict[str, float]
    wanted: Sequence[str | None]
    full: bool
    seconds: float
    note: Callable[[str], None]
    host_times: dict[tuple[Case, str, str | None], float] = field(default_factory=dict)

    def measure(self, case: Case, pass_: str) -> list[Row]:
        problem = Problem.build(case, pass_, self.device)
        ours = {f"effkern {name or 'automatic'}": case.candidate(name) for name in self.wanted}
        theirs = case.baselines(self.device, pass_, self.full)
        mine = _present({name: self._verify_ours(problem, name, call) for name, call in ours.items()})
        if not mine:
            return []
        others = _present({name: self._verify_baseline(problem, name, call) for name, call in theirs.items()})
        passed = {name: ours[name] for name, outcome in mine.items() if outcome.verified.verdict == "pass"}
        warm = False
        if passed:
            timings, warm = self._time(problem, passed | {name: theirs[name] for name in others})
            for name, timing in timings.items():
                (mine if name in mine else others)[name].timing = timing
            for name in others:
                others[name].peak = self._peak(problem, theirs[name])
            for name, backend in zip(ours, self.wanted, strict=True):
                if name in passed:
                    mine[name].peak = self._peak(problem, passed[name])
                    mine[name].host_us = self._host(case.tiny(), pass_, backend)
        against: list[str | None] = list(others) or [None]
        return [
            self._row(problem, name, outcome, baseline, others[baseline] if baseline else None, warm)
            for name, outcome in mine.items()
            for baseline in against
        ]

    def _verify_ours(self, problem: Problem, name: str, candidate: Baseline) -> Outcome | None:
        where = f"{problem.case.name} {problem.pass_}"
        backends.record(
            ""
        )  # a case may take no path of ours, and then shows none: not that of the case before
        try:
            outcome = Outcome(problem.verify(candidate), backends.last())
        except backends.Unavailable as error:
            self.note(f"{where}: skipped, {error}")
            return None
        except RuntimeError as error:
            outcome = Outcome(Verified("fail", None, None, _first_line(error)))
        if outcome.verified.reason:
            self.note(f"{where}, {name}: FAILED, {outcome.verified.reason}")
        return outcome

    def _verify_baseline(self, problem: Problem, name: str, candidate: Baseline) -> Outcome | None:
        """A baseline's error is shown, whatever it is; one that cannot run the case is left out."""
        try:
            return Outcome(problem.verify(candidate))
        # Other packages assert, and may not import beside this torch
        except (RuntimeError, AssertionError, ImportError) as error:
            where = f"{problem.case.name} {problem.pass_}"
            self.note(f"{where}: no baseline {name}, {_first_line(error)}")
            return None

    def _time(self, problem: Problem, chosen: dict[str, Baseline]) -> tuple[dict[str, Timing], bool]:
        cache = last_level_cache_bytes(self.device)
        most = max(1, min(MOST_SETS, MOST_SET_BYTES // problem.set_bytes()))
        count = min(most, max(2, math.ceil(2 * cache / problem.set_bytes())))
        sets = problem.sets(count)
        with torch.set_grad_enabled(problem.grad_out is not None):
            candidates = []
            for name, candidate in chosen.items():
                its_sets = sets[:1] if candidate.once else sets
                with candidate.context():
                    thunks = [problem.thunk(candidate, inputs) for inputs in its_sets]
                candidates.append(Candidate(name, thunks, candidate.context, candidate.once))
            timings = interleave(candidates, self.device, seconds=self.seconds)
        return timings, count * problem.set_bytes() <= cache

    def _peak(self, problem: Problem, candidate: Baseline) -> int | None:
        with torch.set_grad_enabled(problem.grad_out is not None), candidate.context():
            call = problem.thunk(candidate, problem.inputs)
            if problem.case.tensors_only:
                return peak_tensor_bytes(call, self.device)
            return peak_extra_bytes(call, self.device)

    def _host(self, tiny: Case, pass_: str, backend: str | None) -> float:
        key = (tiny, pass_, backend)
        if key not in self.host_times:
            problem = Problem.build(tiny, pass_, self.device)
            with torch.set_grad_enabled(pass_ != "forward"):
                self.host_times[key] = host_us(
                    problem.thunk(tiny.candidate(backend), problem.inputs), self.device
                )
        return self.host_times[key]

    def _row(
        self,
        problem: Problem,
        name: str,
        outcome: Outcome,
        baseline: str | None,
        other: Outcome | None,
        warm: bool,
    ) -> Row:
        case, verified = problem.case, outcome.verified
        dtype = str(case.dtype).removeprefix("torch.")
        row = Row(
            family=case.family,
            op=case.op,
            case=case.name,
            shape=case.shape,
            dtype=dtype,
            pass_=problem.pass_,
            backend=_backend_of(outcome.path, name),
            path=outcome.path,
            verdict=verified.verdict,
            error=verified.error,
            error_baseline=other.verified.error if other else None,
            median_ms=None,
            p10_ms=None,
            p90_ms=None,
            baseline=baseline,
            baseline_ms=other.timing.median_ms if other and other.timing else None,
            ratio=None,
            roof=None,
            share_of_roof=None,
            peak_extra_bytes=outcome.peak,
            host_us=outcome.host_us,
            first_call_ms=verified.first_call_ms,
            warm=warm,
            baseline_peak_extra_bytes=other.peak if other else None,
        )
        if outcome.timing is None:
            row.baseline_ms = None
            return row
        timing = outcome.timing
        row.median_ms, row.p10_ms, row.p90_ms = timing.median_ms, timing.p10_ms, timing.p90_ms
        if row.baseline_ms is not None:
            row.ratio = row.baseline_ms / row.median_ms
        flops, nbytes = case.flops(problem.pass_), case.bytes(problem.pass_)
        row.roof, seconds = binding_roof(self.roofs, dtype, flops, nbytes)
        row.share_of_roof = seconds * 1e3 / row.median_ms
        return row


def _present(outcomes: dict[str, Outcome | None]) -> dict[str, Outcome]:
    return {name: outcome for name, outcome in outcomes.items() if outcome is not None}


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _backend_of(path: str, name: str) -> str:
    """The path's backend ("attention:cpu/avx2" -> "cpu"), or what was asked for if nothing ran."""
    return path.partition(":")[2].partition("/")[0] or name.removeprefix("effkern ")
