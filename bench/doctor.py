"""`effkern doctor`: what is installed, what runs where and why, and whether it computes the right thing."""

from __future__ import annotations

import dataclasses
import os
import platform
import time
from dataclasses import dataclass
from typing import Any

import torch

import effkern
from effkern import _host, _lib, backends
from effkern.ops import registry

from .console import make_console
from .machine import describe, package_version

VARIABLES = {
    "EFFKERN_CPU_ISA": "forces an instruction set: scalar, avx2, avx512, avx512_bf16 or amx",
    "EFFKERN_BACKEND": f"forces a backend: {', '.join(backends.NAMES)}",
    "OMP_NUM_THREADS": "CPU threads of torch and of our kernels",
    "TRITON_INTERPRET": "1 runs Triton kernels in Python, for tests",
    "CUDA_VISIBLE_DEVICES": "which GPUs torch sees",
}
SELF_TEST_SECONDS = 1.0


@dataclass(frozen=True)
class Check:
    """The self-test of one op on one device."""

    op: str
    device: str
    calls: int
    worst: float  # largest relative L2 error against the reference in fp32
    path: str
    failure: str  # empty: all right


@dataclass(frozen=True)
class Report:
    versions: dict[str, str]
    machine: dict[str, Any]
    libraries: list[dict[str, Any]]
    build: dict[str, Any]
    isa: dict[str, Any]
    cuda: dict[str, Any]
    choices: list[dict[str, Any]]
    environment: dict[str, str]
    checks: list[Check]

    @property
    def usable(self) -> bool:
        needed = all(entry["loaded"] for entry in self.libraries if entry["needed"])
        chosen = all(row["backend"] for row in self.choices if row["present"])
        return needed and chosen and not any(check.failure for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "usable": self.usable}


def examine() -> Report:
    status = _lib.status()
    gpu = torch.cuda.is_available()
    devices = ["cpu", "cuda"] if gpu else ["cpu"]
    return Report(
        versions={
            "effkern": effkern.__version__,
            "torch": torch.__version__,
            "triton": package_version("triton") or "not installed",
            "python": platform.python_version(),
        },
        machine=dataclasses.asdict(describe(torch.device(devices[-1]))),
        libraries=[_library(entry, needed) for entry, needed in _libraries(status, gpu)],
        build=dataclasses.asdict(status.build),
        isa={
            "active": _host.isa_active(),
            "available": list(_host.isa_levels()),
            "features": _host.cpu_features(),
        },
        cuda=_cuda(status.build.cuda_images, gpu),
        choices=[_choice(row, gpu) for row in backends.report()],
        environment={name: os.environ[name] for name in VARIABLES if name in os.environ},
        checks=[_self_test(spec, device) for spec in registry.specs() for device in devices],
    )


def show(report: Report) -> None:
    console = make_console()
    width = 10
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    console.print(f"[bold]{'versions':<{width}}[/]{versions}")
    levels = ", ".join(report.isa["available"])
    console.print(f"[bold]{'CPU':<{width}}[/]{report.machine['cpu']}, {report.machine['threads']} threads")
    console.print(f"[bold]{'ISA':<{width}}[/]{report.isa['active']} in use; this machine has {levels}")
    console.print(f"[bold]{'GPU':<{width}}[/]{report.cuda['summary']}")
    for entry in report.libraries:
        style = "green" if entry["loaded"] else "red" if entry["needed"] else "yellow"
        state = "loaded" if entry["loaded"] else entry["reason"]
        console.print(f"[bold]{'library':<{width}}[/]{entry['name']}: [{style}]{state}[/]")
    console.print(f"[bold]{'built':<{width}}[/]{_built(report.build)}")
    for kind, flags in report.build["flags"].items():
        if flags:
            console.print(f"{'':<{width}}  [dim]{kind}: {flags}[/]")
    for row in report.choices:
        place = f"{row['op']} on {row['device']}"
        if not row["present"]:
            console.print(f"[bold]{'op':<{width}}[/]{place}: [dim]no such device here[/]")
            continue
        chosen = f"[green]{row['backend']}[/]" if row["backend"] else "[red]none[/]"
        console.print(f"[bold]{'op':<{width}}[/]{place}: {chosen}, {row['why']}")
        for other in row["alternatives"]:
            why = other["reason"] or other["note"] or "can run too"
            console.print(f"{'':<{width}}  [dim]{other['backend']}: {why}[/]")
    for name, value in report.environment.items():
        console.print(f"[bold]{'variable':<{width}}[/]{name}={value} [dim]{VARIABLES[name]}[/]")
    if not report.environment:
        console.print(f"[bold]{'variable':<{width}}[/][dim]none set of {', '.join(VARIABLES)}[/]")
    for check in report.checks:
        verdict = f"[red]{check.failure}[/]" if check.failure else "[green]right[/]"
        detail = f"{check.calls} calls, worst relative error {check.worst:.1e}, {check.path}"
        console.print(
            f"[bold]{'self-test':<{width}}[/]{check.op} on {check.device}: {verdict} [dim]({detail})[/]"
        )
    console.print("[bold green]all usable[/]" if report.usable else "[bold red]not all usable[/]")


def _libraries(status: _lib.Status, gpu: bool) -> list[tuple[_lib.Library, bool]]:
    return [(status.cpu, True), (status.host, True), (status.cuda, gpu and status.cuda.path.exists())]


def _library(entry: _lib.Library, needed: bool) -> dict[str, Any]:
    return {
        "name": entry.name,
        "path": str(entry.path),
        "loaded": entry.loaded,
        "reason": entry.reason,
        "needed": needed,
    }


def _built(build: dict[str, Any]) -> str:
    nvcc = f"nvcc {build['nvcc']}" if build["nvcc"] else "no nvcc"
    source = build["commit"] or "an unknown commit"
    return f"from {source}, by {build['compiler']} and {nvcc}, with the headers of torch {build['torch']}"


def _cuda(images: tuple[str, ...], gpu: bool) -> dict[str, Any]:
    built = ", ".join(images) or "none"
    if not gpu:
        return {
            "images": list(images),
            "gpu": None,
            "summary": f"none seen by torch; images in the binary: {built}",
        }
    major, minor = torch.cuda.get_device_capability()
    name = torch.cuda.get_device_name()
    return {
        "images": list(images),
        "gpu": f"{name}, sm_{major}{minor}",
        "summary": f"{name}, sm_{major}{minor}; images in the binary: {built}",
    }


def _choice(row: backends.Row, gpu: bool) -> dict[str, Any]:
    return {
        "op": row.op,
        "device": row.device,
        "dtype": str(row.dtype).removeprefix("torch."),
        "backend": row.backend,
        "why": row.why,
        "alternatives": [dataclasses.asdict(other) for other in row.alternatives],
        "present": row.device == "cpu" or gpu,
    }


def _self_test(spec: registry.OpSpec, device: str) -> Check:
    """The op's own samples in fp32, forward, for about a second."""
    calls, worst, path, failure = 0, 0.0, "", ""
    end = time.perf_counter() + SELF_TEST_SECONDS
    for sample in spec.samples(device, torch.float32):
        if time.perf_counter() > end:
            break
        try:
            with torch.no_grad():
                torch.manual_seed(0)  # an op that drops weights drops the same ones in both
                got = spec.public(*sample.args, **sample.kwargs)
                path = backends.last()
                torch.manual_seed(0)
                expected = spec.reference(*sample.args, **sample.kwargs)
        except RuntimeError as error:
            failure = f"{sample.name}: {str(error).partition(chr(10))[0]}"
            continue
        calls += 1
        off = _relative_error(_first(got), _first(expected))
        worst = max(worst, off)
        if not off < 1e-4:
            failure = f"{sample.name}: relative error {off:.1e}"
    return Check(spec.name, device, calls, worst, path, failure)


def _first(result: Any) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else result[0]


def _relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.double()
    norm = expected.norm().item()
    return (got.double() - expected).norm().item() / (norm or 1.0)
