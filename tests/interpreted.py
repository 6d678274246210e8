"""Triton kernels under the interpreter: which machines can, and cases that run in a process of their own.

TRITON_INTERPRET is read when a kernel is defined and holds for the process. So a test module runs itself as a script,
all its cases in one go, and each test looks up its own verdict in the fixture `verdicts` of tests/conftest.py. fp32
only: the interpreter's bf16 products are wrong.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch


def _release(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in importlib.metadata.version(package).split(".")[:2])


def _triton_missing() -> str:
    return "" if importlib.util.find_spec("triton") else "triton is not installed"


def _interpreter_missing() -> str:
    if not _triton_missing() and _release("triton") < (3, 7) and _release("numpy") >= (2, 4):
        return "the interpreter of triton before 3.7 does not work with numpy 2.4 or later"
    return _triton_missing()


def _device_missing() -> str:
    return _triton_missing() or ("" if torch.cuda.is_available() else "no CUDA device")


def _needs(missing: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(bool(missing), reason=missing or "never")


needs_triton = _needs(_triton_missing())
needs_interpreter = _needs(_interpreter_missing())
needs_device = _needs(_device_missing())
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:]
)


def verdicts(module: str) -> dict[str, str]:
    """Runs the file `module`, whose main calls `report`, under the interpreter; the verdict of each of its cases."""
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    child = subprocess.run(
        [sys.executable, str(Path(module).resolve())],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert child.returncode == 0, child.stderr[-4000:]
    return json.loads(child.stdout.splitlines()[-1])


def settle(verdict: str) -> None:
    """Passes, skips or fails the test that a verdict belongs to."""
    if verdict.startswith("skipped: "):
        pytest.skip(verdict.removeprefix("skipped: "))
    if "mask has unsupported dtype" in verdict and _release("triton") > (3, 7):
        pytest.xfail("this interpreter makes a mask of 32-bit numbers of a block's mask & a scalar condition")
    assert not verdict, verdict


def report(cases: Mapping[str, Callable[[], object]]) -> None:
    """Runs every case with the same seed and prints the verdicts: "", the traceback, or why it was skipped."""
    torch.set_num_threads(1)  # the interpreter's products are small; threads would only wait for each other
    found = {}
    for name, case in cases.items():
        torch.manual_seed(0)
        try:
            case()
        except Exception as error:  # noqa: BLE001  a failure belongs to the test of that name
            # The allocator refuses what a small machine cannot reserve.
            refused = isinstance(error, RuntimeError) and "allocate memory" in str(error)
            found[name] = f"skipped: {error}" if refused else traceback.format_exc()
        else:
            found[name] = ""
    print(json.dumps(found))
