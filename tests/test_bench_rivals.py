"""Other packages as baselines of the harness: that they compute what ours do, and how the harness treats them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from effkern.bench import measure, rivals
from effkern.bench.cases import Baseline, Case
from effkern.bench.cases.dkm import LARGE, DkmCase
from effkern.bench.cases.reversible import RIVALS, StackCase
from effkern.bench.dkm_plain import unrolled
from effkern.bench.timing import Candidate, interleave
from effkern.bench.verify import Problem, accumulated

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]


def need(name: str) -> None:
    if not rivals.installed(name):
        pytest.skip(f"{name} is not installed; pip install 'effkern[rivals]'")


@pytest.fixture(params=RIVALS)
def stack(request: pytest.FixtureRequest) -> Callable[..., Any]:
    need(request.param)
    return RIVALS[request.param]


def gradients(problem: Problem, candidate: Baseline) -> list[torch.Tensor]:
    with candidate.context():
        return problem.thunk(candidate, problem.inputs)()  # type: ignore[return-value]


@pytest.mark.parametrize("pass_", ["forward", "both"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_coremltools_on_the_tiny_case(dtype: torch.dtype, pass_: str) -> None:
    need("coremltools")
    case = DkmCase("one", dtype, (pass_,), ()).tiny()
    problem = Problem.build(case, pass_, CPU)
    verified = problem.verify(case.baselines(CPU, pass_, False)["coremltools"])
    assert verified.verdict == "pass", verified.reason


@pytest.mark.parametrize("size", [1.0, 1e-3])
@pytest.mark.parametrize("iterations", [1, 3])
def test_coremltools_iterates_as_we_do_in_every_call(iterations: int, size: float) -> None:
    """Of small weights as often as of large ones, though their inertia hardly moves."""
    need("coremltools")
    weight = (size * torch.randn(40, 30)).requires_grad_()
    start, sent = size * torch.linspace(-2, 2, 8), torch.randn(40, 30)
    options = {"temperature": 0.02 * size**2, "iterations": iterations}
    expected = unrolled(weight, start, **options)
    (grad,) = torch.autograd.grad(expected, weight, sent)
    call = rivals.palettized(start, **options)
    for _ in range(2):  # it keeps centroids, which must not leak into the next call
        out = call(weight)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4 * size)
        torch.testing.assert_close(torch.autograd.grad(out, weight, sent)[0], grad, rtol=1e-3, atol=1e-3)


def test_coremltools_is_timed_once_where_it_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "installed", lambda name: name == "coremltools")
    monkeypatch.setattr("effkern.bench.cases.dkm.available_bytes", lambda device: 1 << 40)
    small, large = (DkmCase("one", torch.float32, (), (), rows=rows) for rows in (256, 4096))
    assert small.rows * small.columns < LARGE < large.rows * large.columns
    assert not small.baselines(CPU, "both", False)["coremltools"].once
    assert large.baselines(CPU, "both", False)["coremltools"].once
    assert set(large.baselines(CPU, "backward", False)) == {"autograd"}  # its graph would be held twice
    monkeypatch.setattr("effkern.bench.cases.dkm.available_bytes", lambda device: 10 << 30)
    assert set(large.baselines(CPU, "both", False)) == {
        "autograd"
    }  # 6 may be taken; autograd needs 5, coremltools 8


@pytest.mark.parametrize("dtype", DTYPES)
def test_reversible_rivals_have_our_gradients(dtype: torch.dtype, stack: Callable[..., Any]) -> None:
    """Twice, as memcnn frees what it is given; under autocast both have to recover with the numerics of the forward."""
    case = StackCase("one", dtype, ("both",), (), batch=2, tokens=5, width=16, heads=2, depth=3)
    problem = Problem.build(case, "both", CPU)
    candidate = Baseline(case._call(stack), lambda: case._autocast(CPU, cache=False), accumulates=True)
    verified = problem.verify(candidate)
    assert verified.verdict == "pass", verified.reason
    ours = gradients(problem, case.candidate(None))
    for _ in range(2):
        for mine, its in zip(ours, gradients(problem, candidate), strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5 * mine.abs().max().item())
    assert all(t.grad is None for t in problem.inputs)


def test_rivals_are_shown_where_they_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    reversible, ordinary = (StackCase("one", torch.float32, ("both",), (), ordinary=o) for o in (False, True))
    clusters = DkmCase("one", torch.float32, ("both",), ()).tiny()

    def shown(case: Case) -> set[str]:
        return set(case.baselines(CPU, "both", False)) & {"coremltools", *RIVALS}

    monkeypatch.setattr(rivals, "installed", lambda name: True)
    assert (shown(reversible), shown(ordinary)) == (set(RIVALS), set())
    assert shown(clusters) == {"coremltools"}
    monkeypatch.setattr(rivals, "installed", lambda name: name == "revtorch")
    assert (shown(reversible), shown(clusters)) == ({"revtorch"}, set())


class _Nested(torch.autograd.Function):
    """2 x + w x, whose backward calls `backward()`, so that the gradient of w is in `.grad` and nowhere else."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ctx.x, ctx.w = x.detach(), w
        return 2 * x + w.detach() * x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        with torch.enable_grad():
            x = ctx.x.requires_grad_()
            (2 * x + ctx.w * x).backward(grad)
        return x.grad, None


def test_gradients_are_taken_out_of_grad() -> None:
    x, w, unused = (torch.randn(3, requires_grad=True) for _ in range(3))
    sent = torch.randn(3)
    with pytest.raises(RuntimeError, match="appears to not have been used"):
        torch.autograd.grad(_Nested.apply(x, w), [x, w], sent)
    w.grad = None
    for _ in range(2):
        dx, dw = accumulated(_Nested.apply(x, w), [x, w], sent)
        torch.testing.assert_close(dx, (2 + w.detach()) * sent)
        torch.testing.assert_close(dw, x.detach() * sent)
    with pytest.raises(RuntimeError, match="1 of 3 inputs got no gradient"):
        accumulated(_Nested.apply(x, w), [x, w, unused], sent)
    assert x.grad is None and w.grad is None


def test_a_slow_candidate_takes_one_turn_and_no_time_of_the_others() -> None:
    calls: list[str] = []
    slow = Candidate("slow", [lambda: (calls.append("slow"), torch.randn(1 << 20).sort())], once=True)
    fast = Candidate("fast", [lambda: calls.append("fast")])
    timings = interleave([fast, slow], CPU, seconds=0.0, min_rounds=4, max_rounds=9)
    assert calls.count("slow") == 1
    assert len(timings["slow"].samples_ms) == 1 and len(timings["fast"].samples_ms) >= 4


@pytest.mark.parametrize(
    "error", [ImportError("no module"), AssertionError("unsupported"), RuntimeError("out")]
)
def test_a_rival_that_cannot_run_is_left_out(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(weight: torch.Tensor) -> torch.Tensor:
        raise error

    case = DkmCase("one", torch.float32, ("both",), ()).tiny()
    right = case.baselines(CPU, "both", False)["autograd"]
    monkeypatch.setattr(DkmCase, "baselines", lambda *_: {"autograd": right, "coremltools": Baseline(broken)})
    notes: list[str] = []
    rows = measure.Bench(CPU, {"copy": 1e10, "matmul float32": 1e11}, [None], False, 0.01, notes.append)
    assert [row.baseline for row in rows.measure(case, "both")] == ["autograd"]
    assert notes == [f"tiny both: no baseline coremltools, {error}"]
