"""The harness itself: schema, comparison, timing, memory, report, a tiny run through the command line."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import subprocess
import sys
import time
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

import effkern
from effkern.bench import cases as case_list
from effkern.bench import command, machine, measure, runner
from effkern.bench import compare as comparing
from effkern.bench.cases import Baseline, Case
from effkern.bench.cases.reversible import StackCase
from effkern.bench.machine import binding_roof, new_results
from effkern.bench.memory import peak_extra_bytes, peak_tensor_bytes
from effkern.bench.results import Curve, EndToEnd, Results, Row
from effkern.bench.timing import Candidate, Timing, host_us, interleave
from effkern.bench.verify import Problem

CPU = torch.device("cpu")
TINY = "grid/d64/256/causal/fp32"
ROW_FIELDS = [
    "family",
    "op",
    "case",
    "shape",
    "dtype",
    "pass",
    "backend",
    "path",
    "verdict",
    "error",
    "error_baseline",
    "median_ms",
    "p10_ms",
    "p90_ms",
    "baseline",
    "baseline_ms",
    "ratio",
    "roof",
    "share_of_roof",
    "peak_extra_bytes",
    "host_us",
    "first_call_ms",
    "warm",
    "baseline_peak_extra_bytes",
]
MACHINE_FIELDS = {"name", "cpu", "isa", "gpu", "driver", "torch", "triton", "cuda"}


def row(
    case: str = TINY, pass_: str = "forward", ms: float = 10.0, baseline_ms: float = 20.0, **changes: object
) -> Row:
    made = Row(
        *(
            "attention",
            "attention",
            case,
            "B1",
            "float32",
            pass_,
            "cpu",
            "attention:cpu/avx2",
            "pass",
            1e-7,
            2e-7,
        ),
        *(ms, 0.97 * ms, 1.03 * ms, "sdpa-flash", baseline_ms, baseline_ms / ms, "matmul float32", 0.5),
        *(1 << 20, 5.0, 11.0, False, 3 << 20),
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def curve(variant: str, path: str = "") -> Curve:
    losses = [8.0, 6.0, 5.0, 4.5]
    return Curve(
        variant, [1, 2, 3, 4], losses, [0, 4], [8.0, 4.4], 9.0, 8.0, 11.0, 1e5, 1 << 20, 10, 40, 4.4, path
    )


def results(*rows: Row) -> Results:
    made = new_results(CPU)
    made.roofs = {"matmul float32": 1e11, "matmul bfloat16": 1e9, "copy": 1e10}
    made.rows = list(rows)
    made.end_to_end = EndToEnd(
        "text", 1 << 20, "tiny", "float32", 64, 1, 0, [curve("PyTorch"), curve("effkern", "p")]
    )
    return made


def test_schema_round_trip(tmp_path: Path) -> None:
    made = results(row(), row(verdict="fail", median_ms=None, ratio=None))
    made.save(tmp_path / "results.json")
    assert Results.load(tmp_path / "results.json") == made
    data = json.loads((tmp_path / "results.json").read_text())
    assert list(data["rows"][0]) == ROW_FIELDS
    assert set(data["machine"]) >= MACHINE_FIELDS
    assert {"schema", "machine", "commit", "dirty", "date", "roofs", "rows"} <= set(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(schema=99), "schema 99 is not 1"),
        (lambda data: data["rows"][0].pop("ratio"), "results.rows[0]: field 'ratio' is missing"),
        (lambda data: data["rows"][0].update(speed=1), "results.rows[0]: unknown fields ['speed']"),
        (lambda data: data["machine"].update(cpu=None), "results.machine.cpu: null"),
        (lambda data: data["rows"][0].update(warm="yes"), "results.rows[0].warm: expected bool, got 'yes'"),
    ],
)
def test_a_file_that_does_not_fit_is_named(change, message: str) -> None:
    data = json.loads(results(row()).to_json())
    change(data)
    with pytest.raises(ValueError, match=re.escape(message)):
        Results.from_json(json.dumps(data))


def test_compare_tells_moves_from_noise() -> None:
    before = results(row("a"), row("b"), row("c"), row("d"), row("e"), row("gone"))
    after = results(
        row("a", ms=5.0),  # twice as fast
        row("b", ms=10.2),  # within the noise
        row("c", ms=20.0, baseline_ms=40.0),  # everything on the machine got slower
        row("d", ms=12.0),  # slower
        row("e", verdict="fail", median_ms=None, ratio=None),
        row("new"),
    )
    found = comparing.compare(before, after)
    assert [(move.what.split()[0], move.label or round(move.change, 2)) for move in found.moved] == [
        ("a", -0.5),
        ("d", 0.2),
        ("e", "pass -> fail"),
    ]
    assert (found.same, found.only_before, found.only_after) == (2, 1, 1)


def test_compare_reads_files_and_names_what_is_neither(tmp_path: Path) -> None:
    results(row()).save(tmp_path / "before.json")
    assert comparing.load(str(tmp_path / "before.json"), "any").rows == [row()]
    with pytest.raises(ValueError, match="'no-such-ref' is neither a file nor a git ref"):
        comparing.load("no-such-ref", "any")


def test_timing_is_interleaved_and_rotates_inputs() -> None:
    calls: list[tuple[str, int]] = []

    def thunk(name: str, index: int):
        return lambda: (calls.append((name, index)), time.sleep(1e-3))

    candidates = [Candidate(name, [thunk(name, i) for i in range(3)]) for name in "ab"]
    timings = interleave(candidates, CPU, seconds=0.0, min_rounds=6)
    timed = calls[-12:]
    assert [name for name, _ in timed] == list("abba" * 3)
    assert {index for _, index in timed} == {0, 1, 2}
    assert all(1.0 <= t.p10_ms <= t.median_ms <= t.p90_ms for t in timings.values())
    assert all(len(t.samples_ms) == 6 for t in timings.values())
    assert Timing([2.0]).p90_ms == 2.0


def test_slow_calls_have_as_many_samples_as_fast_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    hours = types.SimpleNamespace(
        perf_counter=lambda: 3600.0 * next(clock), perf_counter_ns=time.perf_counter_ns
    )
    monkeypatch.setattr("effkern.bench.timing.time", hours)
    timings = interleave([Candidate(name, [lambda: None]) for name in "ab"], CPU, seconds=1.0)
    assert [len(t.samples_ms) for t in timings.values()] == [5, 5]


def test_peak_of_tensors_is_counted_to_the_byte() -> None:
    def call() -> torch.Tensor:
        return torch.ones(4 << 20).sum() + torch.ones(1 << 20)  # as below

    # 16 MiB and their sum; then that sum, two tensors of 4 MiB
    assert peak_tensor_bytes(call, CPU) == (16 << 20) + 4


def test_peak_memory_sees_what_a_call_held_and_freed() -> None:
    def call() -> torch.Tensor:
        return torch.ones(4 << 20).sum() + torch.ones(1 << 20)  # 16 MiB freed, 4 MiB and the result held

    call()
    peak = peak_extra_bytes(call, CPU)
    assert peak is None or 15 << 20 <= peak <= 30 << 20


def test_the_roof_of_half_precision_is_no_slower_than_fp32() -> None:
    roofs = {"matmul float32": 1e11, "matmul bfloat16": 1e9, "copy": 1e10}
    assert binding_roof(roofs, "bfloat16", 1e11, 1.0) == ("matmul float32", 1.0)
    assert binding_roof(roofs, "float32", 1.0, 2e10) == ("copy", 2.0)


def test_cases_have_unique_names_and_the_models_the_project_names() -> None:
    cases = case_list.discover()
    names = [case.name for case in cases]
    assert len(names) == len(set(names))
    for model in ("gpt2-small", "llama-3-8b", "vit-l-16", "bert-large", "minilm"):
        assert any(name.startswith(model) for name in names), model
    quick, full = (case_list.choose(cases, full=full, device=CPU) for full in (False, True))
    assert set(quick) < set(full)
    with pytest.raises(ValueError, match="no case matches 'nothing\\*'"):
        case_list.choose(cases, full=False, device=CPU, pattern="nothing*")
    with pytest.raises(ValueError, match="no family 'attentoin'"):
        case_list.choose(cases, full=False, device=CPU, families=["attentoin"])


@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_verification_catches_a_wrong_kernel(pass_: str) -> None:
    case = next(case for case in case_list.discover() if case.name == TINY).tiny()
    problem = Problem.build(case, pass_, CPU)
    right = next(iter(case.baselines(CPU, pass_, False).values()))
    assert problem.verify(right).verdict == "pass"
    wrong = Baseline(lambda q, k, v: right.call(q, k, v * 1.001))
    found = problem.verify(wrong)
    assert found.verdict == "fail"
    assert "is allowed" in found.reason
    broken = Baseline(lambda q, k, v: right.call(q, k, v) * float("nan"))
    assert problem.verify(broken).reason == "the result is not finite"


TINY_CASES = sorted({(case.tiny(), pass_) for case in case_list.discover() for pass_ in case.passes}, key=str)


@pytest.mark.parametrize(
    ("case", "pass_"),
    [pytest.param(*pair, id=f"{pair[0].shape}-{pair[0].dtype}-{pair[1]}") for pair in TINY_CASES],
)
def test_every_case_is_correct_small_and_its_host_time_is_taken(
    case: Case, pass_: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every case: ours and every baseline against the oracle, and the overhead of a call."""
    problem = Problem.build(case, pass_, CPU)
    others = case.baselines(CPU, pass_, False)
    same = {
        name: call for name, call in others.items() if not name.startswith("effkern-")
    }  # those lack the mask
    for name, candidate in {"ours": case.candidate(None), **same}.items():
        verified = problem.verify(candidate)
        assert verified.verdict == "pass", f"{name}: {verified.reason}"
    monkeypatch.setattr(measure, "host_us", partial(host_us, seconds=0.01))
    bench = measure.Bench(CPU, results().roofs, [None], False, 0.01, print)
    assert bench._host(case, pass_, None) > 0


def test_a_failure_is_a_row_without_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in case_list.discover() if case.name == TINY).tiny()
    monkeypatch.setattr(type(case), "ours", lambda self, backend: lambda q, k, v: q + k + v)
    notes: list[str] = []
    bench = measure.Bench(CPU, results().roofs, [None], False, 0.01, notes.append)
    (found,) = bench.measure(case, "forward")
    assert "FAILED" in notes[0]
    assert (found.verdict, found.median_ms, found.ratio) == ("fail", None, None)
    assert found.error is not None
    assert found.error_baseline is not None
    assert found.error > found.error_baseline


def _steps(kind: str) -> Case:
    name = f"vit-b-16/{kind}/12/b1/fp32"
    return next(case for case in case_list.discover() if case.name == name).tiny()


def test_a_case_without_a_path_does_not_show_that_of_the_case_before() -> None:
    """Sums of float32 streams are PyTorch's own."""
    case = _steps("reversible")
    effkern.backends.record("attention:cpu/avx2")
    bench = measure.Bench(CPU, results().roofs, [None], False, 0.01, print)
    outcome = bench._verify_ours(Problem.build(case, "both", CPU), "effkern automatic", case.candidate(None))
    assert outcome is not None and outcome.verified.verdict == "pass" and outcome.path == ""


@pytest.mark.parametrize("kind", ["reversible", "checkpoint"])
def test_recomputed_steps_are_timed_with_and_without_overlap_and_never_in_trials(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from effkern.nn import _reversible_schedule as schedules

    chosen: list[object] = []
    right = schedules.choose

    def noted(device: torch.device, overlap: bool | str, probe: schedules.Probe) -> schedules.Schedule:
        chosen.append(overlap)
        return right(device, overlap, probe)

    monkeypatch.setattr(schedules, "choose", noted)
    case = _steps(kind)
    problem = Problem.build(case, "both", CPU)
    others = case.baselines(CPU, "both", False)
    for candidate in (case.candidate(None), others["effkern-overlap"]):
        assert problem.verify(candidate).verdict == "pass"
    assert set(chosen[: len(chosen) // 2]) == {False} and set(chosen[len(chosen) // 2 :]) == {True}


def _of_the_family(device: str) -> dict[str, Case]:
    pairs = case_list.choose(
        case_list.discover(), full=True, device=torch.device(device), families=["reversible"]
    )
    return {case.name: case for case, _ in pairs if isinstance(case, StackCase)}


def test_all_block_shapes_are_timed_in_depth_and_batch_and_on_a_cpu_what_takes_no_hours() -> None:
    gpu, cpu = _of_the_family("cuda"), _of_the_family("cpu")
    for model, depth in (("vit-b-16", 12), ("vit-l-16", 24), ("roberta-base", 12), ("gpt2-medium", 24)):
        for kind, dtype in itertools.product(("reversible", "checkpoint"), ("fp32", "bf16")):
            assert f"{model}/{kind}/{depth}/b1/{dtype}" in gpu
            found = [case for name, case in gpu.items() if name.startswith(f"{model}/{kind}/")]
            assert len({case.batch for case in found}) > 1
            assert f"{model}/{kind}/2/b1/fp32" in cpu
    for cases in (gpu, cpu):
        assert {case.depth for case in cases.values()} >= {12, 24, 48}
        assert len({case.batch for case in cases.values()}) > 3
    assert max(case.flops("both") for case in cpu.values()) < 2e11
    # Whoever asks for one by name gets it.
    name = "gpt2-medium/reversible/24/b4/bf16"
    assert name not in cpu
    asked = case_list.choose(case_list.discover(), full=True, device=CPU, pattern=name)
    assert [case.name for case, _ in asked] == [name]


def test_bfloat16_stacks_are_timed_on_a_cpu_with_units_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for levels, expected in ((["scalar", "avx2"], False), (["scalar", "avx2", "avx512_bf16"], True)):
        monkeypatch.setattr("effkern._host.isa_levels", lambda levels=levels: levels)
        assert any(case.dtype == torch.bfloat16 for case in _of_the_family("cpu").values()) is expected


@pytest.mark.parametrize("kind", ["reversible", "checkpoint"])
def test_peaks_of_activations_repeat_to_the_byte_and_stored_ones_grow_with_depth(kind: str) -> None:
    bench = measure.Bench(CPU, results().roofs, [None], False, 0.01, print)
    peaks: dict[str, list[int]] = {}
    for depth in (4, 12):
        case = dataclasses.replace(_of_the_family("cpu")[f"narrow/{kind}/12/b1/fp32"], depth=depth)
        problem = Problem.build(case, "both", CPU)
        for name, candidate in {"ours": case.candidate(None), **case.baselines(CPU, "both", True)}.items():
            assert problem.verify(candidate).verdict == "pass"
            first, second = (bench._peak(problem, candidate) for _ in range(2))
            assert first == second
            peaks.setdefault(name, []).append(first)
    (shallow, deep), stored = peaks["ours"], peaks["stored"]
    state = 4 * 64 * 64
    assert stored[1] - stored[0] > 8 * 16 * state
    if kind == "reversible":
        assert deep == shallow
    else:
        assert deep - shallow == 8 * state


def test_host_time_is_that_of_one_thread(threads: Callable[[int], None]) -> None:
    threads(3)
    seen: set[int] = set()
    assert host_us(lambda: seen.add(torch.get_num_threads()), CPU, seconds=0.01) > 0
    assert seen == {1} and torch.get_num_threads() == 3


def test_interrupt_keeps_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    class Impatient(runner.Listener):
        def done(self, rows) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(runner, "measure_roofs", lambda device: {"matmul float32": 1e11, "copy": 1e10})
    monkeypatch.setattr(measure.Bench, "measure", lambda self, case, pass_: [row(case.name, pass_)])
    found = runner.run(runner.Options(pattern="grid/*"), Impatient())
    assert len(found.rows) == 1
    assert found.end_to_end is None


def test_report_renders(tmp_path: Path) -> None:
    report = pytest.importorskip("effkern.bench.report")
    rows = [row("gpt2-small/1024/bf16"), row("gpt2-small/1024/bf16", "backward"), row(TINY, ms=30.0)]
    pays = {f"pays/1024/nb{n}/fp32": float(n) for n in (2, 4, 8)}
    rows += [row(case, baseline=name, ratio=r / 2) for case, r in pays.items() for name in ("dense", "bmm")]
    rows += [row("grid/d64/512/full/fp32", verdict="fail", median_ms=None, ratio=None, share_of_roof=None)]
    written = report.write(results(*rows), tmp_path)
    assert {path.name for path in written} == {
        *("report.html", "ratios.png", "roofline.png", "monarch.png", "training.png")
    }
    page = (tmp_path / "report.html").read_text()
    assert "gpt2-small/1024/bf16" in page
    assert "http" not in page.replace("http-equiv", "")  # self-contained
    assert page.count("data:image/png;base64,") == 8


def test_command_line_runs_a_tiny_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    testing = pytest.importorskip("typer.testing")
    from effkern.cli import app

    monkeypatch.setattr(machine, "MATMUL_SIZE", {"cpu": 128, "cuda": 128})
    monkeypatch.setattr(machine, "COPY_BYTES", {"cpu": 1 << 20, "cuda": 1 << 20})
    monkeypatch.setattr(measure, "MOST_SETS", 2)
    threads = str(torch.get_num_threads())
    call = testing.CliRunner().invoke
    arguments = [
        "bench",
        "--case",
        TINY,
        "--backend",
        "reference",
        "--out",
        str(tmp_path),
        "--threads",
        threads,
    ]
    assert call(app, ["bench", "--case", "nothing", "--out", str(tmp_path)]).exit_code == 2
    done = call(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    stored = Results.load(tmp_path / "results.json")
    assert Results.from_json(done.stdout) == stored
    assert {r.pass_ for r in stored.rows} == {"forward", "backward"}
    assert all(r.verdict == "pass" and r.path.endswith("reference") and r.host_us for r in stored.rows)
    assert stored.roofs["copy"] > 0
    assert (tmp_path / "report.html").exists()
    monkeypatch.setattr(command, "run", lambda options, screen: stored)
    again = call(app, [*arguments, "--no-plot", "--compare", str(tmp_path / "results.json")])
    assert "0 moved beyond the noise, 2 did not" in again.output


def test_doctor_says_what_runs_and_is_usable() -> None:
    testing = pytest.importorskip("typer.testing")
    from effkern.cli import app

    done = testing.CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["usable"]
    assert {check["op"] for check in report["checks"]} >= {"attention"}
    plain = testing.CliRunner().invoke(app, ["doctor"])
    assert "all usable" in plain.output


def test_import_stays_light() -> None:
    unwanted = ("typer", "rich", "matplotlib", "triton", "effkern.bench")
    code = f"import sys, effkern; print([name for name in {unwanted} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
