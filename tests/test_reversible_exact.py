"""Bit-exact recovery, dual-residual blocks, anchors and the schedule of (alpha, beta)."""

from __future__ import annotations

import math

import pytest
import torch
from reversible_nets import WIDTH, Branch, Plain, assert_same, blocks, gradients, stored, two
from torch import Tensor, nn

from effkern.nn import (
    DualResidualBlock,
    DualResidualSchedule,
    ReversibleBlock,
    ReversibleSequence,
    ReversibleTransition,
    _reversible_couplings,
)


def _inputs_of_branches(
    net: ReversibleSequence, x: Tensor, autocast: bool = True
) -> tuple[list[Tensor], list[Tensor]]:
    """What every branch got in the forward pass, and in the backward pass, both in the order of the forward pass."""
    runs: list[Tensor] = []
    handles = [
        part.register_forward_pre_hook(lambda _, args: runs.append(args[0].detach().clone()))
        for block in net.blocks
        if not isinstance(block, ReversibleTransition)  # which is not undone from its end
        for _, part in block.parts()
    ]
    with torch.autocast("cpu", torch.bfloat16, autocast):
        y1, y2 = net(x)
    first, count = list(runs), len(runs)
    (y1.float().square() + y2.float().square()).sum().backward()
    for handle in handles:
        handle.remove()
    again = runs[count:]
    assert len(again) == count
    return first, again[::-1]


def _mismatches(net: ReversibleSequence, x: Tensor, autocast: bool = True) -> int:
    return sum((a != b).sum().item() for a, b in zip(*_inputs_of_branches(net, x, autocast)))


@pytest.mark.parametrize("exact", [12, 14, 18, "auto"])
@pytest.mark.parametrize("depth", [12, 48])
def test_recovered_inputs_are_bit_identical(depth: int, exact: int | str) -> None:
    net = ReversibleSequence(blocks(depth, 32), exact=exact, overlap=False)
    x = torch.randn(16, 32, requires_grad=True)
    if exact == "auto":
        net(x)
        assert 6 <= net.q <= 18
    assert _mismatches(net, x) == 0


def test_without_exact_they_are_not() -> None:
    assert _mismatches(ReversibleSequence(blocks(12, 32), overlap=False), torch.randn(16, 32)) > 0


@pytest.mark.parametrize("wrong", ["truncated", "unrounded input"])
def test_a_wrong_rounding_is_noticed(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if wrong == "truncated":  # a grid that the sum of two of its numbers does not stay on
        monkeypatch.setattr(_reversible_couplings, "round_to_grid", lambda x, q: x.float() * (1 + 2.0**-q))
    else:
        monkeypatch.setattr("effkern.nn.reversible_sequence.straight_through_grid", lambda x, q: x)
    assert _mismatches(ReversibleSequence(blocks(12, 32), exact=14, overlap=False), torch.randn(16, 32)) > 0


def test_exact_runs_branches_the_same_way_twice() -> None:
    """Compiled branches and fused attention take other kernels where no gradient is wanted."""
    seen = []
    net = ReversibleSequence(blocks(2), exact=14, overlap=False)

    def look(_: nn.Module, args: tuple[Tensor]) -> None:
        seen.append((torch.is_grad_enabled(), args[0].requires_grad))

    net.blocks[0].f.register_forward_pre_hook(look)
    y1, y2 = net(torch.randn(3, WIDTH))
    (y1 + y2).sum().backward()
    assert seen == [(True, True), (True, True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_gradients_are_those_of_the_rounded_stack(dtype: torch.dtype) -> None:
    """Straight through the rounding; streams are float32 whatever comes in."""
    q = 14
    net = ReversibleSequence(blocks(4), exact=q)
    x = torch.randn(3, WIDTH).to(dtype).requires_grad_()
    y1, y2 = net(x)
    assert y1.dtype == torch.float32
    found = torch.autograd.grad((y1 * y2).sum(), [x, *net.parameters()])
    grid = _reversible_couplings.straight_through_grid
    a = b = grid(x, q)
    for block in net.blocks:
        a = a + grid(block.f(b), q)
        b = b + grid(block.g(a), q)
    assert torch.equal(y1, a) and torch.equal(y2, b)
    expected = torch.autograd.grad((a * b).sum(), [x, *net.parameters()])
    assert_same(found, expected, 1e-6 if dtype == torch.float32 else 1e-2)


def test_grid_rounds_to_nearest_even() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 0.74, 3.0]) / 4
    assert _reversible_couplings.round_to_grid(x, 2).tolist() == [0.0, 0.5, 0.5, 0.0, -0.5, 0.25, 0.75]


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


@pytest.mark.parametrize("value", [1024.0, math.inf, math.nan])
def test_overflow_names_the_block(value: float) -> None:
    parts = [ReversibleBlock(Plain(), Plain()) for _ in range(4)]
    net = ReversibleSequence([*parts[:2], ReversibleBlock(Plain(), Scale(value)), *parts[2:]], exact=14)
    with pytest.raises(RuntimeError, match=r"exact with q = 14 needs states below 2\^10 = 1024, block 2 has"):
        net(torch.full((1, WIDTH), 2.0))
    with pytest.raises(RuntimeError, match="the input has"):
        ReversibleSequence(parts, exact=14)(torch.full((1, WIDTH), value))


def test_exact_auto_refuses_values_that_leave_no_grid() -> None:
    net = ReversibleSequence(blocks(2), exact="auto")
    with pytest.raises(RuntimeError, match="exact='auto' found a state of"):
        net(torch.full((1, WIDTH), 1e6))
    with pytest.raises(RuntimeError, match=r"streams in float32, got torch\.float64"):
        ReversibleSequence(blocks(2), exact=14)(torch.zeros(1, WIDTH, dtype=torch.float64))


def test_exact_auto_leaves_the_generator_as_it_was() -> None:
    x = torch.randn(3, WIDTH)
    net = ReversibleSequence(blocks(2, dropout=0.5), exact="auto")
    torch.manual_seed(5)
    found = net(x)
    torch.manual_seed(5)
    assert_same(found, ReversibleSequence(net.blocks, exact=net.q)(x), 0)


def _dual(depth: int, alpha: float, beta: float, slope: float = 1.0) -> list[nn.Module]:
    parts = [DualResidualBlock(Branch(), alpha, beta) for _ in range(depth)]
    with torch.no_grad():
        for block in parts:
            block.f.down.weight.mul_(slope)
    return parts


@pytest.mark.parametrize("pair", [(0.3, 0.7), (1.0, 0.1), (1.0, 0.0), (0.5, 1.0), (-0.2, -0.9)])
@pytest.mark.parametrize("depth", [1, 2, 7, 13])
def test_dual_gradients_are_those_of_the_stored_net(depth: int, pair: tuple[float, float]) -> None:
    net = ReversibleSequence(_dual(depth, *pair), error_budget=1e-12).double()
    x = two(3, WIDTH)
    side = {"condition": torch.rand(WIDTH, dtype=torch.float64)}
    outs, found = gradients(net, net, x, **side)
    expected_outs, expected = gradients(lambda *a, **k: stored(net.blocks, *a, **k), net, x, **side)
    assert_same(outs, expected_outs, 1e-14)
    assert_same(found, expected)


def test_dual_block_of_pretrained_weights_is_the_residual_net() -> None:
    branches = [Branch().double() for _ in range(5)]
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    y, _ = ReversibleSequence([DualResidualBlock(f, 1.0, 0.0) for f in branches])(x)
    for f in branches:
        x = f(x) + x
    assert_same([y], [x], 1e-14)


def test_predicted_error_is_that_of_real_stacks() -> None:
    """It is a bound for branches that are flat; signs of roundings differ, so the true error is smaller."""
    net = ReversibleSequence(_dual(24, 0.3, 0.7, slope=0.02), anchors=None, error_budget=1.0)
    measured = _anchored(net, torch.randn(64, WIDTH))
    predicted = DualResidualBlock.predicted_error(0.3, 0.7, 24)
    assert measured <= predicted <= 100 * measured
    assert 1e-4 < predicted < 2e-3
    assert DualResidualBlock.predicted_error(1.0, 0.1, 24) > 1e10
    assert DualResidualBlock.predicted_error(1.0, 0.0, 1) == math.inf


def _anchored(net: ReversibleSequence, x: Tensor) -> float:
    """Largest error of the recovered inputs of branches, relative to the largest number in them."""
    first, again = _inputs_of_branches(net, x, autocast=False)
    return max(((a - b).abs().max() / a.abs().max()).item() for a, b in zip(first, again))


def test_anchors_keep_the_error_within_the_budget() -> None:
    x = torch.randn(16, WIDTH)
    parts = _dual(24, 1.0, 0.1, slope=0.02)
    assert _anchored(ReversibleSequence(parts, anchors=None, error_budget=math.inf), x) > 1
    assert _anchored(ReversibleSequence(parts, error_budget=1e-3), x) <= 1e-3
    couplings = tuple(block.coupling(None) for block in parts)
    net = ReversibleSequence(parts, error_budget=1e-3)
    assert 4 <= len(net._stored(couplings, torch.float32)) <= 8
    assert not net._stored(tuple(b.coupling(None) for b in _dual(20, 0.3, 0.7)), torch.float32)
    assert len(net._stored(couplings, torch.bfloat16)) == 24


def test_a_pair_over_the_budget_is_refused_with_the_numbers() -> None:
    net = ReversibleSequence(_dual(24, 1.0, 0.1), anchors=None)
    with pytest.raises(
        ValueError, match=r"budget is 0\.001; its \(alpha, beta\) is \(1, 0\.1\) and 5 blocks"
    ):
        net(torch.randn(3, WIDTH))
    chosen = [*range(0, 24, 3)]
    assert (
        _anchored(ReversibleSequence(_dual(24, 1.0, 0.1, slope=0.02), anchors=chosen), torch.randn(3, WIDTH))
        <= 1e-3
    )


def test_exact_dual_needs_beta_one() -> None:
    net = ReversibleSequence(_dual(24, 0.5, 1.0), exact=12, overlap=False)
    assert _mismatches(net, torch.randn(3, WIDTH)) == 0
    net.blocks[3].beta = 0.7
    with pytest.raises(
        ValueError, match=r"exact needs beta = 1, block 3 has \(alpha, beta\) = \(0\.5, 0\.7\)"
    ):
        net(torch.randn(3, WIDTH))


def test_exact_through_a_transition() -> None:
    parts = [*blocks(3), ReversibleTransition(Plain()), *blocks(3)]
    assert _mismatches(ReversibleSequence(parts, exact=14, overlap=False), torch.randn(3, WIDTH)) == 0


def test_schedule_moves_alpha_and_beta() -> None:
    net = ReversibleSequence([*_dual(2, 0.0, 1.0), *blocks(1)])
    schedule = DualResidualSchedule(net, 4)
    seen = [(net.blocks[0].alpha, net.blocks[1].beta)]
    seen += [schedule.step() for _ in range(5)]
    assert (
        seen[0] == (1.0, 0.1) and seen[2] == pytest.approx((0.65, 0.4)) and seen[4] == seen[5] == (0.3, 0.7)
    )

    other = DualResidualSchedule(net, 1)
    other.load_state_dict(DualResidualSchedule(ReversibleSequence(_dual(1, 0, 1)), 7).state_dict())
    assert other.steps == 7 and net.blocks[0].beta == 0.1
    with pytest.raises(ValueError, match="no DualResidualBlock"):
        DualResidualSchedule(nn.Linear(1, 1), 3)
    with pytest.raises(ValueError, match=r"must be finite, got \(nan, 0\.5\)"):
        DualResidualBlock(Plain(), math.nan, 0.5)


def test_schedule_between_forward_and_backward_changes_nothing() -> None:
    """A forward pass keeps the constants that it ran with."""
    net = ReversibleSequence(_dual(3, 0.5, 1.0)).double()
    x = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)
    loss = sum(y.square().sum() for y in net(x, x))
    expected = torch.autograd.grad(sum(y.square().sum() for y in stored(net.blocks, x, x)), x)
    DualResidualSchedule(net, 2)
    assert_same(torch.autograd.grad(loss, x), expected)
