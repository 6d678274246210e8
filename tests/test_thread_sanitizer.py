"""`make tsan` proves something only when its set-up reports a race, and stays silent about what is in order."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    "libtsan" not in os.environ.get("LD_PRELOAD", ""), reason="runs under `make tsan`"
)

SOURCE = Path(__file__).with_name("tsan_race.c")
REPORTED = 66  # the exit status of a program in which the sanitizer has found something
CALL = "import ctypes, sys, torch; print(getattr(ctypes.CDLL(sys.argv[1]), sys.argv[2])(1000))"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("race") / "race.so"
    compiler = [os.environ.get("CC", "cc"), "-O1", "-g", "-fsanitize=thread", "-fopenmp", "-shared", "-fPIC"]
    subprocess.run([*compiler, "-o", built, SOURCE], check=True, env=os.environ | {"LD_PRELOAD": ""})
    return built


@pytest.mark.parametrize(("function", "status"), [("sum_with_a_race", REPORTED), ("sum_without", 0)])
def test_races_in_parallel_regions_are_seen(library: Path, function: str, status: int) -> None:
    done = subprocess.run([sys.executable, "-c", CALL, library, function], capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert ("data race" in done.stderr) == (status == REPORTED)
