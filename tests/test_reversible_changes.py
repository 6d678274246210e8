"""What would make a second run another one than the first is noticed, named, and never a silent wrong gradient."""

from __future__ import annotations

import dataclasses
import os
import threading
import types

import pytest
import torch
from reversible_nets import WIDTH, Branch, Plain, assert_same, blocks
from torch import Tensor, nn

import effkern
from effkern import checkpoint_sequence
from effkern.nn import DualResidualBlock, ReversibleBlock, ReversibleSequence, _reversible_schedule

X = torch.randn(3, WIDTH)


def _loss(net: nn.Module, x: Tensor = X) -> Tensor:
    return sum(y.square().sum() for y in net(x))


def test_complex_states_get_gradients() -> None:
    layers = [nn.Linear(WIDTH, WIDTH, dtype=torch.complex64) for _ in range(4)]
    x = torch.randn(3, WIDTH, dtype=torch.complex64, requires_grad=True)
    leaves = [x, *(p for layer in layers for p in layer.parameters())]
    found = torch.autograd.grad(checkpoint_sequence(layers, x).abs().sum(), leaves)
    expected = torch.autograd.grad(nn.Sequential(*layers)(x).abs().sum(), leaves)
    assert_same(found, expected, 1e-6)


class Largest(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.argmax(-1)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("overlap", [True, False])
def test_states_of_whole_numbers_end_the_chain(frozen: bool, overlap: bool) -> None:
    parts = nn.Sequential(nn.Linear(WIDTH, WIDTH), Largest(), nn.Embedding(WIDTH, 5), nn.Linear(5, 2))
    parts[2].requires_grad_(not frozen)
    leaves = [p for p in parts[2:].parameters() if p.requires_grad]
    found = torch.autograd.grad(checkpoint_sequence(parts, X, overlap=overlap).square().sum(), leaves)
    assert_same(found, torch.autograd.grad(parts(X).square().sum(), leaves), 1e-6)


def test_parameters_that_were_swapped_in_are_noticed() -> None:
    net = ReversibleSequence(blocks(2))
    swapped = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    y1, y2 = torch.func.functional_call(net, swapped, (X,))
    with pytest.raises(
        RuntimeError, match="block 1: a parameter is not the one of the forward pass any more"
    ):
        torch.autograd.grad((y1 + y2).sum(), list(swapped.values()), allow_unused=True)
    loss = _loss(net)
    net.blocks[0].f.up.weight = nn.Parameter(torch.zeros_like(net.blocks[0].f.up.weight))
    with pytest.raises(RuntimeError, match="block 0: a parameter is not the one"):
        loss.backward()


def test_frozen_parameters_that_change_are_noticed() -> None:
    net = ReversibleSequence(blocks(2))
    frozen = net.blocks[1].f.down.bias.requires_grad_(False)
    loss = _loss(net)
    with torch.no_grad():
        frozen.add_(1)
    with pytest.raises(RuntimeError, match=r"block 1: parameter f\.down\.bias was modified in place"):
        loss.backward()


@dataclasses.dataclass
class Table:
    scale: Tensor


class Scaled(nn.Module):
    def forward(self, x: Tensor, table: object = None) -> Tensor:
        return torch.sin(x) * (table.scale if isinstance(table, Table) else 1.0)


def test_tensors_that_autograd_cannot_see_are_refused_while_it_looks() -> None:
    net = ReversibleSequence([ReversibleBlock(Scaled(), Plain())])
    table = Table(torch.rand(WIDTH, requires_grad=True))
    for call in (net, lambda x, t: checkpoint_sequence([Scaled()], x.clone().requires_grad_(), t)):
        first = (X, X) if call is net else (X,)
        with pytest.raises(TypeError, match="holds a Table, whose tensors would get no gradients"):
            call(*first, table)
    with torch.no_grad():
        net(X, X, table)
    for plain in (
        torch.Size([2]),
        torch.nn.functional.relu,
        effkern.masks.SlidingWindow(4),
        slice(2),
        None,
        "mode",
    ):
        _loss(lambda x, plain=plain: net(x, x, {"option": plain})).backward()  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["reversible", "dual", "checkpointed"])
def test_sub_blocks_that_change_their_input_in_place_are_named(kind: str) -> None:
    f = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(WIDTH, WIDTH))
    x = X.clone()
    with pytest.raises(RuntimeError, match=r"block 1: (f|forward) changes its input in place"):
        if kind == "checkpointed":
            checkpoint_sequence([nn.Linear(WIDTH, WIDTH), f], x)
        else:
            block = ReversibleBlock(f, Plain()) if kind == "reversible" else DualResidualBlock(f)
            ReversibleSequence([DualResidualBlock(Plain()), block])(x)


def test_modules_made_under_inference_mode_run_without_gradients() -> None:
    with torch.inference_mode():
        net = ReversibleSequence(blocks(2))
        expected = net(X)
    with torch.no_grad():
        assert_same(net(X), expected, 0)


def test_stored_dual_blocks_keep_one_state_each_and_compute_nothing_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With (1, 0) that is a checkpoint of every branch; only what starts a chain of recoveries needs both streams."""
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.untyped_storage().data_ptr())
        return tensor

    parts = [DualResidualBlock(Branch(), 1.0, 0.0) for _ in range(6)]
    net, x = ReversibleSequence(parts), X.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y1, _ = net(x, x * 2)
    assert len(kept) == len(set(kept)) == 6
    sums: list[int] = []
    right = effkern.nn._reversible_couplings.dual_add
    monkeypatch.setattr(
        effkern.nn._reversible_couplings, "dual_add", lambda *args: (sums.append(1), right(*args))[1]
    )
    y1.sum().backward()
    assert sums == []


@pytest.mark.parametrize("anchors", [[3], [2, 3], [0, 5], [5], [0, 1, 2, 3, 4, 5]])
@pytest.mark.parametrize("overlap", [True, False])
def test_stored_and_recovered_blocks_in_any_order(anchors: list[int], overlap: bool) -> None:
    parts = [DualResidualBlock(Branch(), 0.3, 0.7).double() for _ in range(3)]
    parts += blocks(3)
    x = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)
    found = []
    for chosen in (anchors, None):
        net = ReversibleSequence(parts, anchors=chosen, overlap=overlap, error_budget=1.0).double()
        found.append(torch.autograd.grad(_loss(net, x), [x, *net.parameters()]))
    assert_same(*found)


def test_a_forced_backend_is_forced_in_the_second_run() -> None:
    class Looks(nn.Module):
        seen: list[str | None] = []  # noqa: RUF012

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(effkern.backends.forced())
            return torch.sin(x)

    net = ReversibleSequence([ReversibleBlock(Looks(), Plain()) for _ in range(3)], overlap=True)
    with effkern.backends.force("reference"):
        loss = _loss(net)
    loss.backward()
    assert Looks.seen == ["reference"] * 6 and effkern.backends.forced() is None


class Learns(nn.Module):
    """A sub-block that takes gradients through a stack of its own, as a step of an inner optimizer does."""

    def __init__(self) -> None:
        super().__init__()
        self.net = ReversibleSequence(blocks(3), overlap=True)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            inner = x.detach().requires_grad_()
            (grad,) = torch.autograd.grad(_loss(self.net, inner), inner)
        return torch.sin(x) + grad


def test_the_second_thread_does_not_wait_for_itself() -> None:
    net = ReversibleSequence([ReversibleBlock(Learns(), Plain()) for _ in range(3)], overlap=True)
    runner = threading.Thread(target=lambda: _loss(net).backward(), daemon=True)
    runner.start()
    runner.join(30)
    assert not runner.is_alive()
    assert all(p.grad is not None for p in net.blocks[0].g.parameters())
    assert _reversible_schedule.Worker._idle.acquire(blocking=False)
    _reversible_schedule.Worker._idle.release()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_makes_a_thread_of_its_own() -> None:
    net = ReversibleSequence(blocks(3), overlap=True)
    _loss(net).backward()
    pool = _reversible_schedule.Worker._pool
    assert pool is not None
    _reversible_schedule.Worker._idle.acquire()  # as if the thread had work
    try:
        child = os.fork()
        if child == 0:
            state = _reversible_schedule.Worker
            os._exit(0 if state._pool is None and state._idle.acquire(blocking=False) else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert _reversible_schedule.Worker._pool is pool
    finally:
        _reversible_schedule.Worker._idle.release()


def test_casts_of_states_between_blocks_are_named() -> None:
    net = ReversibleSequence(blocks(2), exact=14)
    net.blocks[1].register_forward_pre_hook(lambda _, args: tuple(t.bfloat16() for t in args))
    with pytest.raises(
        RuntimeError, match=r"changed before block 1 got it, as by FSDP's MixedPrecisionPolicy\(cast_f"
    ):
        net(X)


def test_sharded_parts_are_found_without_asking_for_their_names() -> None:
    net = ReversibleSequence(blocks(2))
    part = net.blocks[1].f.up
    part.__class__ = types.new_class(
        "Sharded", (nn.Linear,), exec_body=lambda space: space.update(unshard=None)
    )
    with pytest.raises(RuntimeError, match="block 1: fully_shard must be given the block as a whole"):
        net(X)
