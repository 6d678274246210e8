"""Differentiable k-means against float64 autograd: shapes, dtypes, strides, traps, memory, every CPU level."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dkm_oracle import check, relative, results
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import effkern
from effkern.bench.memory import peak_tensor_bytes
from effkern.ops._dkm_dispatch import _composed_backward
from effkern.ops._dkm_shards import _Shards
from effkern.reference import dkm as reference
from effkern.reference import dkm_shards as reference_shards
from effkern.testing import errors

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIXTEEN = DTYPES[1:]
FUZZ = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
CODES = 32768  # from so many numbers on a group of 16-bit weights goes by its codes


def unit_of(isa: str) -> str:
    return "avx512" if isa in ("avx512_bf16", "amx") else isa


def spread(clusters: int, groups: int = 1, dim: int = 1) -> Tensor:
    """Centroids over the range of Gaussian weights, of the shape a user gives."""
    made = torch.linspace(-2, 2, clusters)[None, :, None] + 0.1 * torch.randn(groups, clusters, dim)
    shape = (groups,) * (groups > 1) + (clusters,) + (dim,) * (dim > 1)
    return made.reshape(shape)


@pytest.mark.parametrize("clusters", [2, 4, 8, 16, 256])
@pytest.mark.parametrize("iterations", [1, 3, 5])
@pytest.mark.parametrize("temperature", [1e-5, 1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize(
    ("groups", "dim", "tolerance"), [(1, 1, 0.0), (2, 2, 0.0), (2, 4, 0.0), (4, 1, 2e-3)]
)
def test_closed_form_of_the_gradient(
    clusters: int, iterations: int, temperature: float, groups: int, dim: int, tolerance: float
) -> None:
    """The formulas the kernels follow, in float64, against autograd through the iterations."""
    weight = 0.1 * torch.randn(8, 24, dtype=torch.float64)
    start = 0.1 * torch.randn(groups, clusters, dim, dtype=torch.float64)
    leaf = weight.clone().requires_grad_()
    out, *saved = reference.dkm_iterate(leaf, start, temperature, iterations, tolerance, groups, dim)
    sent = torch.randn_like(weight)
    (expected,) = torch.autograd.grad(out, leaf, sent)
    found = reference.dkm_backward(
        sent, weight, saved[0].detach(), saved[1].detach(), saved[2], temperature, groups, dim
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10 * float(expected.abs().max()) + 1e-300)


@pytest.mark.sanitize
@FUZZ
@given(data=st.data())
def test_against_oracle(data: st.DataObject, isa: str) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(DTYPES))
    groups, dim = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4]))
    rows = groups * draw(st.integers(1, 4))
    columns = dim * draw(st.one_of(st.integers(1, 9), st.integers(1, 90), st.integers(250, 300)))
    clusters = draw(st.one_of(st.integers(1, 9), st.sampled_from([16, 33])))
    weight = torch.randn(rows, columns).to(dtype)
    layout = draw(st.sampled_from(["contiguous", "transposed", "slice", "every other", "three axes"]))
    if layout == "transposed":
        weight = weight.mT.contiguous().mT
    elif layout == "slice":
        weight = torch.randn(rows + 1, columns + 7).to(dtype)[1:, 3:-4]
    elif layout == "every other":
        weight = torch.randn(rows, 2 * columns).to(dtype)[:, ::2]
    elif layout == "three axes":
        weight = weight.reshape(rows, 1, columns)
    centroids = spread(clusters, groups, dim)
    check(
        f"{unit_of(isa)}/stream",
        weight,
        centroids.to(dtype) if draw(st.booleans()) else centroids,
        temperature=draw(st.sampled_from([0.02, 0.1, 0.5, 3.0])),
        iterations=draw(st.integers(1, 4)),
        tolerance=draw(st.sampled_from([0.0, 0.0, 1e6])),
        groups=groups,
        dim=dim,
    )


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize(("rows", "groups"), [(1, 1), (2, 2), (6, 2)])
@pytest.mark.parametrize("clusters", [2, 8, 16])
def test_by_codes(rows: int, groups: int, clusters: int, dtype: torch.dtype, isa: str) -> None:
    weight = torch.randn(rows, CODES + 77).to(dtype)
    centroids = spread(clusters, groups)
    check(f"{unit_of(isa)}/codes", weight, centroids, temperature=0.05, groups=groups)


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
def test_codes_and_stream_agree(dtype: torch.dtype) -> None:
    """The same weights, once as 16-bit numbers and once as the float32 numbers they are."""
    weight, centroids = torch.randn(3, CODES).to(dtype), spread(8)
    by_code = results(effkern.dkm, weight, centroids, temperature=0.02)
    assert effkern.backends.last().endswith("/codes")
    streamed = results(effkern.dkm, weight.float(), centroids, temperature=0.02)
    assert effkern.backends.last().endswith("/stream")
    torch.testing.assert_close(by_code["centroids"], streamed["centroids"], rtol=1e-6, atol=1e-6)
    for name in ("clustered", "grad"):
        assert errors(by_code[name], streamed[name].double()).max_ulp <= 1 or (
            relative(by_code[name], streamed[name].double()) < torch.finfo(dtype).eps
        )


@pytest.mark.parametrize("clusters", [2, 4, 8, 16, 256])
@pytest.mark.parametrize("iterations", [1, 3, 5])
@pytest.mark.parametrize("size", [0.02, 0.1, 1.0])
def test_gradient_within_a_hundred_thousandth(clusters: int, iterations: int, size: float, isa: str) -> None:
    """The bar of the float32 path, from clusters that share their weights to assignments so sharp that a handful of
    weights between two clusters make the gradient, and the last places of the centroids decide about them."""
    weight = size * torch.randn(16 if clusters == 256 else 32, 100)
    centroids = size * (torch.linspace(-2, 2, clusters) + 0.4 / clusters * torch.randn(clusters))
    for temperature in (1e-5, 1e-4, 1e-3, 1e-2):
        options = {"temperature": temperature, "iterations": iterations}
        ours = results(effkern.dkm, weight, centroids, **options)
        assert effkern.backends.last() == f"dkm_backward:cpu/{unit_of(isa)}/stream"
        exact = results(reference.dkm, weight, centroids, torch.float64, **options)
        assert relative(ours["grad"], exact["grad"]) <= 1e-5, temperature
        for name in ("clustered", "centroids"):  # relative to the weight: they may all be at its mean, near 0
            assert (ours[name] - exact[name]).abs().max() <= 1e-6 * weight.abs().max(), (name, temperature)


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("clusters", [2, 16, 256])
def test_codes_are_as_exact_as_their_rounding(clusters: int, dtype: torch.dtype) -> None:
    """Sharp assignments of 16-bit weights, by value: what is rounded is the result."""
    weight = torch.randn(CODES if clusters < 256 else CODES // 8).repeat(1 if clusters < 256 else 8).to(dtype)
    centroids = torch.linspace(-2, 2, clusters) + 0.4 / clusters * torch.randn(clusters)
    for temperature in (1e-4, 1e-3):  # colder, and float16 overflows
        ours = results(effkern.dkm, weight, centroids, temperature=temperature)
        assert effkern.backends.last().endswith("/codes")
        exact = results(reference.dkm, weight, centroids, torch.float64, temperature=temperature)
        assert relative(ours["centroids"], exact["centroids"]) <= 1e-6
        for name in ("clustered", "grad"):
            assert relative(ours[name], exact[name]) <= torch.finfo(dtype).eps, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1e-12, 1e-30, 1e-37, 1e-45])
def test_cold_is_hard_assignment(dtype: torch.dtype, temperature: float, isa: str) -> None:
    """Everything but the nearest centroid underflows: plain k-means, whose gradient goes through the means."""
    weight = torch.tensor([[-1.0, -1.5, 0.5, 0.75, 0.25, 4.0]]).to(dtype)
    for copies in (1, CODES):
        many, centroids = weight.repeat(1, copies), torch.tensor([-1.0, 0.0, 100.0, 3.0])
        found = results(effkern.dkm, many, centroids, temperature=temperature, iterations=2)
        assert torch.equal(found["centroids"], torch.tensor([-1.25, 0.5, 100.0, 4.0]))
        expected = torch.tensor([[-1.25, -1.25, 0.5, 0.5, 0.5, 4.0]]).to(dtype)
        assert torch.equal(found["clustered"], expected.repeat(1, copies))
        sent = torch.randint(-64, 65, many.shape, generator=torch.Generator().manual_seed(1)).double() / 32
        near = torch.tensor([0, 0, 1, 1, 1, 3]).repeat(copies)
        means = torch.stack(
            [sent[0, near == j].mean() if (near == j).any() else sent.new_zeros(()) for j in range(4)]
        )
        torch.testing.assert_close(
            found["grad"][0].double(), means[near], rtol=4 * torch.finfo(dtype).eps, atol=1e-6
        )


def shards(weight: Tensor, centroids: Tensor, temperature: float) -> Any:
    """What process_group runs, of one process."""
    return reference_shards.iterate(weight, centroids, temperature, 2, 0.0, 1, lambda sums: sums)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("temperature", [1e-12, 1e-30, 1e-40, 1e-300])
def test_cold_reference_is_hard_assignment(dtype: torch.dtype, temperature: float) -> None:
    weight = torch.tensor([[-1.0, -1.5, 0.5, 0.75, 0.25, 4.0]]).to(dtype)
    centroids = torch.tensor([-1.0, 0.0, 100.0, 3.0])
    options: dict[str, Any] = {"temperature": temperature, "iterations": 2}
    found = results(effkern.dkm, weight, centroids, backend="reference", **options)
    assert effkern.backends.last() == "dkm:reference"
    assert found["centroids"].tolist() == [-1.25, 0.5, 100.0, 4.0]
    expected = torch.tensor([[-1.25, -1.25, 0.5, 0.5, 0.5, 4.0]]).to(dtype)
    assert torch.equal(found["clustered"], expected)
    sent = torch.randint(-64, 65, (6,), generator=torch.Generator().manual_seed(1)).double() / 32
    near = torch.tensor([0, 0, 1, 1, 1, 3])
    means = torch.stack([sent[near == near[i]].mean() for i in range(6)])
    close: dict[str, float] = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 1e-6}
    torch.testing.assert_close(found["grad"][0].double(), means, **close)
    clustered, *path = reference.dkm_iterate(weight, centroids, temperature, 2, 0.0, 1, 1)
    closed = reference.dkm_backward(sent.to(dtype)[None], weight, *path, temperature, 1, 1)
    torch.testing.assert_close(closed[0].double(), means, **close)
    parts, made = shards(weight, centroids, temperature)
    assert torch.equal(parts, clustered) and torch.equal(parts, expected)
    grad = reference_shards.gradient(sent.to(dtype)[None], weight, made, temperature, 1, lambda sums: sums)
    torch.testing.assert_close(grad[0].double(), means, **close)


def test_squares_that_overflow() -> None:
    """Near 1e20 the square of a distance is no float32 number."""
    weight = torch.tensor([1e20, 2e20, 9e19, 1e-3, 4e-3])
    centroids = torch.tensor([0.0, 4e-3, 5e19, 3e20])
    options: dict[str, Any] = {"temperature": 1e-7, "iterations": 1}
    expected = torch.tensor([9.5e19, 2e20, 9.5e19, 1e-3, 4e-3])
    torch.testing.assert_close(effkern.dkm(weight, centroids, **options)[0], expected, rtol=1e-3, atol=0)
    found = results(effkern.dkm, weight, centroids, backend="reference", **options)
    torch.testing.assert_close(found["clustered"], expected, rtol=1e-3, atol=0)
    exact = results(reference.dkm, weight, centroids, torch.float64, **options)
    torch.testing.assert_close(found["grad"].double(), exact["grad"], rtol=1e-3, atol=1e-3)


def test_shards_name_the_argument_that_is_not_finite() -> None:
    broken = torch.tensor([0.0, torch.nan])
    with pytest.raises(RuntimeError, match="dkm: centroids has entries that are not finite"):
        shards(torch.randn(5), broken, 0.1)
    with pytest.raises(RuntimeError, match="dkm: weight has entries that are not finite"):
        shards(broken, torch.zeros(2), 0.1)


def test_shards_take_memory_for_one_chunk() -> None:
    """Of a million weights and 16 clusters no tensor of weights times clusters, 64 MiB, is made."""
    weight, centroids = torch.randn(1 << 20), spread(16)
    options = (0.1, 1, 0.0, 1, lambda sums: sums)
    made = reference_shards.iterate(weight, centroids, *options)[1]
    room = 16 * 4 * 16 * reference_shards.CHUNK  # of chunks times clusters
    cpu = torch.device("cpu")
    forward = peak_tensor_bytes(lambda: reference_shards.iterate(weight, centroids, *options), cpu)
    backward = peak_tensor_bytes(
        lambda: reference_shards.gradient(weight, weight, made, 0.1, 1, lambda sums: sums), cpu
    )
    assert forward is not None and backward is not None
    assert weight.nbytes < forward <= weight.nbytes + room
    assert weight.nbytes < backward <= weight.nbytes + room


@pytest.mark.parametrize("dim", [1, 2])
def test_backward_on_plain_operations_ignores_autocast(dim: int) -> None:
    """What a GPU runs without Triton, and what shards run: products in float32 also where `backward` is called under
    autocast."""
    weight, centroids = torch.randn(6, 64), spread(8, 1, dim)
    _, *path = reference.dkm_iterate(weight, centroids, 0.1, 3, 0.0, 1, dim)
    sent = torch.randn_like(weight)
    expected = reference.dkm_backward(sent, weight, *path, 0.1, 1, dim)
    options = (0.1, 3, 0.0, dim, lambda sums: sums)
    leaf = weight.clone().requires_grad_()
    clustered, *_ = _Shards.apply(leaf, centroids, *options)
    with torch.autocast("cpu", torch.bfloat16):
        composed = _composed_backward(sent, weight, *path, 0.1, 1, dim)
        (sharded,) = torch.autograd.grad(clustered, leaf, sent)
    assert torch.equal(composed, expected)
    torch.testing.assert_close(sharded, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 7, CODES])
def test_degenerate_weights(dtype: torch.dtype, count: int, isa: str) -> None:
    unit = unit_of(isa)
    path = f"{unit}/codes" if dtype != torch.float32 and count == CODES else f"{unit}/stream"
    constant = torch.full((count,), 0.3).to(dtype)
    duplicates = torch.tensor([0.5, -0.5, 0.5, 0.5, 2.0])
    for temperature in (1e-3, 0.1):
        check(path, constant, torch.tensor([0.3]), temperature=temperature)
        check(path, constant, torch.tensor([0.25, 1.0, -1.0]), temperature=temperature)
        check(path, constant, duplicates, temperature=temperature)
        check(path, torch.randn(count).to(dtype), duplicates, temperature=temperature)
        check(path, torch.zeros(count).to(dtype), torch.zeros(3), temperature=temperature)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [64, CODES])
def test_minus_zero_is_zero(dtype: torch.dtype, count: int) -> None:
    weight = torch.tensor([0.0, -0.0, 0.5, -0.5]).repeat(count // 4).to(dtype)
    options: dict[str, Any] = {"temperature": 0.1}
    start = spread(4)
    mixed = results(effkern.dkm, weight, start, **options)
    plain = results(effkern.dkm, weight + 0.0, start, **options)
    assert all(torch.equal(mixed[name], plain[name]) for name in mixed)
    only = torch.full((count,), -0.0).to(dtype)
    assert torch.equal(effkern.dkm(only, torch.zeros(1), **options)[0], torch.zeros(count).to(dtype))


@pytest.mark.sanitize
@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0), (2, 0, 4)], ids=str)
def test_nothing_to_cluster(shape: tuple[int, ...], isa: str) -> None:
    for backend in (None, "reference"):
        weight, centroids = torch.randn(shape).requires_grad_(), spread(4)
        out, found = effkern.dkm(weight, centroids, temperature=0.1, tolerance=0.5, backend=backend)
        assert out.shape == shape and torch.equal(found, centroids)
        assert torch.autograd.grad(out.sum(), weight)[0].shape == shape


def test_tolerance_stops_each_group_by_itself() -> None:
    """A group that stands still ends early, and has the result of as many iterations."""
    weight = torch.stack([torch.tensor([-1.0, 1.0]).repeat(40), torch.randn(80)])
    centroids = torch.tensor([[-1.0, 1.0], [0.1, 0.2]])
    options: dict[str, Any] = {"temperature": 0.02, "groups": 2}
    start = centroids.reshape(2, 2, 1)
    *_, steps = torch.ops.effkern.dkm(weight, start, 0.02, 9, 1e-4, 2, 1)
    assert steps[0] == 1 and 1 < steps[1] <= 9
    assert torch.equal(steps, reference.dkm_iterate(weight.double(), start, 0.02, 9, 1e-4, 2, 1)[3])
    whole = results(effkern.dkm, weight, centroids, tolerance=1e-4, iterations=9, **options)
    for group in range(2):
        alone = results(effkern.dkm, weight, centroids, iterations=int(steps[group]), **options)
        assert all(torch.equal(whole[name][group], alone[name][group]) for name in whole)


def test_groups_are_calls_of_their_own() -> None:
    weight, centroids = torch.randn(6, CODES // 2), spread(5, 3)
    for dtype in DTYPES:
        together = results(effkern.dkm, weight.to(dtype), centroids, temperature=0.1, groups=3)
        for group in range(3):
            rows = weight.to(dtype)[2 * group : 2 * group + 2]
            alone, found = effkern.dkm(rows, centroids[group], temperature=0.1)
            assert torch.equal(together["clustered"][2 * group : 2 * group + 2], alone)
            assert torch.equal(together["centroids"][group], found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("groups", "dim"), [(1, 1), (1, 4), (16, 1)])
def test_bits_do_not_depend_on_threads(
    groups: int, dim: int, dtype: torch.dtype, threads: Callable[[int], None], isa: str
) -> None:
    weight, centroids = torch.randn(32, 8200).to(dtype), spread(8, groups, dim)
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(results(effkern.dkm, weight, centroids, temperature=0.1, groups=groups, dim=dim))
    for other in found[1:]:
        assert all(torch.equal(other[name], found[0][name]) for name in other)


def test_non_finite_values_are_named() -> None:
    for value in (torch.nan, torch.inf, -torch.inf):
        for dtype in DTYPES:
            for count in (5, CODES):
                weight = torch.randn(2, count).to(dtype)
                for place in (0, count - 1):
                    broken = weight.clone()
                    broken[1, place] = value
                    for groups, centroids in ((1, spread(3)), (2, spread(3, 2))):
                        with pytest.raises(RuntimeError, match="dkm: weight has entries that are not finite"):
                            effkern.dkm(broken, centroids, temperature=0.1, groups=groups)
        with pytest.raises(RuntimeError, match="dkm: centroids has entries that are not finite"):
            effkern.dkm(torch.randn(5), torch.tensor([0.0, value]), temperature=0.1)


def test_centroids_take_no_gradient() -> None:
    weight, centroids = torch.randn(30).requires_grad_(), spread(4).requires_grad_()
    for backend in (None, "reference"):
        out, found = effkern.dkm(weight, centroids, temperature=0.1, backend=backend)
        assert out.requires_grad and not found.requires_grad
        assert torch.autograd.grad(out.sum(), centroids, allow_unused=True)[0] is None
        frozen, _ = effkern.dkm(weight.detach(), centroids, temperature=0.1, backend=backend)
        assert not frozen.requires_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("clusters", [8, 256])
def test_saved_bytes(dtype: torch.dtype, clusters: int) -> None:
    """What is kept for the backward, beside the weight itself."""
    weight = torch.randn(256, 256).to(dtype).requires_grad_()
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        effkern.dkm(weight, spread(clusters), temperature=0.1)
    saved.pop(weight.untyped_storage().data_ptr())
    assert 0 < sum(saved.values()) <= 64 << 10


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("clusters", [8, 256])
@pytest.mark.plain_empty
def test_peak_memory(dtype: torch.dtype, clusters: int) -> None:
    """Beside the arguments: the output, or the gradient, and a few tables. Read off the allocator's own record."""
    weight = torch.randn(1024, 1024).to(dtype).requires_grad_()
    sent = torch.ones_like(weight)

    def peak(call: Callable[[], Any]) -> int:
        with torch.profiler.profile(profile_memory=True, record_shapes=False) as profile:
            kept = call()
        del kept
        level = most = 0
        for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
            if event.name() == "[memory]":
                level += event.nbytes()
                most = max(most, level)
        return most

    allowed = int(1.1 * weight.nbytes) + (4 << 20)
    out, _ = effkern.dkm(weight, spread(clusters), temperature=0.1)
    found = peak(lambda: effkern.dkm(weight, spread(clusters), temperature=0.1))
    assert weight.nbytes <= found <= allowed
    found = peak(lambda: torch.autograd.grad(out, weight, sent))
    assert weight.nbytes <= found <= allowed


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize(("groups", "dim"), [(1, 1), (2, 1), (2, 2)])
def test_convergence_tells_when_groups_settle_and_how_far_centroids_move(
    backend: str | None, groups: int, dim: int
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 64, requires_grad=True)
    shape = [groups] * (groups > 1) + [4] + [dim] * (dim > 1)
    start = torch.linspace(-1, 1, 4).reshape([1] * (groups > 1) + [4] + [1] * (dim > 1)).expand(shape)
    options = {"temperature": 0.02, "iterations": 40, "groups": groups, "dim": dim, "backend": backend}
    clustered, centroids, found = effkern.dkm(weight, start, tolerance=1e-2, convergence=True, **options)
    plain, alone = effkern.dkm(weight, start, tolerance=1e-2, **options)
    assert torch.equal(clustered, plain) and torch.equal(centroids, alone)
    assert clustered.requires_grad and not any(t.requires_grad for t in found)
    assert found.iterations.shape == (groups,) and found.moved.shape == (groups, 40)
    for made, moved, counts in zip(found.iterations.tolist(), found.moved, found.counts, strict=True):
        assert 1 < made < 40
        assert (moved[: made - 1] > 1e-2).all() and 0 < moved[made - 1] <= 1e-2 and not moved[made:].any()
        assert counts.sum().item() == pytest.approx(weight.numel() / groups / dim, rel=1e-5)
    _, last, longer = effkern.dkm(weight, start, convergence=True, **options | {"iterations": 1})
    assert longer.iterations.tolist() == [1] * groups
    step = (last - start).abs().reshape(groups, -1).amax(1)
    torch.testing.assert_close(longer.moved[:, 0], step, rtol=1e-5, atol=1e-6)
