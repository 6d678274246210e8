"""What programs on a GPU rely on, for every op: the same bits in every run, on any stream and from a captured graph,
and a process that goes on after the memory ran out. `scripts/gpu_check.sh` runs it as its stage `program`."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from robust_calls import Call, calls
from test_contract import floating, tensors, with_leaves
from torch import Tensor

from effkern import backends
from effkern.ops import registry

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.plain_empty,  # filling would be part of what is captured
]

registry.discover()
AUTOMATIC = "automatic"
REPEATS = 50
# What these return or refuse depends on numbers that have to be read back, which no graph can do.
READ_BACK = {"kmeans_init": "runs on the host", "palettize": "refuses weights that are not finite"}


@dataclass(frozen=True)
class Program:
    """One op on one GPU backend, or on the one that is chosen."""

    spec: registry.OpSpec
    backend: str

    def __str__(self) -> str:
        return f"{self.spec.name}-{self.backend}"

    @contextlib.contextmanager
    def forced(self) -> Iterator[None]:
        with backends.force(None if self.backend == AUTOMATIC else self.backend):
            yield

    def calls(self) -> list[Call]:
        """Those that the backend takes; they have run once, so that kernels are compiled."""
        found = []
        for call in calls("cuda", self.spec):
            with contextlib.suppress(backends.Unavailable):
                results(call)
                found.append(call)
        torch.cuda.synchronize()
        return found or pytest.skip(f"{self} takes no call")


@pytest.fixture(
    params=[
        Program(spec, name)
        for spec, name in itertools.product(registry.specs(), (AUTOMATIC, "triton", "cuda"))
        if name == AUTOMATIC or name in [backend.name for backend in spec.backends]
    ],
    ids=str,
)
def program(request: pytest.FixtureRequest) -> Iterator[Program]:
    with request.param.forced():
        yield request.param


def results(call: Call) -> list[Tensor]:
    """Outputs, and the gradients of their sum of cosines; unlike `Call.results`, seeds no generator."""
    outputs = call.forward()
    if not call.spec.double_backward or not floating(outputs):
        return outputs
    sample = with_leaves(call.spec, call.sample)
    values = floating(call.spec.public(*sample.args, **sample.kwargs))
    leaves = [t for t in floating((sample.args, sample.kwargs)) if t.requires_grad]
    gradients = torch.autograd.grad(sum(v.float().cos().sum() for v in values), leaves)  # type: ignore[arg-type]
    return [*outputs, *gradients]


def same_bits(found: list[Tensor], expected: list[Tensor], what: object) -> None:
    for one, other in zip(found, expected, strict=True):
        bits = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (one, other)]
        assert torch.equal(*bits), f"{what}: other bits"


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Only warnings where PyTorch's own operations have no deterministic form."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
def test_repeats_have_the_same_bits(program: Program) -> None:
    for call in program.calls():
        expected = results(call)
        for _ in range(REPEATS):
            same_bits(results(call), expected, call)


@pytest.mark.usefixtures("deterministic")
def test_streams(program: Program) -> None:
    """Two side streams at once, while the default stream is busy."""
    made = program.calls()
    expected = [results(call) for call in made]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    busy = torch.randn(4096, 4096, device="cuda")
    for _ in range(4):
        busy = busy @ busy / 64
    found: list[list[list[Tensor]]] = [[], []]
    for call, (number, stream) in itertools.product(made, enumerate(streams)):
        with torch.cuda.stream(stream):
            found[number].append(results(call))
    torch.cuda.synchronize()
    for number, (call, wanted) in itertools.product((0, 1), enumerate(expected)):
        same_bits(found[number][call], wanted, made[call])


@pytest.mark.usefixtures("deterministic")
def test_captured_graph(program: Program) -> None:
    """Forward and backward in one graph, which is replayed on other numbers in the same memory."""
    if program.spec.name in READ_BACK:
        pytest.skip(f"{program.spec.name} {READ_BACK[program.spec.name]}")
    for call in program.calls():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # as PyTorch's manual asks, before a backward is captured
            results(call)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = results(call)
        for tensor in tensors((call.sample.args, call.sample.kwargs)):
            if tensor.is_floating_point() and tensor.dim() and 0 not in tensor.stride():
                tensor.data.copy_(tensor.data.flip(0))
        graph.replay()
        torch.cuda.synchronize()
        same_bits(captured, results(call), call)


def block(size: int) -> Tensor | None:
    try:
        return torch.empty(size, dtype=torch.uint8, device="cuda")
    except torch.OutOfMemoryError:
        return None


def is_refused(call: Call) -> bool:
    try:
        results(call)
    except RuntimeError:  # torch.OutOfMemoryError is one, and what the stable ABI makes of it another
        return True
    return False


@pytest.fixture
def no_memory() -> Iterator[None]:
    """All memory that this process may have is taken."""
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (64 << 20)) / total)
    hold, size = [], 64 << 20
    while size >= 512:  # the smallest block there is
        taken = block(size)
        if taken is None:
            size //= 2
        else:
            hold.append(taken)
    yield
    hold.clear()
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@pytest.mark.usefixtures("deterministic")
def test_out_of_memory(program: Program, request: pytest.FixtureRequest) -> None:
    made = program.calls()
    expected = [results(call) for call in made]
    request.getfixturevalue("no_memory")
    assert [call for call in made if is_refused(call)]
    torch.cuda.set_per_process_memory_fraction(1.0)
    for call, wanted in zip(made, expected):
        same_bits(results(call), wanted, call)
