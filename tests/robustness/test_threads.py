"""Ops from many threads, in worker processes and inside parallel regions: the bits of a single-threaded program."""

from __future__ import annotations

import ctypes
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from robust_calls import Call, calls, digest, script
from robust_fuzz import Plan
from robust_tally import count

from effkern import _host

AREA = "threads and processes"
THREADS = 8


@pytest.fixture(scope="module")
def expected() -> list[tuple[Call, str]]:
    """Every call, and the digest of its results on one thread of one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    found = [(call, digest(call.results())) for call in calls()]
    torch.set_num_threads(before)
    return found


@pytest.fixture(autouse=True)
def _several(threads: Callable[[int], None]) -> None:
    threads(2)


def crowd(expected: list[tuple[Call, str]], rounds: int, meanwhile: Callable[[], None] | None = None) -> int:
    """Eight threads make every call, each in an order of its own; returns how many calls were compared."""
    start = threading.Barrier(THREADS)
    over = threading.Event()

    def work(number: int) -> int:
        order = random.Random(number)
        start.wait()
        made = 0
        for _ in range(rounds):
            for call, wanted in order.sample(expected, len(expected)):
                assert digest(call.results()) == wanted, f"{call}: other bits beside other threads"
                made += 1
        return made

    def bother() -> None:
        while not over.is_set():
            meanwhile()  # type: ignore[misc]

    with ThreadPoolExecutor(THREADS + 1) as pool:
        other = pool.submit(bother) if meanwhile else None
        try:
            made = sum(pool.map(work, range(THREADS)))
        finally:
            over.set()
        if other:
            other.result()
    return made


def test_eight_threads_at_once(expected: list[tuple[Call, str]], plan: Plan) -> None:
    made = crowd(expected, rounds=6 if plan.nightly else 1)
    count(AREA, "8 threads call every op at once", right=made)


def test_thread_count_changes_meanwhile(expected: list[tuple[Call, str]], plan: Plan) -> None:
    """set_num_threads from another thread while eight compute."""
    number = random.Random(0)

    def change() -> None:
        torch.set_num_threads(number.randint(1, 6))
        time.sleep(0.002)

    some = expected if plan.nightly else expected[::3]
    made = crowd(some, rounds=3 if plan.nightly else 1, meanwhile=change)
    count(AREA, "torch.set_num_threads while 8 threads compute", right=made)


@pytest.mark.parametrize("number", [2, 16])
def test_thread_count_changes_between_calls(
    number: int, expected: list[tuple[Call, str]], threads: Callable[[int], None]
) -> None:
    threads(number)
    for call, wanted in expected:
        assert digest(call.results()) == wanted, f"{call}: other bits on {number} threads"
    count(AREA, "torch.set_num_threads between calls", right=len(expected))


def test_level_changes_between_calls(expected: list[tuple[Call, str]]) -> None:
    """The CPU level is process-wide; changing it back and forth leaves nothing behind."""
    try:
        for level in (*_host.isa_levels(), *_host.isa_levels()):
            _host.isa_force(level)
            for call, _ in expected[::17]:
                call.results()
    finally:
        _host.isa_force(None)
    for call, wanted in expected:
        assert digest(call.results()) == wanted, f"{call}: other bits after other CPU levels"
    count(AREA, "CPU level changed between calls", right=len(expected))


def openmp() -> ctypes.CDLL:
    """The OpenMP library that torch has loaded, for parallel regions around our calls."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "libgomp" in line:
            return ctypes.CDLL(line.split(maxsplit=5)[5])
    pytest.skip("torch does not use GCC's OpenMP here")


def test_nested_parallelism(expected: list[tuple[Call, str]]) -> None:
    """Each thread of an OpenMP region, which is what at::parallel_for opens, calls the ops: they run serially there."""
    some = expected[::4]
    found: list[list[str]] = []
    region = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

    @region
    def body(_: int | None) -> None:
        # An exception would be printed and ignored here: then a result is missing.
        found.append([digest(call.forward()) for call, _ in some])

    wanted = [digest(call.forward()) for call, _ in some]
    openmp().GOMP_parallel(body, None, 3, 0)
    assert len(found) == 3 and all(each == wanted for each in found)
    count(AREA, "calls inside an OpenMP parallel region of 3 threads", right=3 * len(some))


def test_inside_autograd_threads(expected: list[tuple[Call, str]]) -> None:
    """Ops called by a backward function, from eight threads that differentiate one graph each."""
    some = expected[::4]

    class Inside(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
            with torch.enable_grad():
                for call, wanted in some:
                    assert digest(call.results()) == wanted, f"{call}: other bits inside a backward"
            return grad

    def differentiate(_: int) -> None:
        x = torch.ones(3, requires_grad=True)
        Inside.apply(x).sum().backward()

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(differentiate, range(THREADS)))
    count(AREA, "calls inside a backward, from 8 threads", right=THREADS * len(some))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers(method: str) -> None:
    """Forked workers of a DataLoader after the parent has used its threads, and spawned ones of a pool."""
    done = script("robust_workers.py", method)
    assert done.returncode == 0, done.stderr
    kind = {"fork": "forked workers of a DataLoader", "spawn": "spawned workers of a process pool"}[method]
    count(AREA, kind, right=int(done.stdout))
