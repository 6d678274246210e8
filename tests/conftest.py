"""Fixtures of every test: fresh seed, NaN-filled empty memory, and thread count, CPU level and backend put back."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import interpreted
import pytest
import torch

import effkern
from effkern import _host

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
# A level forced from outside is the only one: who asks for it has the others from another run.
LEVELS = [os.environ["EFFKERN_CPU_ISA"]] if os.environ.get("EFFKERN_CPU_ISA") else _host.isa_levels()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("robustness", "tests/robustness")
    modes = {"choices": ["ci", "nightly"], "default": "ci"}
    group.addoption(
        "--robustness", help="how long they run: ci, about a minute, or nightly, ten and more", **modes
    )
    group.addoption("--robustness-minutes", type=float, default=10.0, help="how long nightly takes, about")
    group.addoption("--robustness-seed", type=int, default=0, help="where the fuzzers start")
    group.addoption(
        "--robustness-report", metavar="FILE", help="print the faults survived, and write FILE (JSON)"
    )
    group.addoption("--large", action="store_true", help="run the tests of more than 2^31 elements, too")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "plain_empty: torch.empty leaves its memory alone in this test")
    config.addinivalue_line(
        "markers", "each_level: repeated on every CPU level (set by the fixtures isa, route)"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if {"isa", "route"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("each_level")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nan_filled_empty(request: pytest.FixtureRequest) -> Iterator[None]:
    """Opt out with @pytest.mark.plain_empty, where a test reserves memory that it must not touch."""
    if request.node.get_closest_marker("plain_empty"):
        yield
        return
    with effkern.testing.nan_filled_empty():
        yield


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Most tests are too small for more, and threads that wait for each other cost what they should save."""
    torch.set_num_threads(1)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """A function that sets torch's thread count until the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=LEVELS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each CPU level this machine can run, or the one of EFFKERN_CPU_ISA, forced for the length of the test."""
    _host.isa_force(request.param)
    yield request.param
    _host.isa_force(None)


@dataclass(frozen=True)
class Route:
    """A way through the dispatcher that a test takes on purpose, and how the path trace names it."""

    device: str
    unit: str  # the CPU level, or the backend on a GPU

    def check(self, op: str, dtype: torch.dtype) -> None:
        """Asserts that the last call of `op` went this way."""
        expected = f"{op}:{self.unit}"
        if self.device == "cpu":
            unit = self.unit
            if dtype != torch.bfloat16 and unit in ("avx512_bf16", "amx"):
                unit = "avx512"  # those two levels only add bfloat16 units
            expected = f"{op}:cpu/{unit}"
        last = effkern.backends.last()
        assert last == expected or last.startswith(f"{expected}/"), f"took {last}, not {expected}"


_ROUTES = [f"cpu/{level}" for level in LEVELS]
if torch.cuda.is_available():
    _ROUTES += ["cuda/triton", "cuda/cuda"]


@pytest.fixture(params=_ROUTES)
def route(request: pytest.FixtureRequest) -> Iterator[Route]:
    """Every CPU level of this machine and every GPU backend, forced one after the other."""
    device, unit = request.param.split("/")
    if device == "cpu":
        _host.isa_force(unit)
        yield Route(device, unit)
        _host.isa_force(None)
        return
    sizes = {"head_dim": 64, "value_dim": 64}
    try:
        effkern.backends.select("attention", device, torch.bfloat16, sizes, unit)
    except effkern.backends.Unavailable as reason:
        pytest.skip(str(reason))
    with effkern.backends.force(unit):
        yield Route(device, unit)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def verdicts(request: pytest.FixtureRequest) -> dict[str, str]:
    """What the cases of a test module came to under Triton's interpreter (tests/interpreted.py)."""
    return interpreted.verdicts(str(request.path))
