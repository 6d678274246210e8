"""Tensors of more than 2^31 elements, where a 32-bit index would wrap around. Only with --large: gibibytes and minutes.

What comes out is held against small calls on pieces at the start, around element 2^31, and at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from robust_tally import count
from torch import Tensor

import effkern
from effkern import backends
from effkern.ops import registry

pytestmark = [pytest.mark.slow, pytest.mark.plain_empty]
AREA, FAULT = "large tensors", "more than 2^31 elements"
WRAP = 1 << 31


def available() -> int:
    """Bytes that can be had without swapping; 0 where the system does not say."""
    path = Path("/proc/meminfo")
    if not path.exists():
        return 0
    lines = dict(line.split(":", 1) for line in path.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) << 10


@pytest.fixture(params=["cpu", *(["cuda/triton", "cuda/cuda"] if torch.cuda.is_available() else [])])
def room(
    request: pytest.FixtureRequest, threads: Callable[[int], None]
) -> Iterator[Callable[[str, int], None]]:
    """Puts tensors on a device, where one of its backends is forced, and gives a function that skips the test where
    that one does not run an op, or where fewer gibibytes than it asks for are free."""
    if not request.config.getoption("--large"):
        pytest.skip("takes gibibytes of memory and minutes: ask for it with --large")
    device, _, backend = request.param.partition("/")

    def need(op: str, gibibytes: int) -> None:
        try:
            backends.select(op, device, torch.bfloat16, registry.get(op).sizes)
        except backends.Unavailable as reason:
            pytest.skip(str(reason))
        free = (available() if device == "cpu" else torch.cuda.mem_get_info()[0]) / 2**30
        if free < gibibytes + 1:
            pytest.skip(f"needs {gibibytes} GiB and one to spare, {free:.1f} GiB are free")

    threads(2)
    with torch.device(device), backends.force(backend or None):
        yield need
    if device == "cuda":
        torch.cuda.empty_cache()


def pattern(rows: int, columns: int) -> Tensor:
    """bfloat16 (rows, columns): numbers that repeat after a prime number of rows, so that no two pieces are alike."""
    period = torch.randn(997, columns).bfloat16()
    made = torch.empty(rows, columns, dtype=torch.bfloat16)
    for begin in range(0, rows, 997):
        made[begin : begin + 997] = period[: min(997, rows - begin)]
    return made


def pieces(rows: int, columns: int, size: int = 5) -> list[slice]:
    middle = WRAP // columns
    return [slice(0, size), slice(middle - size, middle + size), slice(rows - size, rows)]


def same_rows(large: Tensor, parts: Sequence[slice], small: Callable[[slice], Tensor]) -> None:
    assert large.numel() > WRAP
    for part in parts:
        torch.testing.assert_close(large[part], small(part), rtol=1.6e-2, atol=1e-2)
    count(AREA, FAULT, right=1)


def test_coupling(room: Callable[[str, int], None]) -> None:
    room("coupling", 9)
    rows, columns = (1 << 19) + 10, 4096
    f = pattern(rows, columns)
    summed = effkern.coupling(f, f)
    assert isinstance(summed, Tensor)
    same_rows(summed, pieces(rows, columns), lambda part: f[part] + f[part])


def test_block_diagonal_product(room: Callable[[str, int], None]) -> None:
    room("block_diag_matmul", 9)
    rows, columns = (1 << 21) + 10, 1024
    x, w = pattern(rows, columns), torch.randn(64, 16, 16).bfloat16()
    out = effkern.block_diag_matmul(x, w)
    same_rows(out, pieces(rows, columns), lambda part: effkern.block_diag_matmul(x[part], w))


def test_gradients_of_a_block_diagonal_product(room: Callable[[str, int], None]) -> None:
    """Rows repeat: the gradient of the weight is that of one period, times the periods, and what is left over."""
    room("block_diag_matmul", 15)
    rows, columns = (1 << 21) + 10, 1024
    x = pattern(rows, columns).requires_grad_()
    w = (0.1 * torch.randn(64, 16, 16)).bfloat16().requires_grad_()

    def gradients(part: slice) -> tuple[Tensor, ...]:
        few = x.detach()[part].requires_grad_()
        return torch.autograd.grad(effkern.block_diag_matmul(few, w), (few, w), few.detach())

    grad_x, grad_w = torch.autograd.grad(effkern.block_diag_matmul(x, w), (x, w), x.detach())
    same_rows(grad_x, pieces(rows, columns), lambda part: gradients(part)[0])
    period, rest = gradients(slice(0, 997))[1].double(), gradients(slice(0, rows % 997))[1].double()
    expected = rows // 997 * period + rest
    torch.testing.assert_close(
        grad_w.double(), expected, rtol=1.6e-2, atol=1e-2 * float(expected.abs().max())
    )


def test_palettized_product(room: Callable[[str, int], None]) -> None:
    """More than 2^31 outputs of few inputs."""
    room("palettized_linear", 5)
    rows, columns = (1 << 17) + 10, 1 << 14
    weight = torch.randn(columns, 4)
    with backends.force(None):  # what is forced has no kernel for this
        palette = effkern.palettize(weight, effkern.kmeans_init(weight, 8))
    x = pattern(rows, 4)
    out = effkern.palettized_linear(x, palette)
    same_rows(out, pieces(rows, columns), lambda part: effkern.palettized_linear(x[part], palette))


@pytest.mark.parametrize("name", ["short_conv", "long_conv"])
def test_convolutions(name: str, room: Callable[[str, int], None]) -> None:
    room(name, 9)
    batch, channels, length = 2, 1 << 10, (1 << 20) + 3
    x = pattern(batch * channels, length).view(batch, channels, length)
    taps = torch.randn(channels, 5).bfloat16()
    conv: Any = getattr(effkern, name)
    out = conv(x, taps).view(-1, length)
    parts = [
        slice(0, 1),
        slice(WRAP // length, WRAP // length + 1),
        slice(batch * channels - 1, batch * channels),
    ]

    def small(part: slice) -> Tensor:
        row = x.view(-1, 1, 1, length)[part][0]
        return conv(row, taps[part.start % channels : part.start % channels + 1]).view(1, length)

    same_rows(out, parts, small)


def test_many_queries(room: Callable[[str, int], None]) -> None:
    room("attention", 9)
    heads, queries, dim = 2, (1 << 23) + 5, 128
    q = pattern(heads * queries, dim).view(1, heads, queries, dim)
    k, v = torch.randn(2, 1, heads, 4, dim).bfloat16()
    out = effkern.attention(q, k, v).view(-1, dim)

    def small(part: slice) -> Tensor:
        head = part.start // queries
        rows = q.view(-1, dim)[part].view(1, 1, -1, dim)
        return effkern.attention(rows, k[:, head : head + 1], v[:, head : head + 1]).view(-1, dim)

    same_rows(out, pieces(heads * queries, dim), small)


def test_gradients_of_many_queries(room: Callable[[str, int], None]) -> None:
    room("attention", 15)
    heads, queries, dim = 64, (1 << 18) + 5, 128
    q = pattern(heads * queries, dim).view(1, heads, queries, dim).requires_grad_()
    k, v = (torch.randn(1, heads, 4, dim).bfloat16().requires_grad_() for _ in range(2))
    found = torch.autograd.grad(effkern.attention(q, k, v), (q, k, v), q.detach())
    assert found[0].numel() > WRAP
    for head in (0, heads // 2 - 1, heads // 2, heads - 1):
        few = [t.detach()[:, head : head + 1].requires_grad_() for t in (q, k, v)]
        expected = torch.autograd.grad(effkern.attention(*few), few, few[0].detach())
        for grad, wanted in zip(found, expected):
            torch.testing.assert_close(grad[:, head : head + 1], wanted, rtol=1.6e-2, atol=1e-2)
    count(AREA, FAULT, right=1)


def test_long_cache(room: Callable[[str, int], None]) -> None:
    """Decoding where the last keys of the cache lie beyond 2^31 elements: only those are seen."""
    room("attention_decode", 9)
    capacity, dim = (1 << 24) + 64, 128
    k = pattern(capacity, dim).view(1, 1, capacity, dim)
    q = torch.randn(1, 2, 1, dim).bfloat16()
    assert k.numel() > WRAP
    window = effkern.masks.SlidingWindow(31, 0)
    lengths = torch.tensor([capacity], dtype=torch.int32)
    out = effkern.attention_decode(q, k, k, lengths, mask=window)
    last = k[:, :, -32:]
    near = effkern.attention_decode(q, last, last, torch.tensor([32], dtype=torch.int32))
    assert isinstance(out, Tensor) and isinstance(near, Tensor)
    torch.testing.assert_close(out, near, rtol=1.6e-2, atol=1e-2)
    count(AREA, FAULT, right=1)


def test_clustering(room: Callable[[str, int], None]) -> None:
    """16-bit weights are counted by value: the result is that of the distinct values and how often they occur."""
    room("dkm", 10)
    rows, columns = (1 << 19) + 10, 4096
    weight = pattern(rows, columns)
    centroids = torch.linspace(-2, 2, 8)
    clustered, found = effkern.dkm(weight, centroids, temperature=0.2)
    _, expected = effkern.dkm(weight[: 997 * 4], centroids, temperature=0.2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    same_rows(clustered, pieces(rows, columns), lambda part: clustered[:997][torch.arange(rows)[part] % 997])
