"""RECOVER and GRADS of a block in turns: the same bits as apart, and the inside of one sub-block alive, not of two."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reversible_nets import WIDTH, blocks
from torch import Tensor, nn

import effkern
from effkern.nn import ReversibleBlock, ReversibleSequence, _reversible_couplings, _reversible_step

Marks = list[tuple[bool, bool, str | None]]


def _apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutation: all of RECOVER, then all of GRADS."""
    monkeypatch.setattr(_reversible_couplings.Additive, "unwinds", False)


def _gradients(exact: int | None, dropout: float, autocast: bool) -> list[Tensor]:
    torch.manual_seed(0)
    net = ReversibleSequence(blocks(3, dropout=dropout), overlap=False, exact=exact)
    x = torch.randn(5, WIDTH, requires_grad=True)
    condition = torch.rand(WIDTH, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = sum(y.square().sum() for y in net(x, condition=condition))
    return list(torch.autograd.grad(loss, [x, condition, *net.parameters()]))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("exact", [None, 14])
def test_the_same_bits_as_apart(
    exact: int | None, dropout: float, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = _gradients(exact, dropout, autocast)
    _apart(monkeypatch)
    for a, b in zip(found, _gradients(exact, dropout, autocast), strict=True):
        assert torch.equal(a, b)


def _graphs_alive(monkeypatch: pytest.MonkeyPatch) -> int:
    """The most sub-blocks whose graphs exist at once in a backward pass."""
    most = [0]
    right = _reversible_step.Replay.call

    def counted(self: _reversible_step.Replay, slot: int, x: Tensor) -> Tensor:
        out = right(self, slot, x)
        most[0] = max(most[0], len(self._graphs))
        return out

    monkeypatch.setattr(_reversible_step.Replay, "call", counted)
    net = ReversibleSequence(blocks(3), overlap=False)
    sum(y.sum() for y in net(torch.randn(5, WIDTH))).backward()
    return most[0]


def test_one_sub_block_has_a_graph_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _graphs_alive(monkeypatch) == 1


def test_two_sub_blocks_with_graphs_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    _apart(monkeypatch)
    assert _graphs_alive(monkeypatch) == 2


class _Looking(torch.autograd.Function):
    """The identity; notes what its backward runs under."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seen: Marks) -> Tensor:
        ctx.seen = seen
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.seen.append(
            (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), effkern.backends.forced())
        )
        return grad, None


class Looking(nn.Module):
    def __init__(self, seen: Marks) -> None:
        super().__init__()
        self.seen, self.linear = seen, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return _Looking.apply(self.linear(x), self.seen)


@pytest.mark.parametrize("apart", [False, True])
def test_gradients_are_taken_as_in_any_backward_pass(apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not under the autocast and the forced backend of the second run, between whose halves they come."""
    if apart:
        _apart(monkeypatch)
    seen: Marks = []
    net = ReversibleSequence([ReversibleBlock(Looking(seen), Looking(seen)) for _ in range(2)], overlap=False)
    with torch.autocast("cpu", torch.bfloat16), effkern.backends.force("reference"):
        loss = sum(y.sum() for y in net(torch.randn(5, WIDTH)))
    loss.backward()
    assert seen == [(False, False, None)] * 4
