"""The small reversible transformer: what it computes, in what memory, and that it learns."""

from __future__ import annotations

import pytest
import torch
from reversible_nets import assert_same
from torch import Tensor

from effkern import masks
from effkern.nn import ReversibleTransformer


def _stored(model: ReversibleTransformer, x: Tensor, mask: masks.Mask | None = None) -> Tensor:
    """Its formula, as autograd runs it by itself."""
    if model.embed is not None:
        x = model.embed(x)
    if model.positions is not None:
        x = x + model.positions.weight[: x.shape[1]]
    x1 = x2 = x
    for block in model.body.blocks:
        x1 = x1 + block.f(x2, mask)
        x2 = x2 + block.g(x1)
    out = model.norm(x1 + x2)
    return out if model.head is None else model.head(out)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("mask", [None, masks.SlidingWindow(2, 0)])
def test_gradients_are_those_of_the_stored_network(mask: masks.Mask | None, overlap: bool) -> None:
    model = ReversibleTransformer(16, 5, 2, causal=True, overlap=overlap, backend="reference").double()
    x = torch.randn(2, 7, 16, dtype=torch.float64, requires_grad=True)
    leaves = [x, *model.parameters()]
    found = torch.autograd.grad(model(x, mask).square().sum(), leaves)
    assert_same(found, torch.autograd.grad(_stored(model, x, mask).square().sum(), leaves))


@pytest.mark.parametrize(("exact", "tolerance"), [(None, 1e-4), (14, 5e-2)])
def test_tokens_to_logits_on_the_kernels(exact: int | None, tolerance: float) -> None:
    """The states of a fresh embedding are small, so that a grid of 2^-14 is coarse to them."""
    model = ReversibleTransformer(
        32, 3, 4, vocabulary=11, max_length=9, causal=True, dropout=0.0, exact=exact
    )
    tokens = torch.randint(11, (2, 9))
    logits = model(tokens)
    assert logits.shape == (2, 9, 11)
    leaves = list(model.parameters())
    found = torch.autograd.grad(logits.square().sum(), leaves)
    assert_same(found, torch.autograd.grad(_stored(model, tokens).square().sum(), leaves), tolerance)
    assert_same([model(tokens[:, :4])], [logits[:, :4]], tolerance)  # causal


def test_it_learns_with_dropout() -> None:
    model = ReversibleTransformer(
        16, 2, 2, vocabulary=5, max_length=8, causal=True, dropout=0.1, exact="auto"
    )
    tokens = torch.arange(8)[None] % 5
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[0, 1:])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: ReversibleTransformer(16, 0, 2), ValueError, "depth must be at least 1, got 0"),
        (lambda: ReversibleTransformer(16, 1, 3), ValueError, "num_heads 3 does not divide embed_dim 16"),
        (lambda: ReversibleTransformer(16, 1, 2, vocabulary=0), ValueError, "vocabulary must be at least 1"),
        (
            lambda: ReversibleTransformer(16, 1, 2, dropout=1.0),
            ValueError,
            r"dropout must be in \[0, 1\), got",
        ),
        (
            lambda: ReversibleTransformer(16, 1, 2)(torch.zeros(1, 3, 8)),
            RuntimeError,
            r"x must have shape \(B, S, 16\), got \(1, 3, 8\)",
        ),
        (
            lambda: ReversibleTransformer(16, 1, 2, vocabulary=3)(torch.zeros(3, dtype=torch.long)),
            RuntimeError,
            r"x must have shape \(B, S\), got \(3,\)",
        ),
        (
            lambda: ReversibleTransformer(16, 1, 2, max_length=2)(torch.zeros(1, 3, 16)),
            RuntimeError,
            "x has 3 positions, max_length is 2",
        ),
    ],
)
def test_it_says_what_is_wrong(build, error: type[Exception], message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        build()
