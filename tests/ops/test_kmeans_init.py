"""k-means start values: the optimum in one dimension against the dynamic programme, local optima of vectors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import effkern
from effkern.reference import kmeans_init as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FUZZ = settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def check_optimum(weight: Tensor, clusters: int, **kwargs: object) -> Tensor:
    """The cost is that of the oracle; the last place of each centroid is what rounding them may cost."""
    found = effkern.kmeans_init(weight, clusters, **kwargs)  # type: ignore[arg-type]
    assert effkern.backends.last() == "kmeans_init:cpu"
    exact = reference.kmeans_init(weight.double(), clusters, **kwargs)  # type: ignore[arg-type]
    assert found.dtype == torch.float32 and found.shape == exact.shape
    assert (found.diff(dim=-1) >= 0).all()
    cost = reference.kmeans_cost(weight, found, **kwargs)  # type: ignore[arg-type]
    least = reference.kmeans_cost(weight, exact, **kwargs)  # type: ignore[arg-type]
    importance = kwargs.get("importance")
    total = weight.numel() if importance is None else importance.double().sum()  # type: ignore[attr-defined]
    rounding = total * (weight.double().abs().max() * 2**-24) ** 2
    assert (cost <= least * (1 + 1e-9) + rounding).all(), (cost, least)
    return found


@pytest.mark.sanitize
@FUZZ
@given(data=st.data())
def test_optimum(data: st.DataObject) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))
    groups = draw(st.integers(1, 3))
    shape = (groups * draw(st.integers(1, 4)), draw(st.integers(1, 60)))
    kind = draw(st.sampled_from(["normal", "few values", "clumps", "offset", "tails"]))
    weight = torch.randn(shape)
    if kind == "few values":
        weight = (2 * weight).round() / 2
    elif kind == "clumps":
        weight = torch.randint(-3, 4, shape) * 10.0 + 0.01 * weight
    elif kind == "offset":
        weight = 1000 + weight
    elif kind == "tails":
        weight = weight**5
    importance = torch.rand(shape) if draw(st.booleans()) else None
    if importance is not None and draw(st.booleans()):
        importance = importance.masked_fill(importance < 0.5, 0.0)
    dtype = draw(st.sampled_from(DTYPES))
    check_optimum(weight.to(dtype), draw(st.integers(1, 12)), groups=groups, importance=importance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_counting_is_sorting(dtype: torch.dtype, weighted: bool, threads: Callable[[int], None]) -> None:
    """Large 16-bit groups are counted by value, on several threads; in float32 the same numbers are sorted."""
    weight = (torch.randn(300, 257) * 0.02).to(dtype)
    importance = torch.rand(weight.shape) if weighted else None
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(effkern.kmeans_init(weight, 16, importance=importance))
    assert all(torch.equal(r, results[0]) for r in results[1:])
    torch.testing.assert_close(results[0], effkern.kmeans_init(weight.float(), 16, importance=importance))
    values, inverse = weight.double().unique(return_inverse=True)
    mass = torch.ones_like(inverse) if importance is None else importance
    mass = torch.zeros_like(values).index_add_(0, inverse.flatten(), mass.flatten().double())
    if len(values) < 3000:
        exact = reference.kmeans_init(values, 16, importance=mass)
        torch.testing.assert_close(results[0].double(), exact, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("clusters", [2, 3, 8, 40, 256])
def test_many_distinct_values(clusters: int) -> None:
    """More values than the first round of cells has: whatever a bound leaves out must not hold the optimum. A random
    change of the boundaries, and Lloyd's iterations from other starts, find nothing better."""
    weight = torch.cat([torch.randn(60_000), 3 + 0.1 * torch.randn(30_000)])
    centroids = effkern.kmeans_init(weight, clusters)
    values = weight.double().sort().values
    sums = [torch.nn.functional.pad((values**p).cumsum(0), (1, 0)) for p in range(3)]

    def cost(bounds: Tensor) -> Tensor:
        n, first, second = (s[bounds].diff(dim=-1) for s in sums)
        return (second - first**2 / n.clamp(min=1)).sum(-1)

    middles = (centroids[1:] + centroids[:-1]).double() / 2
    ends = torch.tensor([0]), torch.tensor([len(values)])
    best = torch.cat([ends[0], torch.searchsorted(values, middles), ends[1]])
    found = cost(best)
    for reach in (1, 10, 100, 1000, 10000):
        moved = best + torch.randint(-reach, reach + 1, (400, clusters + 1))
        moved = moved.clamp(0, len(values)).sort(-1).values
        moved[:, 0], moved[:, -1] = 0, len(values)
        assert (cost(moved) >= found * (1 - 1e-12)).all()
    for _ in range(10):
        table = values[torch.randint(len(values), (clusters,))].sort().values
        for _ in range(60):
            cut = torch.searchsorted(values, (table[1:] + table[:-1]) / 2)
            bounds = torch.cat([ends[0], cut, ends[1]])
            n, first = sums[0][bounds].diff(), sums[1][bounds].diff()
            table = torch.where(n > 0, first / n.clamp(min=1), table)
        assert cost(bounds) >= found * (1 - 1e-12)


@pytest.mark.parametrize("clusters", [24, 64, 100, 256])
@pytest.mark.parametrize("weighted", [False, True])
def test_evenly_spaced_values(clusters: int, weighted: bool) -> None:
    """Clusters of as many values as the others, or one more: at the price of one of those clusters any number of them
    is an optimum, so this is the number asked for by putting two optima together."""
    count = 20_001
    weight = torch.arange(count, dtype=torch.float32)
    found = effkern.kmeans_init(
        weight, clusters, importance=torch.full_like(weight, 0.375) if weighted else None
    )
    assert len(found) == clusters and (found.diff() > 0).all()
    size, larger = divmod(count, clusters)
    least = (clusters - larger) * (size**3 - size) / 12 + larger * ((size + 1) ** 3 - (size + 1)) / 12
    middles = (found[1:] + found[:-1]).double() / 2
    nearest = found.double()[torch.searchsorted(middles, weight.double())]
    assert (weight.double() - nearest).square().sum() <= least * (1 + 1e-9)


def test_clumps_far_apart_keep_what_is_inside() -> None:
    """Two clumps whose inner spread is 1e-14 of the squared distance between them."""
    clump = torch.tensor([0.0, 1, 2, 3, 10, 11, 12, 13]) * 2.0**-23
    weight = torch.cat([1 + clump, -1 - clump, -1 - clump])
    expected = torch.cat([-1 - clump.view(2, 4).mean(-1).flip(0), 1 + clump.view(2, 4).mean(-1)])
    torch.testing.assert_close(effkern.kmeans_init(weight, 4), expected, rtol=0, atol=2.0**-22)


@pytest.mark.parametrize("step", [2.0**-12, 2.0**-6])
@pytest.mark.parametrize("clusters", [200, 255, 256])
def test_many_clumps(clusters: int, step: float) -> None:
    """255 of them, with 32 values each: one cluster more than clumps saves orders of magnitude less than one less."""
    inside, width = step * torch.arange(32), 32
    weight = (torch.arange(255.0)[:, None] + inside).flatten()
    found = effkern.kmeans_init(weight, clusters)
    assert len(found) == clusters and (found.diff() > 0).all()
    middles = (found[1:] + found[:-1]).double() / 2
    nearest = found.double()[torch.searchsorted(middles, weight.double())]
    cost = (weight.double() - nearest).square().sum().item()
    clump = (width**3 - width) / 12 * step**2
    half = 2 * ((width // 2) ** 3 - width // 2) / 12 * step**2
    # 55 clusters of two neighbours each, where there are too few; one clump in halves, where there is one more.
    least = {200: 255 * clump + 55 * width / 2, 255: 255 * clump, 256: 254 * clump + half}[clusters]
    assert cost <= least * (1 + 1e-4)  # centroids are rounded to float32


def test_fewer_values_than_clusters() -> None:
    weight = torch.tensor([[3.0, -1.0, 3.0], [-0.0, 0.0, -1.0]])
    for backend in ("cpu", "reference"):
        found = effkern.kmeans_init(weight, 5, backend=backend)
        assert found.tolist() == [-1.0, 0.0, 3.0, 3.0, 3.0]
        assert not found.signbit()[1]
    assert effkern.kmeans_init(torch.full((4, 4), 7.0).bfloat16(), 3).tolist() == [7.0] * 3
    assert effkern.kmeans_init(torch.tensor([2.5]), 1).tolist() == [2.5]
    assert effkern.kmeans_init(torch.full((1, 40_000), 0.3).half(), 2).tolist() == [0.300048828125] * 2


def test_importance_in_float64_keeps_its_ratios() -> None:
    """Beyond what float32 holds, each group at another scale."""
    weight, importance = torch.randn(2, 50), torch.rand(2, 50, dtype=torch.float64)
    scales = torch.tensor([[1e40], [1e-300]], dtype=torch.float64)
    expected = effkern.kmeans_init(weight, 4, groups=2, importance=importance.float())
    found = effkern.kmeans_init(weight, 4, groups=2, importance=importance * scales)
    assert effkern.backends.last() == "kmeans_init:cpu"
    torch.testing.assert_close(found, expected)
    for bad in (torch.inf, torch.nan, -1e300):
        importance[1, 7] = bad
        with pytest.raises(RuntimeError, match="importance has entries that are negative or not finite"):
            effkern.kmeans_init(weight, 4, groups=2, importance=importance)


def test_zero_importance() -> None:
    """What counts nothing moves nothing, is no value of its own, and must be finite all the same."""
    weight = torch.tensor([[1.0, 2.0, 9.0, 50.0]])
    importance = torch.tensor([[1.0, 3.0, 1.0, 0.0]])
    for backend in ("cpu", "reference"):
        found = effkern.kmeans_init(weight, 2, importance=importance, backend=backend)
        assert found.tolist() == [1.75, 9.0]
        alike = effkern.kmeans_init(weight, 2, importance=torch.zeros_like(weight), backend=backend)
        assert alike.tolist() == [4.0, 50.0]
    many = torch.ones(40_000).half()
    many[5] = torch.inf
    with pytest.raises(RuntimeError, match="weight has entries that are not finite"):
        effkern.kmeans_init(many, 2, importance=(many == 1).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_large_groups_find_what_is_not_finite(dtype: torch.dtype, bad: float) -> None:
    weight = torch.randn(200, 200, dtype=dtype)
    weight[150, 3] = bad
    with pytest.raises(RuntimeError, match="kmeans_init: weight has entries that are not finite"):
        effkern.kmeans_init(weight, 4)
    with pytest.raises(RuntimeError, match="kmeans_init: importance has entries"):
        effkern.kmeans_init(torch.ones_like(weight), 4, importance=weight.abs())


def test_no_gradient() -> None:
    weight = torch.randn(4, 8, requires_grad=True)
    assert not effkern.kmeans_init(weight, 3, importance=weight.abs()).requires_grad


@pytest.mark.sanitize
@FUZZ
@given(data=st.data())
def test_vectors(data: st.DataObject) -> None:
    """Both backends draw the same starts and walk the same way."""
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dim, groups = draw(st.sampled_from([2, 4])), draw(st.integers(1, 3))
    shape = (groups * draw(st.integers(1, 5)), dim * draw(st.integers(1, 30)))
    weight = torch.randn(shape).to(draw(st.sampled_from(DTYPES)))
    importance = torch.rand(shape) if draw(st.booleans()) else None
    clusters = draw(st.integers(1, 9))
    kwargs = {"groups": groups, "dim": dim, "importance": importance}
    found = effkern.kmeans_init(weight, clusters, **kwargs)  # type: ignore[arg-type]
    assert effkern.backends.last() == "kmeans_init:cpu"
    wanted = reference.kmeans_init(weight, clusters, **kwargs)  # type: ignore[arg-type]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_vectors_reach_what_is_there(threads: Callable[[int], None]) -> None:
    """Well separated clumps are found, in the same bits on any number of threads."""
    centres = torch.tensor([[0.0, 0], [10, 0], [0, 10], [10, 10]])
    weight = (centres[torch.randint(4, (9000,))] + 0.1 * torch.randn(9000, 2)).reshape(90, 200)
    results = []
    for count in (1, 3):
        threads(count)
        results.append(effkern.kmeans_init(weight, 4, dim=2))
    assert torch.equal(*results)
    order = (results[0][:, 0].round() + 2 * results[0][:, 1].round()).argsort()
    torch.testing.assert_close(results[0][order], centres, rtol=0, atol=0.02)


def test_huge_and_tiny() -> None:
    big = torch.tensor([3e38, -3e38, 2.9e38, 1e-45, 0.0, -2e-45])
    found = check_optimum(big, 3)
    assert found[2] == torch.tensor([3e38, 2.9e38], dtype=torch.float64).mean().float()
    tiny = torch.tensor([1.0, 2, 9, 10]) * 2.0**-149
    assert effkern.kmeans_init(tiny, 2).tolist() == [2.0**-148, 10 * 2.0**-149]  # halves round to even
