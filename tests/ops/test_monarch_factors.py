"""Projection, multiplying out, stacks of factors: against definitions and exhaustive search."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import effkern
from effkern.reference import monarch as reference

FUZZ = settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def entries(w1: Tensor, w2: Tensor) -> Tensor:
    """The dense weight, entry by entry from the definition."""
    (k, q, p), (l, s, _) = w1.shape, w2.shape
    dense = torch.zeros(l * s, k * p, dtype=w1.dtype)
    for number in range(k * q):
        row, column = number // l, number % l
        for ss in range(s):
            dense[ss * l + column, number // q * p : (number // q + 1) * p] += (
                w2[column, ss, row] * w1[number // q, number % q]
            )
    return dense


def slices(weight: Tensor, nblocks: int) -> Tensor:
    m, n = weight.shape
    return weight.reshape(m // nblocks, nblocks, nblocks, n // nblocks).permute(1, 2, 0, 3)


@FUZZ
@given(data=st.data())
def test_dense_is_the_definition(data: st.DataObject) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))
    l, r = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    k = draw(st.sampled_from([n for n in range(1, 9) if l * r % n == 0]))
    dtype = draw(st.sampled_from([torch.float64, torch.complex128]))
    w1 = torch.randn(k, l * r // k, draw(st.integers(1, 5)), dtype=dtype)
    w2 = torch.randn(l, draw(st.integers(1, 5)), r, dtype=dtype)
    dense = effkern.monarch_dense(w1, w2)
    torch.testing.assert_close(dense, entries(w1, w2))
    x = torch.randn(3, dense.shape[1], dtype=dtype)
    torch.testing.assert_close(torch.nn.functional.linear(x, dense), reference.monarch_matmul(x, w1, w2))


def test_dense_says_what_is_wrong() -> None:
    w = torch.ones(2, 4, 4)
    for w1, w2, match in (
        (w, torch.ones(0, 4, 4), "w2 must not be empty"),
        (torch.tensor(1.0), w, "w1 must have shape"),
        (w, w.double(), "w2 is float64 but w1 is float32"),
        (w, torch.ones(2, 4, 5), r"w2 reads 2 \* 5 numbers"),
    ):
        with pytest.raises(RuntimeError, match=match):
            effkern.monarch_dense(w1, w2)
    with pytest.raises(TypeError, match="w2 must be a tensor, got NoneType"):
        effkern.monarch_dense(w, None)  # type: ignore[arg-type]


def test_dense_has_gradients() -> None:
    for shape in ((2, 4, 3), (4, 3, 2)):  # one that 2 blocks divide, one that they do not
        w1 = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        w2 = torch.randn(2, 3, shape[0] * shape[1] // 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(effkern.monarch_dense, (w1, w2))


@FUZZ
@given(data=st.data())
def test_projection_is_the_optimum(data: st.DataObject) -> None:
    """The error is what the singular values that are left out say, for any rank; a Monarch matrix comes back."""
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))
    nblocks, s, p = draw(st.integers(1, 5)), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    rank = draw(st.integers(1, min(s, p)))
    dtype = draw(st.sampled_from([torch.float64, torch.complex128]))
    weight = torch.randn(nblocks * s, nblocks * p, dtype=dtype) * 10.0 ** draw(st.integers(-250, 250))
    w1, w2 = effkern.monarch_project(weight, nblocks, rank)
    assert w1.shape == (nblocks, nblocks * rank, p) and w2.shape == (nblocks, s, nblocks * rank)
    dense = effkern.monarch_dense(w1, w2)
    sigma = torch.linalg.svdvals(slices(weight, nblocks))
    size = weight.abs().max()
    best = torch.linalg.norm(sigma[..., rank:] / size)
    error = torch.linalg.norm((dense - weight) / size)
    assert abs(error - best) <= 1e-7 * torch.linalg.norm(sigma / size)
    again = effkern.monarch_dense(*effkern.monarch_project(dense, nblocks, rank))
    torch.testing.assert_close(again / size, dense / size, rtol=0, atol=1e-7)


def test_nothing_on_a_grid_is_closer() -> None:
    """4 x 4 with two blocks, all Monarch matrices around the projection on a fine grid and coarsely elsewhere."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    w1, w2 = effkern.monarch_project(weight, 2)
    best = torch.linalg.norm(effkern.monarch_dense(w1, w2) - weight)
    for piece in slices(weight, 2).flatten(0, 1):
        angles = torch.linspace(0, torch.pi, 721, dtype=torch.float64)
        left = torch.stack([angles.cos(), angles.sin()], -1)
        # For a direction of the left vector the best right one is its projection: the search is exhaustive.
        errors = torch.linalg.norm(piece - left[:, :, None] * (left @ piece)[:, None], dim=(1, 2))
        projected = torch.linalg.svdvals(piece)[1]
        assert projected <= errors.min() + 1e-12 and errors.min() <= projected + 1e-4 * piece.norm()
    total = sum(torch.linalg.svdvals(piece)[1] ** 2 for piece in slices(weight, 2).flatten(0, 1))
    torch.testing.assert_close(best**2, total)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_projection_keeps_the_dtype_and_is_balanced(dtype: torch.dtype) -> None:
    weight = torch.randn(24, 36).to(dtype)
    w1, w2 = effkern.monarch_project(weight.T.contiguous().T, 6)
    assert w1.dtype == w2.dtype == dtype
    exact = effkern.monarch_dense(*effkern.monarch_project(weight.double(), 6))
    error = torch.linalg.norm(effkern.monarch_dense(w1.double(), w2.double()) - exact) / torch.linalg.norm(
        exact
    )
    assert error <= 2 * torch.finfo(dtype).eps
    left = w2.double().unflatten(2, (6, 1)).norm(dim=1)  # (l, k, rank)
    right = w1.double().unflatten(1, (1, 6)).norm(dim=3).permute(2, 0, 1)
    torch.testing.assert_close(left, right, rtol=0.02, atol=0)


def test_projection_of_zeros_and_of_low_rank() -> None:
    w1, w2 = effkern.monarch_project(torch.zeros(8, 8), 2, 3)
    assert not w1.any() and not w2.any()
    weight = torch.outer(torch.randn(12), torch.randn(12)).double()
    torch.testing.assert_close(effkern.monarch_dense(*effkern.monarch_project(weight, 3, 2)), weight)


@pytest.mark.parametrize(
    ("weight", "nblocks", "rank", "error", "match"),
    [
        (torch.ones(6, 8), 4, 1, ValueError, r"nblocks 4 does not divide both sizes of weight \(6, 8\)"),
        (torch.ones(8, 8), 0, 1, ValueError, "nblocks 0"),
        (torch.ones(8, 4), 4, 2, ValueError, "rank must be between 1 and 1, got 2"),
        (torch.ones(8), 2, 1, ValueError, r"must be a matrix \(m, n\), got shape \(8,\)"),
        (torch.ones(0, 8), 2, 1, ValueError, "must be a matrix"),
        (torch.full((4, 4), torch.nan), 2, 1, ValueError, "not finite"),
        (torch.ones(4, 4).long(), 2, 1, TypeError, "must be floating or complex"),
        ([[1.0]], 1, 1, TypeError, "weight must be a tensor"),
    ],
    ids=str,
)
def test_projection_says_what_is_wrong(
    weight: Tensor, nblocks: int, rank: int, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        effkern.monarch_project(weight, nblocks, rank)


def chain_by_definition(x: Tensor, factors: list[Tensor]) -> Tensor:
    for i, w in enumerate(factors):
        k, _, p = w.shape
        if i:  # the blocks of the last result, read as (r, l)
            x = x.reshape(-1, p, k).transpose(1, 2).reshape(-1, k * p)
        x = torch.einsum("tkp,kqp->tkq", x.reshape(-1, k, p), w)
        blocks, rows = x.shape[1:]
        x = x.reshape(-1, blocks * rows)
    return x if len(factors) == 1 else x.reshape(-1, blocks, rows).transpose(1, 2).reshape(-1, blocks * rows)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
def test_chain(count: int, dtype: torch.dtype) -> None:
    shapes = list(itertools.islice(itertools.cycle([(2, 6, 5), (4, 5, 3), (10, 4, 2), (8, 7, 5)]), count))
    factors = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    x = torch.randn(9, 10, dtype=dtype, requires_grad=True)
    out = effkern.monarch_chain(x, factors)
    expected = chain_by_definition(x, factors)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    grad = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(out, [x, *factors], grad),
        torch.autograd.grad(expected, [x, *factors], grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
    if count == 2:
        assert torch.equal(out, effkern.monarch_matmul(x, *factors))


def test_chain_says_what_is_wrong() -> None:
    x, w = torch.randn(3, 8), torch.randn(2, 4, 4)
    with pytest.raises(ValueError, match="factors is empty"):
        effkern.monarch_chain(x, [])
    with pytest.raises(
        RuntimeError, match=r"factor 3 must have shape .* blocks \* columns = 8, got \(2, 4, 5\)"
    ):
        effkern.monarch_chain(x, [w, w, torch.randn(2, 4, 5)])


def test_l_major_output_lets_the_next_factor_absorb_the_shuffle() -> None:
    """A dense layer after a Monarch one, its columns permuted once: the same result without the permutation."""
    w1, w2 = torch.randn(4, 6, 6), torch.randn(4, 6, 6)
    x, dense = torch.randn(10, 24), torch.randn(5, 24)
    plain = effkern.monarch_matmul(x, w1, w2) @ dense.T
    absorbed = dense.unflatten(1, (6, 4)).transpose(1, 2).flatten(1)
    torch.testing.assert_close(effkern.monarch_matmul(x, w1, w2, output_order="l_major") @ absorbed.T, plain)
