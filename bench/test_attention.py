"""`pytest bench/`: the quick cases through pytest-benchmark, and the host overhead of a call."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from effkern.bench import cases as case_list
from effkern.bench.cases import Baseline, Case
from effkern.bench.machine import default_device
from effkern.bench.verify import Problem

PAIRS = case_list.choose(case_list.discover(), full=False, device=default_device(), families=["attention"])
TINY = {(case.tiny(), pass_) for case, pass_ in PAIRS if pass_ == "forward"}


def _candidates(case: Case, pass_: str) -> dict[str, Baseline]:
    return {"effkern": Baseline(case.ours(None)), **case.baselines(default_device(), pass_, full=False)}


def _measure(benchmark: Any, case: Case, pass_: str, name: str) -> None:
    problem = Problem.build(case, pass_, default_device())
    candidate = _candidates(case, pass_)[name]
    if name == "effkern":
        verified = problem.verify(candidate)
        assert verified.verdict == "pass", verified.reason
    with torch.set_grad_enabled(pass_ != "forward"), candidate.context():
        benchmark(problem.thunk(candidate, problem.inputs))


@pytest.mark.parametrize(
    ("case", "pass_", "name"),
    [
        pytest.param(case, pass_, name, id=f"{case.name}-{pass_}-{name}")
        for case, pass_ in PAIRS
        for name in _candidates(case, pass_)
    ],
)
def test_case(benchmark: Any, case: Case, pass_: str, name: str) -> None:
    benchmark.group = f"{case.name} {pass_}"
    _measure(benchmark, case, pass_, name)


@pytest.mark.parametrize(
    ("case", "name"),
    [
        pytest.param(case, name, id=f"{case.shape}-{str(case.dtype).removeprefix('torch.')}-{name}")
        for case, pass_ in sorted(TINY, key=lambda pair: (pair[0].shape, str(pair[0].dtype)))
        for name in _candidates(case, pass_)
    ],
)
def test_host_overhead(benchmark: Any, case: Case, name: str) -> None:
    benchmark.group = f"host overhead, {case.shape}"
    _measure(benchmark, case, "forward", name)
