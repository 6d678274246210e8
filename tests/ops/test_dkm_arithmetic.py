"""Which arithmetic differentiable k-means chooses for an iteration, and that its results keep the bar either way."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dkm_oracle import relative, results
from torch import Tensor

import effkern
from effkern import _host
from effkern.reference import dkm as reference

ENOUGH = 1024  # weights a cluster, from which on float32 is considered: kEnough in csrc/dkm/group.cpp
LIMIT = 24  # bits that a squared distance may have for float32: kMild in csrc/dkm/kernel.h
LOG2E = math.log2(math.e)


def mild_iterations(weight: Tensor, centroids: Tensor, **options: Any) -> tuple[int, int]:
    """Of the forward and the backward."""
    leaf = weight.clone().requires_grad_()
    out, _ = effkern.dkm(leaf, centroids, **options)
    assert effkern.backends.last().startswith("dkm:cpu/")
    forward = _host.trace_last_detail()
    torch.autograd.grad(out.sum(), leaf)
    assert effkern.backends.last().startswith("dkm_backward:cpu/")
    return forward, _host.trace_last_detail()


def temperature_at(bits: float, gap: float) -> float:
    """Where the squared distance from halfway between two centroids has so many bits."""
    return (gap / 2) ** 2 * LOG2E / bits


def keeps_the_bar(weight: Tensor, centroids: Tensor, **options: Any) -> float:
    ours = results(effkern.dkm, weight, centroids, **options)
    exact = results(reference.dkm, weight, centroids, torch.float64, **options)
    for name in ("clustered", "centroids"):
        assert (ours[name] - exact[name]).abs().max() <= 1e-6 * weight.abs().max(), name
    error = relative(ours["grad"], exact["grad"])
    assert error <= 1e-5
    return error


@pytest.mark.sanitize
@pytest.mark.parametrize("clusters", [2, 8, 16])
@pytest.mark.parametrize("iterations", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [0.02, 1.0])
def test_gradient_on_both_sides_of_the_border(clusters: int, iterations: int, size: float, isa: str) -> None:
    weight = size * torch.randn(ENOUGH, clusters)
    centroids = size * torch.linspace(-2, 2, clusters)
    gap = 4 * size / (clusters - 1)
    for bits, mild in ((0.1, 1), (2.0, 1), (8.0, 1), (0.99 * LIMIT, 1), (1.01 * LIMIT, 0), (4.0 * LIMIT, 0)):
        temperature = temperature_at(bits, gap)
        assert mild_iterations(weight, centroids, temperature=temperature, iterations=1) == (mild, mild)
        keeps_the_bar(weight, centroids, temperature=temperature, iterations=iterations)


def test_backward_takes_what_forward_took() -> None:
    """Each iteration decides by its own centroids, which spread or close up."""
    weight = torch.randn(64, 400)
    seen = set()
    for bits in (1.0, 20.0, 23.0, 24.5, 26.0, 28.0, 40.0):
        options = {"temperature": temperature_at(bits, 4 / 7), "iterations": 4}
        forward, backward = mild_iterations(weight, torch.linspace(-2, 2, 8), **options)
        assert forward == backward
        seen.add(forward)
        keeps_the_bar(weight, torch.linspace(-2, 2, 8), **options)
    assert {0, 4} < seen  # and some between


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_streamed_decides(dtype: torch.dtype) -> None:
    weight, centroids = torch.randn(2, 8 * ENOUGH).to(dtype), torch.linspace(-2, 2, 8).expand(2, 8)
    for bits, mild in ((5.0, 2), (100.0, 0)):
        options: dict[str, Any] = {"temperature": temperature_at(bits, 4 / 7), "iterations": 1, "groups": 2}
        assert mild_iterations(weight, centroids, **options) == (mild, mild)
        if mild:
            assert mild_iterations(weight[:, 1:], centroids, **options) == (0, 0)  # too few
    assert mild_iterations(weight, torch.randn(8, 2), temperature=1.0, dim=2) == (0, 0)  # vectors: float64
    many = torch.randn(5 * 8 * ENOUGH).to(dtype)
    by_code = mild_iterations(many, centroids[0], temperature=1.0, iterations=1)
    assert by_code == ((1, 1) if dtype == torch.float32 else (0, 0))


def test_weights_beyond_the_outermost_centroid() -> None:
    """They belong to it alone, and only where they do not, their distance counts."""
    weight = torch.cat([torch.randn(10 * ENOUGH), torch.tensor([-9.0, 7.0, 12.0, -15.0])])
    centroids = torch.linspace(-2, 2, 8)
    options: dict[str, Any] = {"temperature": temperature_at(8.0, 4 / 7), "iterations": 1}
    assert mild_iterations(weight, centroids, **options) == (1, 1)
    keeps_the_bar(weight, centroids, **options | {"iterations": 3})
    close = torch.cat([centroids, torch.tensor([2.002])])  # two that share what lies far beyond them
    assert mild_iterations(weight, close, **options) == (0, 0)
    assert mild_iterations(weight.clamp(-2.4, 2.4), close, **options) == (1, 1)
    for these in (weight, weight.clamp(-2.4, 2.4)):
        keeps_the_bar(these, close, **options | {"iterations": 3})
    twice = torch.cat([centroids, centroids[-1:]])  # equal ones share equally
    assert mild_iterations(weight, twice, **options) == (1, 1)
    keeps_the_bar(weight, twice, **options | {"iterations": 3})
    far = torch.cat([weight, torch.tensor([1e4])])  # its square would leave the exponent
    assert mild_iterations(far, centroids, **options) == (0, 0)
    keeps_the_bar(far, centroids, **options | {"iterations": 3})


@pytest.mark.parametrize("temperature", [1.0, 100.0, 1e8])
def test_centroids_that_fall_together(temperature: float) -> None:
    weight, centroids = torch.randn(8 * ENOUGH), torch.linspace(-2, 2, 8)
    options: dict[str, Any] = {"temperature": temperature, "iterations": 4}
    assert mild_iterations(weight, centroids, **options) == (4, 4)
    keeps_the_bar(weight, centroids, **options)


def test_magnitudes_that_float32_squares_do_not_hold() -> None:
    """Soft assignments all the same: only the numbers are too large, or the temperature is."""
    weight, centroids = torch.randn(4 * ENOUGH), torch.linspace(-2, 2, 4)
    for size, mild in ((1e-12, 1), (1e15, 1), (1e18, 0)):
        options: dict[str, Any] = {"temperature": 0.5 * size * size, "iterations": 1}
        assert mild_iterations(size * weight, size * centroids, **options) == (mild, mild)
    keeps_the_bar(1e15 * weight, 1e15 * centroids, temperature=0.5e30, iterations=3)


def test_a_cluster_nearly_empty_is_not_empty() -> None:
    """A centroid far from all weights has shares of 2^-99 and less, of which the sum still counts."""
    weight, centroids = torch.linspace(-6, 0, 3 * ENOUGH), torch.tensor([-1.0, 1.0, 3.0])
    for bits, moves in ((95.0, True), (130.0, False)):
        # The last weight's squared distance is 9, that of the nearest centroid 1.
        options: dict[str, Any] = {"temperature": 8 * LOG2E / bits, "iterations": 1}
        assert mild_iterations(weight, centroids, **options) == (1, 1)
        ours = results(effkern.dkm, weight, centroids, **options)
        exact = results(reference.dkm, weight, centroids, torch.float64, **options)
        assert (exact["centroids"][2] != 3) == moves
        torch.testing.assert_close(ours["centroids"].double(), exact["centroids"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", [8.0, 96.0])
def test_bits_of_the_gradient_do_not_depend_on_threads(
    bits: float, threads: Callable[[int], None], isa: str
) -> None:
    weight, centroids = torch.randn(37, 8211), torch.linspace(-2, 2, 8)
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(results(effkern.dkm, weight, centroids, temperature=temperature_at(bits, 4 / 7)))
    for other in found[1:]:
        assert all(torch.equal(other[name], found[0][name]) for name in other)


@pytest.mark.parametrize("large", [1e16, 1e20])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradients_of_large_weights_are_finite(backend: str, large: float) -> None:
    """Distances overflow beside shares of nought; the gradient is that of the mean of each cluster's weights."""
    weight = torch.tensor([0.0, 0.9 * large, 1.1 * large], requires_grad=True)
    centroids = torch.tensor([0.0, large])
    out, _ = effkern.dkm(weight, centroids, temperature=1e-7, iterations=3, backend=backend)
    (grad,) = torch.autograd.grad(out, weight, torch.tensor([1.0, -1.0, 3.0]))
    torch.testing.assert_close(grad, torch.ones(3))
