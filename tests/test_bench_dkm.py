"""The harness on clustered weights: its plain versions, what it counts as saved, and weights too large to unroll."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import effkern
from effkern.bench import decoder_step, runner, saved
from effkern.bench.cases import Baseline
from effkern.bench.cases import dkm as cases
from effkern.bench.cases import kmeans_init as kmeans_cases
from effkern.bench.console import decoder_step_table, make_console, saved_table
from effkern.bench.dkm_plain import chunked, unrolled
from effkern.bench.machine import new_results
from effkern.bench.measure import Bench
from effkern.bench.results import DecoderStep, Results
from effkern.bench.verify import Problem

CPU = torch.device("cpu")
OPTIONS = {"temperature": 0.02, "iterations": 3}


@pytest.mark.parametrize("chunk", [7, 1 << 15])
def test_a_chunk_at_a_time_is_what_autograd_computes(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("effkern.reference.dkm_shards.CHUNK", chunk)
    weight = torch.randn(6, 50, dtype=torch.float64, requires_grad=True)
    start, sent = torch.linspace(-2, 2, 8).double(), torch.randn(6, 50, dtype=torch.float64)
    out = unrolled(weight, start, **OPTIONS)
    torch.testing.assert_close(chunked(weight, start, **OPTIONS), out)
    (grad,) = torch.autograd.grad(out, weight, sent)
    found = chunked(weight, start, **OPTIONS, grad_out=sent)
    torch.testing.assert_close(found, grad)


def test_saved_bytes_are_those_of_tensors_that_exist() -> None:
    weight = torch.randn(64, 32, requires_grad=True)
    start = torch.linspace(-2, 2, 8)
    real, meta = (
        saved.saved_bytes(
            lambda w, s: unrolled(w, s, **OPTIONS), weight.detach().to(device).requires_grad_(), s
        )
        for device, s in (("cpu", start), ("meta", start.to("meta")))
    )
    assert real == meta
    assert saved.saved_bytes(lambda w: w.exp() * 2.0, weight) == weight.nbytes  # the result of exp
    assert saved.saved_bytes(lambda w: w * w, weight) == 0  # the input does not count


def test_a_decoder_layer_keeps_next_to_nothing() -> None:
    rows = saved.decoder_layer()
    assert [(row.bits, row.dtype) for row in rows[:2]] == [(2, "float32"), (2, "bfloat16")]
    for row in rows:
        assert row.weights == 4 * 4096 * 4096 + 3 * 4096 * 11008
        width = 4 if row.dtype == "float32" else 2
        assert row.plain_bytes >= 2 * row.iterations * row.weights * 2**row.bits * width
        assert row.own_bytes < 7 * 64 << 10 and row.ratio > 10_000
    console = make_console()
    with console.capture() as capture:
        console.print(saved_table(rows))
    assert "LLaMA-7B decoder layer, 202,375,168" in capture.get()


@pytest.mark.parametrize("pass_", ["forward", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_too_large_to_unroll(pass_: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases.DkmCase("large", dtype, (pass_,), (), rows=64, columns=96)
    assert "autograd" in case.baselines(CPU, pass_, False)
    monkeypatch.setattr(cases, "available_bytes", lambda device: 1000)
    assert case.baselines(CPU, pass_, False) == {}
    verified = Problem.build(case, pass_, CPU).verify(case.candidate(None))
    assert verified.verdict == "pass", verified.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_start_values_are_held_to_the_optimum(dtype: torch.dtype) -> None:
    """Whatever the dtype of the weight: one thousandth beside it costs more than rounding does."""
    names = {case.name for case in kmeans_cases.cases()}
    assert {"kmeans/4096/k8/bf16", "kmeans/4096/k16/bf16"} <= names
    case = kmeans_cases.KmeansCase("small", dtype, ("forward",), (), rows=64, columns=64, clusters=16)
    problem = Problem.build(case, "forward", CPU)
    verified = problem.verify(case.candidate(None))
    assert verified.verdict == "pass", verified.reason
    beside = problem.verify(Baseline(lambda weight: 1.001 * effkern.kmeans_init(weight, 16)))
    assert beside.verdict == "fail" and beside.error is not None and 1e-6 < beside.error < 1e-2


def test_a_run_of_the_family_counts_what_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "measure_roofs", lambda device: {"copy": 1e10})
    monkeypatch.setattr(Bench, "measure", lambda self, case, pass_: [])
    found = runner.run(runner.Options(pattern="kmeans/*", end_to_end=False))
    assert len(found.saved) == 6
    assert Results.from_json(found.to_json()) == found
    assert runner.run(runner.Options(pattern="grid/*", end_to_end=False)).saved == []


def test_a_training_step_of_a_small_decoder_layer() -> None:
    layer = decoder_step.DecoderLayer(32, 88, 4, torch.bfloat16)
    names = [name for name, _ in layer.named_parameters()]
    weights = list(layer.parameters())
    layer.cluster(3)
    assert len(weights) == 7 and all(a is b for a, b in zip(layer.parameters(), weights, strict=True))
    assert [name for name, _ in layer.named_parameters()] == names
    layer(torch.randn(1, 5, 32, dtype=torch.bfloat16)).float().sum().backward()
    assert effkern.backends.last().startswith("dkm_backward:cpu/")
    assert all(weight.grad.isfinite().all() and weight.grad.any() for weight in weights)
    step = decoder_step.decoder_step(512, 1376, 8, tokens=4)
    assert step.weights == 4 * 512 * 512 + 3 * 512 * 1376 and step.weight_bytes == 2 * step.weights
    assert (step.bits, step.dtype, step.tokens) == (3, "bfloat16", 4)
    # Gradients and two moments at least; never anything of weights times clusters.
    assert step.dense_peak_extra_bytes > 2 * step.weight_bytes
    assert 2 * step.weight_bytes < step.peak_extra_bytes < 8 * step.weight_bytes
    assert step.seconds > 0 < step.dense_seconds


STEP = DecoderStep("LLaMA-7B layer", 1 << 20, 3, "bfloat16", "AdamW", 4, 2 << 20, 8 << 20, 6 << 20, 0.5, 0.25)


def test_the_family_carries_out_a_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(runner, "measure_roofs", lambda device: {"copy": 1e10})
    monkeypatch.setattr(Bench, "measure", lambda self, case, pass_: [])
    monkeypatch.setattr(decoder_step, "decoder_step", lambda: STEP)
    heard: list[str] = []
    monkeypatch.setattr(runner.Listener, "note", lambda self, text: heard.append(text))
    family = runner.Options(families=("dkm",), end_to_end=False)
    found = runner.run(family)
    assert found.decoder_step == STEP and Results.from_json(found.to_json()) == found
    assert runner.run(runner.Options(families=("monarch",), end_to_end=False)).decoder_step is None
    monkeypatch.setattr(decoder_step, "available_bytes", lambda device: 1 << 30)
    assert runner.run(family).decoder_step is None
    assert heard == ["the clustered decoder layer is left out: it wants 3.0 GiB of free memory"]
    assert "on cuda" in decoder_step.refusal(torch.device("cuda"))
    console = make_console()
    with console.capture() as capture:
        console.print(decoder_step_table(STEP))
    text = capture.get()
    assert "a training step of a LLaMA-7B layer, bfloat16" in text and "clustered, 3 bits" in text
    assert "10 MiB" in text and "8 MiB" in text
    report = pytest.importorskip("effkern.bench.report")
    results = new_results(CPU)
    results.roofs, results.decoder_step, results.saved = {"copy": 1e10}, STEP, found.saved
    report.write(results, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "A training step of a clustered decoder layer" in page and "1,048,576 weights" in page
