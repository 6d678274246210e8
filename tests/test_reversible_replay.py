"""The second run of a branch is the first one again: random numbers, generators, autocast; wrong ones are noticed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from reversible_nets import WIDTH, assert_same, blocks
from torch import Tensor, nn

import effkern
from effkern.nn import ReversibleBlock, ReversibleSequence, _reversible_replay, _reversible_step


class Stored(nn.Module):
    """The stack with stored activations; draws the same random numbers in its forward pass."""

    def __init__(self, net: ReversibleSequence) -> None:
        super().__init__()
        self.blocks = net.blocks

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x1 = x2 = x
        for block in self.blocks:
            x1 = x1 + block.f(x2)
            x2 = x2 + block.g(x1)
        return x1, x2


def _dropout_error(overlap: bool) -> None:
    net = ReversibleSequence(blocks(5, dropout=0.4), overlap=overlap).double()
    x = torch.randn(6, WIDTH, dtype=torch.float64, requires_grad=True)
    found = []
    for call in (net, Stored(net)):
        torch.manual_seed(3)
        y1, y2 = call(x)
        torch.manual_seed(99)  # what the user does in between does not matter
        found.append(torch.autograd.grad((y1 * y2).sum(), [x, *net.parameters()]))
    assert_same(*found)


@pytest.mark.parametrize("overlap", [False, True])
def test_dropout_masks_are_those_of_the_forward_pass(overlap: bool) -> None:
    _dropout_error(overlap)


def test_dropout_masks_that_differ_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_reversible_step, "replayed_rng", lambda *_: contextlib.nullcontext())
    with pytest.raises(AssertionError):
        _dropout_error(False)


def _numbers_after_training(net: nn.Module) -> Tensor:
    torch.manual_seed(3)
    y1, y2 = net(torch.ones(6, WIDTH))
    between = torch.rand(3)
    (y1 * y2).sum().backward()
    return torch.cat([between, torch.rand(3)])


@pytest.mark.parametrize("overlap", [False, True])
def test_the_user_s_generator_is_left_as_it_was(overlap: bool) -> None:
    net = ReversibleSequence(blocks(4, dropout=0.4), overlap=overlap)
    assert torch.equal(_numbers_after_training(net), _numbers_after_training(Stored(net)))


def test_a_generator_that_is_seeded_again_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def seeding(states: object, device: object) -> Iterator[None]:
        if states is not None:
            _reversible_replay.set_rng_state(states)
        yield

    monkeypatch.setattr(_reversible_step, "replayed_rng", seeding)
    net = ReversibleSequence(blocks(4, dropout=0.4), overlap=False)
    assert not torch.equal(_numbers_after_training(net), _numbers_after_training(Stored(net)))


def test_an_error_in_the_second_run_puts_the_generator_back() -> None:
    class Once(nn.Module):
        runs = 0

        def forward(self, x: Tensor) -> Tensor:
            self.runs += 1
            if self.runs > 1:
                raise ValueError("second run")
            return nn.functional.dropout(x)

    net = ReversibleSequence([ReversibleBlock(nn.Identity(), Once())])
    y1, _ = net(torch.ones(3, WIDTH, requires_grad=True))
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="second run"):
        y1.sum().backward()
    assert torch.equal(before, torch.get_rng_state())


def test_states_of_generators_are_kept_only_for_branches_that_draw() -> None:
    net = ReversibleSequence([*blocks(1, dropout=0.4), *blocks(1)])
    y1, _ = net(torch.randn(3, WIDTH))
    assert [step.draws() for step in y1.grad_fn.tape.steps] == [True, False]


def _products(net: ReversibleSequence, *, enabled: bool, inside: bool) -> set[torch.dtype]:
    """Dtypes of the branches' outputs in the backward pass."""
    x = torch.randn(3, WIDTH)
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        y1, y2 = net(x)
    seen: set[torch.dtype] = set()
    for block in net.blocks:
        block.f.register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=inside):
        (y1 + y2).sum().backward()
    return seen


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("enabled", [False, True])
def test_autocast_is_that_of_the_forward_pass(enabled: bool, inside: bool, overlap: bool) -> None:
    found = _products(ReversibleSequence(blocks(2), overlap=overlap), enabled=enabled, inside=inside)
    assert found == {torch.bfloat16 if enabled else torch.float32}


def test_a_second_run_outside_of_autocast_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_reversible_replay.Autocast, "replayed", lambda self: contextlib.nullcontext())
    assert _products(ReversibleSequence(blocks(2)), enabled=True, inside=False) == {torch.float32}


def test_autocast_gradients_reach_every_parameter() -> None:
    """Casts of weights that the forward pass has cached carry no gradient."""
    net = ReversibleSequence(blocks(3), exact=14)
    with torch.autocast("cpu", torch.bfloat16):
        y1, y2 = net(torch.randn(3, WIDTH))
        (y1 + y2).sum().backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 and p.grad.any() for p in net.parameters()
    )


def test_nested_backward_inside_a_block_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """.backward() in a block writes .grad, whatever torch.autograd.grad was asked for, and DDP sees it too early."""

    def nested(self: _reversible_step.Replay, slot: int, grad: Tensor) -> Tensor:
        leaf, out = self._graphs.pop(slot)
        out.backward(grad)
        return leaf.grad

    net = ReversibleSequence(blocks(2))
    x = torch.randn(3, WIDTH, requires_grad=True)
    torch.autograd.grad(sum(y.sum() for y in net(x)), x)
    assert all(p.grad is None for p in net.parameters())
    monkeypatch.setattr(_reversible_step.Replay, "pull", nested)
    torch.autograd.grad(sum(y.sum() for y in net(x)), x)
    assert not all(p.grad is None for p in net.parameters())


def test_a_reversible_stack_inside_a_branch() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = ReversibleSequence(blocks(2, dropout=0.3))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)[0]

    net = ReversibleSequence([ReversibleBlock(Inner(), Inner()) for _ in range(2)], overlap=True).double()
    x = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)
    found = []
    for call in (net, Stored(net)):
        torch.manual_seed(3)
        y1, y2 = call(x)
        found.append(torch.autograd.grad((y1 * y2).sum(), [x, *net.parameters()]))
    assert_same(*found)


@pytest.mark.parametrize("overlap", [False, True])
def test_checkpoint_sequence_replays_too(overlap: bool) -> None:
    parts = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.4), nn.Tanh()).double() for _ in range(5)]
    x = torch.randn(6, WIDTH, dtype=torch.float64, requires_grad=True)
    leaves = [x, *(p for part in parts for p in part.parameters())]
    torch.manual_seed(3)
    y = effkern.checkpoint_sequence(parts, x, overlap=overlap)
    found = torch.autograd.grad(y.square().sum(), leaves)
    torch.manual_seed(3)
    y = nn.Sequential(*parts)(x)
    assert_same(found, torch.autograd.grad(y.square().sum(), leaves), 0)
