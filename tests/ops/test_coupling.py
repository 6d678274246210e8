"""Couplings against PyTorch's multiplication, addition and rounding, bit for bit, on every CPU level."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import effkern
from effkern.ops import coupling as ops
from effkern.ops.coupling import couple

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
# One vector, its neighbours, the block of widened numbers, a stretch of a thread.
SHAPES = [(1,), (3, 5), (8,), (2, 1, 17), (511,), (512,), (4, 257), (32_768 + 13,), (0, 4), ()]


def composed(
    f: Tensor,
    y: Tensor | None = None,
    x: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    subtract: bool = False,
    q: int | None = None,
    keep: float | None = None,
) -> list[Tensor]:
    """What was asked for, by the definition: steps of float32, one result of each."""
    kinds = {t.dtype for t in (f, y, x) if t is not None}
    dtype = kinds.pop() if len(kinds) == 1 and q is None else torch.float32
    result = f.float()
    if x is not None:
        scaled = torch.mul(x.float(), torch.tensor(alpha))
        result = torch.add(result, scaled)
    if q is not None:
        # Halves and products with powers of two are exact in float64.
        wide = torch.round(torch.mul(result, 2.0**q).double())
        result = torch.mul(wide.float(), 2.0**-q)
    if y is not None:
        scaled = torch.mul(y.float(), torch.tensor(beta))
        result = torch.sub(scaled, result) if subtract else torch.add(scaled, result)
    found = [result.to(dtype)]
    if keep is not None:
        assert x is not None
        found.append(torch.mul(x.float(), torch.tensor(keep)).to(x.dtype))
    if q is not None:
        found.append(result.abs().amax() if result.numel() else torch.tensor(0.0))
    return found


def same_bits(actual: Tensor, expected: Tensor) -> None:
    """Signs of zeros included; of a NaN only that it is one."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert torch.equal(actual.isnan(), expected.isnan())
    ours, theirs = (t.masked_fill(t.isnan(), 0.0).view(BITS[t.dtype]) for t in (actual, expected))
    differs = ours != theirs
    assert not differs.any(), f"{actual[differs][:3]} should be {expected[differs][:3]}"


def check(
    f: Tensor, y: Tensor | None = None, x: Tensor | None = None, backend: str | None = None, **how: object
) -> None:
    found = effkern.coupling(f, y, x, backend=backend, **how)  # type: ignore[arg-type]
    ours = list(found) if isinstance(found, tuple) else [found]
    expected = composed(f, y, x, **how)  # type: ignore[arg-type]
    assert len(ours) == len(expected)
    for a, e in zip(ours, expected):
        same_bits(a, e)


# Every way in which a reversible block calls the op; f, y, x as the names say.
WAYS: dict[str, tuple[str, dict[str, object]]] = {
    "add": ("fy", {}),
    "subtract": ("fy", {"subtract": True}),
    "add on a grid": ("fy", {"q": 14}),
    "subtract on a grid": ("fy", {"q": 14, "subtract": True}),
    "round": ("f", {"q": 6}),
    "round what is scaled": ("fx", {"q": 6, "alpha": 0.3}),
    "sum without a stream": ("fx", {"alpha": 0.3}),
    "dual": ("fyx", {"alpha": 0.3}),
    "dual, kept": ("fyx", {"alpha": 0.3, "keep": 0.7}),
    "dual, undone": ("fyx", {"alpha": 0.3, "subtract": True}),
    "dual on a grid": ("fyx", {"alpha": 0.3, "q": 12}),
    "dual on a grid, kept": ("fyx", {"alpha": -0.3, "q": 0, "keep": -1.1}),
    "dual on a grid, undone": ("fyx", {"alpha": 0.3, "q": 23, "subtract": True}),
    "gradient": ("fyx", {"alpha": 0.3, "beta": 0.7}),
    "all": ("fyx", {"alpha": -1.3, "beta": 0.7, "subtract": True, "q": 3, "keep": 0.1}),
}


def make(names: str, shape: tuple[int, ...], dtype: torch.dtype, streams: torch.dtype) -> list[Tensor | None]:
    made: dict[str, Tensor] = {"f": (3 * torch.randn(shape)).to(dtype)}
    made |= {name: (3 * torch.randn(shape)).to(streams) for name in "yx"}
    return [made[name] if name in names else None for name in "fyx"]


@pytest.mark.sanitize
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("dtype", "streams"), list(product(DTYPES, DTYPES)), ids=lambda d: str(d)[6:])
def test_same_bits_as_pytorch(way: str, dtype: torch.dtype, streams: torch.dtype, isa: str) -> None:
    names, how = WAYS[way]
    for shape in SHAPES:
        check(*make(names, shape, dtype, streams), **how)  # type: ignore[arg-type]
        assert effkern.backends.last().startswith("coupling:cpu/")
        check(*make(names, shape, dtype, streams), backend="reference", **how)  # type: ignore[arg-type]


def test_three_dtypes_at_once(isa: str) -> None:
    f, y, x = (torch.randn(700).to(dtype) for dtype in (torch.bfloat16, torch.float32, torch.float16))
    for args in ((f, y, x), (y, x, f), (x, f, y), (f, x, f)):
        check(*args, alpha=0.3, keep=0.7)
        check(*args, alpha=0.3, q=9)


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_numbers(data: st.DataObject, isa: str) -> None:
    """Ties, subnormal numbers, zeros of both signs, infinities and NaN among them."""
    draw = data.draw
    count = draw(st.integers(1, 40))
    special = [0.0, -0.0, 0.5, -0.5, 1.5, 2.5, 8388607.5, 3e38, -3e38, 1e-40, math.inf, -math.inf, math.nan]
    number = st.one_of(st.sampled_from(special), st.floats(width=32))
    f, y, x = (
        torch.tensor(draw(st.lists(number, min_size=count, max_size=count))).to(draw(st.sampled_from(DTYPES)))
        for _ in range(3)
    )
    names, how = WAYS[draw(st.sampled_from(sorted(WAYS)))]
    args = [t if name in names else None for name, t in zip("fyx", (f, y, x))]
    check(*args, **how)  # type: ignore[arg-type]


def test_rounds_to_nearest_even(isa: str) -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 0.74, 3.0, -0.1, 0.1]) / 4
    rounded, largest = effkern.coupling(x, q=2)
    same_bits(rounded, torch.tensor([0.0, 0.5, 0.5, -0.0, -0.5, 0.25, 0.75, -0.0, 0.0]))
    assert largest.shape == () and largest.item() == 0.75
    big = torch.tensor([2.0**23 - 0.5, 2.0**23 + 1, -(2.0**24) - 2, 2.0**100])
    same_bits(effkern.coupling(big, q=0)[0], torch.tensor([2.0**23, 2.0**23 + 1, -(2.0**24) - 2, 2.0**100]))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_a_grid_is_undone_exactly(dtype: torch.dtype, isa: str) -> None:
    """While |out| < 2^(24 - q), which `largest` says."""
    for q in (0, 9, 14, 20):
        stream = effkern.coupling(torch.randn(1000), q=q)[0]
        f, x = torch.randn(1000).to(dtype), torch.randn(1000)
        for how in ({}, {"x": x, "alpha": 0.3}):
            out, largest = effkern.coupling(f, stream, q=q, **how)  # type: ignore[arg-type]
            assert largest < 2.0 ** (24 - q)
            same_bits(
                effkern.coupling(f, out, q=q, subtract=True, **how)[0],  # type: ignore[arg-type]
                stream + 0.0,
            )
    _, largest = effkern.coupling(torch.tensor([1024.0]), torch.tensor([-1.0]), q=14)
    assert largest.item() == 1023
    assert effkern.coupling(torch.tensor([-1025.0]), torch.tensor([1.0]), q=14)[1].item() == 1024


@pytest.mark.parametrize("place", [0, 5, 7, 8, 511, 40_000, 70_001, 70_002])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1e30])
def test_the_largest_magnitude_is_found_anywhere(value: float, place: int, isa: str) -> None:
    f = torch.randn(70_003)
    f[place] = value
    largest = effkern.coupling(f, torch.zeros_like(f), q=10)[1]
    torch.testing.assert_close(largest, torch.tensor(abs(value)), equal_nan=True, rtol=1e-6, atol=0)


def test_padding_of_the_last_vector_does_not_count(isa: str) -> None:
    """0 times an infinite alpha would be NaN."""
    f, x = torch.zeros(3), torch.ones(3)
    out, largest = effkern.coupling(f, None, x, alpha=math.inf, q=4)
    assert out.tolist() == [math.inf] * 3 and largest.item() == math.inf


def test_strides_and_overlap(isa: str) -> None:
    wide = torch.randn(6, 40, 9)
    for f in (wide.mT, wide[:, ::3], wide[:1].expand(6, 40, 9), wide.permute(2, 0, 1)):
        y, x = torch.randn(f.shape), wide[0, 0, 0].expand(f.shape)
        check(f, y, x, alpha=0.3, q=10)
        check(f, y.mT.contiguous().mT, x, alpha=0.3, keep=2.0)
    check(wide, wide, wide, alpha=0.3)


def test_same_bits_for_any_number_of_threads(threads: Callable[[int], None]) -> None:
    f, y, x = torch.randn(3, 200_003)
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(effkern.coupling(f, y, x, alpha=0.3, q=12))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


def test_no_gradients() -> None:
    f, y = torch.randn(2, 5, requires_grad=True)
    assert not effkern.coupling(f, y).requires_grad  # type: ignore[union-attr]
    assert not effkern.coupling(f, y, backend="reference").requires_grad  # type: ignore[union-attr]


def test_float64_through_the_reference() -> None:
    f, y, x = torch.randn(3, 50, dtype=torch.float64)
    out, kept = effkern.coupling(f, y, x, alpha=0.3, keep=0.7)
    assert effkern.backends.last() == "coupling:reference"
    assert torch.equal(out, f + x * 0.3 + y) and torch.equal(kept, x * 0.7)
    assert effkern.coupling(f.float(), y).dtype == torch.float64  # type: ignore[union-attr]
    rounded, _ = effkern.coupling(f, y, q=10)
    same_bits(rounded, composed(f.float(), y.float(), q=10)[0])
    rounded, kept, _ = effkern.coupling(f.bfloat16(), y, x, q=10, alpha=0.3, keep=0.7)
    same_bits(rounded, composed(f.bfloat16(), y.float(), x.float(), 0.3, q=10)[0])
    assert torch.equal(kept, x * 0.7)


@pytest.mark.parametrize("way", WAYS)
def test_what_runs_on_a_gpu(way: str) -> None:
    """The composition of the key CUDA, called on the CPU, and its layout."""
    names, how = WAYS[way]
    args = [None if t is None else t.mT for t in make(names, (4, 6), torch.bfloat16, torch.float32)]
    found = ops._composed(*ops._Call(*args, **how))  # type: ignore[arg-type]
    expected = couple(*args, **how)  # type: ignore[arg-type]
    for a, e in zip(found, expected):
        assert a.dtype == e.dtype and a.stride() == e.stride() and torch.equal(a, e)


def test_errors_of_the_dispatcher_op() -> None:
    """Where Python has not looked first."""
    op, f = torch.ops.effkern.coupling, torch.ones(2, 3)
    for args, match in (
        ((f,), "expected y, x or q beside f"),
        ((f, f.double()), "y must be float32, bfloat16 or float16, got float64"),
        ((f, f[:1]), r"y has shape \(1, 3\), f has \(2, 3\)"),
        ((f, f, f, 1.0, 1.0, False, 24), "q must be from 0 to 23, got 24"),
        ((f, None, f, 1.0, 1.0, True), "subtract needs y"),
        ((f, f, None, 1.0, 1.0, False, None, 0.5), "keep needs x"),
    ):
        with pytest.raises(RuntimeError, match=match):
            op(*args)
