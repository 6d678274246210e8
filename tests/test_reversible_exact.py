"""Bit-exact recovery, dual-residual blocks, anchors and the schedule of (alpha, beta)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from reversible_nets import WIDTH, Branch, Plain, assert_same, blocks, gradients, stored, two
from torch import Tensor, nn

import effkern
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
        right = _reversible_couplings.couple

        def off_the_grid(f: Tensor, *streams: Tensor, q: int, **how: Any) -> tuple[Tensor, Tensor, Tensor]:
            out, kept, _ = right(f.float() * (1 + 2.0**-q), *(streams or (torch.zeros_like(f),)), **how)
            return out, kept, out.abs().amax()

        monkeypatch.setattr(_reversible_couplings, "couple", off_the_grid)
    else:
        monkeypatch.setattr(
            "effkern.nn.reversible_sequence.straight_through_grid", lambda x, q: (x, x.detach().abs().amax())
        )
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

    def grid(t: Tensor, q: int) -> Tensor:
        return _reversible_couplings.straight_through_grid(t, q)[0]

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


def test_the_range_of_every_kind_of_block_is_looked_at() -> None:
    """Without another pass over the states: the couplings say it."""
    parts = [
        *blocks(1),
        DualResidualBlock(Plain(), 0.5, 1.0),
        ReversibleTransition(Plain(), Scale(3.0)),
        DualResidualBlock(Plain(), 1.0, 1.0),
    ]
    net, x = ReversibleSequence(parts, exact=14), torch.randn(3, WIDTH)
    seen: list[list[Tensor]] = []
    found: list[Tensor] = []
    net._check_range = lambda q, ranges: found.extend(ranges)  # type: ignore[method-assign]
    for block in parts:
        block.register_forward_hook(lambda _, args, out: seen.append([t.detach() for t in out]))
    for grad in (True, False):
        seen.clear(), found.clear()
        with torch.set_grad_enabled(grad):
            net(x)
        # The second output of a dual-residual block is an input, which has been looked at before.
        made = [
            state if block is parts[2] or block is parts[0] else state[:1]
            for block, state in zip(parts, seen)
        ]
        expected = [x.abs().max(), *(torch.stack([t.abs().max() for t in state]).max() for state in made)]
        assert len(found) == 5
        for a, e in zip(found, expected):
            assert (a - e).abs() <= 2.0**-14


@pytest.mark.parametrize("exact", [None, 14])
def test_images_keep_their_layout(exact: int | None) -> None:
    """Convolutions whose channels lie together get states whose channels lie together."""
    convs = [nn.Conv2d(4, 4, 3, padding=1).to(memory_format=torch.channels_last) for _ in range(3)]
    parts = [ReversibleBlock(*convs[:2]), DualResidualBlock(convs[2], 0.5, 1.0)]
    net = ReversibleSequence(parts, exact=exact, anchors=None, error_budget=1.0)
    x = torch.randn(2, 4, 5, 6).to(memory_format=torch.channels_last).requires_grad_()
    outs = net(x)
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in outs)
    found = torch.autograd.grad(sum(y.square().sum() for y in outs), [x, *net.parameters()])
    plain = x.detach().contiguous().requires_grad_()
    expected = torch.autograd.grad(
        sum(y.square().sum() for y in stored(parts, plain, plain)), [plain, *net.parameters()]
    )
    assert_same(found, expected, 1e-2 if exact else 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dual_streams_narrower_than_their_branch(dtype: torch.dtype) -> None:
    """The inverse gives each stream back in its own dtype."""
    coupling = _reversible_couplings.Dual(0.5, 0.5)
    x, y, f = torch.randn(50).to(dtype), torch.randn(50).to(dtype), torch.randn(50)
    out, kept = coupling.forward(lambda slot, x: f, (x, y))
    assert out.dtype == torch.float32 and kept.dtype == dtype
    found = coupling.inverse(lambda slot, x: f, (out, kept), (dtype, dtype))
    assert torch.equal(found[0], x) and torch.equal(found[1], y)


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
    schedule = DualResidualSchedule(net, 4, start=(1.0, 0.1))
    seen = [(net.blocks[0].alpha, net.blocks[1].beta)]
    seen += [schedule.step() for _ in range(5)]
    assert (
        seen[0] == (1.0, 0.1) and seen[2] == pytest.approx((0.65, 0.4)) and seen[4] == seen[5] == (0.3, 0.7)
    )

    other = DualResidualSchedule(net, 1, start=(1.0, 0.0))
    other.load_state_dict(DualResidualSchedule(ReversibleSequence(_dual(1, 0, 1)), 7).state_dict())
    assert other.steps == 7 and net.blocks[0].beta == 1.0
    with pytest.raises(ValueError, match="no DualResidualBlock"):
        DualResidualSchedule(nn.Linear(1, 1), 3)
    with pytest.raises(ValueError, match=r"must be finite, got \(nan, 0\.5\)"):
        DualResidualBlock(Plain(), math.nan, 0.5)


def test_schedule_starts_from_what_the_blocks_have() -> None:
    net, x = ReversibleSequence(_dual(4, 1.0, 0.0)), torch.randn(3, WIDTH)
    expected = net(x)[0]
    schedule = DualResidualSchedule(net, 10)
    assert torch.equal(net(x)[0], expected) and schedule.start == (1.0, 0.0)
    assert schedule.step() == pytest.approx((0.93, 0.07))
    net.blocks[2].beta = 0.5
    with pytest.raises(
        ValueError, match=r"no common pair or are at the end, \(0\.3, 0\.7\), already, got .*, 0\.5\)"
    ):
        DualResidualSchedule(net, 10)
    with pytest.raises(ValueError, match="start must be given"):
        DualResidualSchedule(ReversibleSequence(_dual(1, 0.3, 0.7)), 10)


def test_schedule_between_forward_and_backward_changes_nothing() -> None:
    """A forward pass keeps the constants that it ran with."""
    net = ReversibleSequence(_dual(3, 0.5, 1.0)).double()
    x = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)
    loss = sum(y.square().sum() for y in net(x, x))
    expected = torch.autograd.grad(sum(y.square().sum() for y in stored(net.blocks, x, x)), x)
    DualResidualSchedule(net, 2, start=(1.0, 0.1))
    assert net.blocks[0].beta == 0.1
    assert_same(torch.autograd.grad(loss, x), expected)


@pytest.mark.parametrize("name", ["cuda", "triton", "cpu", "reference"])
def test_a_forced_backend_that_couplings_lack_does_not_stop_a_stack(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user forces what runs the ops of the sub-blocks; couplings are then PyTorch's own operations."""
    parts = [*blocks(2), DualResidualBlock(Plain(), 0.5, 1.0)]
    x, ran = torch.randn(3, WIDTH), []
    right = _reversible_couplings.couple

    def noted(*args: Any, **how: Any) -> tuple[Tensor, Tensor, Tensor]:
        found = right(*args, **how)
        ran.append(effkern.backends.last().partition("/")[0])
        return found

    monkeypatch.setattr(_reversible_couplings, "couple", noted)
    for dtype, exact in ((torch.float32, 14), (torch.float32, None), (torch.float64, None)):
        net = ReversibleSequence(parts, exact=exact, overlap=True).to(dtype)
        _, expected = gradients(net, net, [x.to(dtype)])
        ran.clear()
        with effkern.backends.force(name):
            _, found = gradients(net, net, [x.to(dtype)])
        assert_same(found, expected, 0)
        serves = name in effkern.backends.would_work("coupling", "cpu", dtype, {})
        assert set(ran) == {f"coupling:{name if serves else 'reference'}"}
    with effkern.backends.force("cuda"), pytest.raises(effkern.backends.Unavailable):
        effkern.coupling(x, q=3)  # called by name it is an op like any other


def _relative(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest error of each tensor against its largest entry, of all the largest."""
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True))


def test_streams_stay_wide_after_a_transition_under_autocast() -> None:
    """Products are bfloat16 there; streams that were would be recovered with its roundings."""
    transition, parts = ReversibleTransition(nn.Linear(WIDTH, WIDTH)), _dual(16, 0.3, 0.7)
    net = ReversibleSequence([transition, *parts])
    x = torch.randn(16, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        found = net(x)
        expected = stored(parts, transition.f(x).float(), transition.f(x).float())
    assert [y.dtype for y in found] == [torch.float32] * 2
    losses = [(y1 * y2).sum() for y1, y2 in (found, expected)]
    assert _relative(*(torch.autograd.grad(loss, list(net.parameters())) for loss in losses)) < 0.02


class Narrow(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.bfloat16()


def test_anchors_know_the_dtype_of_every_stage() -> None:
    """A transition may narrow the streams on purpose; then more states are stored from there on, and only there."""
    wide, narrow = _dual(6, 0.3, 0.7), [block.bfloat16() for block in _dual(6, 0.3, 0.7)]
    parts = [*wide, ReversibleTransition(Narrow()), *narrow]
    x = torch.randn(16, WIDTH)
    y1, y2 = ReversibleSequence(parts)(x, x)
    assert [step.stored for step in y1.grad_fn.tape.steps] == [False] * 6 + [True] * 7
    weights = [p for part in parts for p in part.parameters()]
    found = torch.autograd.grad((y1 * y2).sum(), weights)
    y1, y2 = stored(parts, x, x)
    assert _relative(found, torch.autograd.grad((y1 * y2).sum(), weights)) < 0.1  # both round to bfloat16
    with pytest.raises(ValueError, match=r"input of block 12 would be .* in torch\.bfloat16.* and 1 blocks"):
        ReversibleSequence(parts, anchors=[1])(x)


def test_a_block_that_cannot_be_undone_stores_its_inputs() -> None:
    """With beta = 0 nothing of x is kept, so a block alone has nothing to recover it from."""
    block = DualResidualBlock(Branch(), 1.0, 0.0).double()
    x = two(3, WIDTH)
    _, found = gradients(block, block, x)
    _, expected = gradients(lambda *a: stored([block], *a), block, x)
    assert_same(found, expected)
    with pytest.raises(ValueError, match="block 0 would be recovered with an error of inf"):
        ReversibleSequence([block], anchors=None, error_budget=math.inf)(*x)
