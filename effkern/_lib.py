"""Loads the compiled libraries, and says in one message what to do when that fails."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch

PACKAGE = Path(__file__).resolve().parent
OLDEST_TORCH = "2.11"


@dataclass(frozen=True)
class Library:
    """One compiled file: where it is, whether it is loaded, and if not, why."""

    name: str
    path: Path
    loaded: bool
    reason: str = ""


@dataclass(frozen=True)
class Build:
    """What the binaries were built from and with; empty strings where there was nothing."""

    commit: str = ""  # ends in -dirty where it had changes on top
    torch: str = ""
    compiler: str = ""
    nvcc: str = ""
    cuda_images: tuple[str, ...] = ()
    # By kind: base of every unit, units of every ISA, each ISA, nvcc.
    flags: dict[str, str] = field(default_factory=dict)
    sanitize: bool = False
    emulate: bool = False


@dataclass(frozen=True)
class Status:
    """What `effkern doctor` reports about the libraries."""

    build: Build
    cpu: Library
    host: Library
    cuda: Library


@cache
def load() -> Status:
    """Loads the libraries once.

    The CPU library and the host module are needed: ImportError says what is wrong and what would help. The
    CUDA library is optional and is loaded with a torch that has CUDA, also where no GPU is present.
    """
    cpu = PACKAGE / "lib" / "libeffkern_cpu.so"
    if not cpu.exists():
        raise ImportError(_not_built(cpu))
    try:
        torch.ops.load_library(cpu)
    except OSError as error:
        raise ImportError(_diagnosis(cpu, error)) from error
    return Status(_build(), Library("cpu", cpu, True), _load_host(), _load_cuda())


def status() -> Status:
    """Libraries found and loaded, why one is not, and what they were built with."""
    return load()


def _load_host() -> Library:
    try:
        from effkern import _host
    except ImportError as error:
        others = ", ".join(sorted(path.name for path in PACKAGE.glob("_host.*.so"))) or "none"
        raise ImportError(
            f"effkern: the host module for this Python is missing or broken (modules found: {others}). "
            f"Install effkern again with this Python, or run `make build` in a checkout. ({error})"
        ) from error
    return Library("host", Path(_host.__file__), True)


def _load_cuda() -> Library:
    path = PACKAGE / "lib" / "libeffkern_cuda.so"
    if not path.exists():
        return Library("cuda", path, False, "not built: effkern was built without a CUDA compiler (nvcc)")
    if torch.version.cuda is None:
        return Library("cuda", path, False, f"torch {torch.__version__} is a build without CUDA")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return Library("cuda", path, False, _diagnosis(path, error))
    return Library("cuda", path, True)


@cache
def _build() -> Build:
    path = PACKAGE / "lib" / "build.json"
    if not path.exists():
        return Build()
    facts = json.loads(path.read_text(encoding="utf-8"))
    return Build(
        commit=facts["commit"],
        torch=facts["torch"],
        compiler=facts["compiler"],
        nvcc=facts["nvcc"],
        cuda_images=tuple(facts["cuda_images"]),
        flags=facts["flags"],
        sanitize=facts["sanitize"] != "OFF",
        emulate=facts["emulate"] == "ON",
    )


def _not_built(path: Path) -> str:
    return (
        f"effkern: {path} is missing, so effkern was imported from a source tree that has not been built. "
        "Run `make build` there, or `pip install .`."
    )


def _diagnosis(path: Path, error: OSError) -> str:
    found = f"effkern: {path.name} could not be loaded: {error}."
    if torch.__version__ < OLDEST_TORCH:
        upgrade = f"pip install -U 'torch>={OLDEST_TORCH}'"
        return f"{found} It needs torch >= {OLDEST_TORCH} and this is torch {torch.__version__}: {upgrade}."
    if "undefined symbol" in str(error):
        built = _build().torch or "unknown"
        return (
            f"{found} It was built with torch {built} for the stable ABI of {OLDEST_TORCH}, which torch "
            f"{torch.__version__} should have. Build effkern again with this torch, or report it."
        )
    if "GLIBC" in str(error):
        return f"{found} It was built on a newer system than this one: build effkern here (`pip install .`)."
    return f"{found} Install effkern again, or run `make build` in a checkout."
