"""The two-stream schedule without a GPU: order, waits, lifetimes of memory, and what happens when one is forgotten."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from reversible_nets import WIDTH, Branch, assert_same, blocks, stored
from stream_recorder import Event, Recorder, Stream
from torch import Tensor, nn

import effkern
from effkern.nn import (
    DualResidualBlock,
    ReversibleSequence,
    _reversible_schedule,
    _reversible_step,
    _reversible_watch,
)

needs_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
Net = Callable[[int], tuple[list[nn.Module], Callable[..., object]]]


def reversible(depth: int) -> tuple[list[nn.Module], Callable[..., object]]:
    net = ReversibleSequence(blocks(depth))
    return list(net.blocks), net


def anchored(depth: int) -> tuple[list[nn.Module], Callable[..., object]]:
    net = ReversibleSequence([DualResidualBlock(Branch(), 1.0, 0.1) for _ in range(depth)], error_budget=1e-5)
    return list(net.blocks), net


def checkpointed(depth: int) -> tuple[list[nn.Module], Callable[..., object]]:
    parts: list[nn.Module] = [Branch() for _ in range(depth)]
    return parts, lambda x, **kwargs: effkern.checkpoint_sequence(parts, x, **kwargs)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    recover, gradients = _reversible_step.Source.recover, _reversible_step.Replay.gradients

    def recovering(self: _reversible_step.Source) -> _reversible_step.Replay:
        with made.stretch(f"R{self.step.index}"):
            return recover(self)

    def differentiating(self: _reversible_step.Replay, grads: tuple[Tensor, ...]) -> object:
        with made.stretch(f"B{self.step.index}"):
            return gradients(self, grads)

    monkeypatch.setattr(_reversible_step.Source, "recover", recovering)
    monkeypatch.setattr(_reversible_step.Replay, "gradients", differentiating)
    streams = made.patch(monkeypatch)
    monkeypatch.setattr(_reversible_schedule, "choose", lambda *_: _reversible_schedule.TwoStreams(streams))
    return made


def _train(recorder: Recorder, depth: int, net: Net = reversible) -> list[str]:
    """One training step on the recorder; what it found wrong."""
    parts, call = net(depth)
    x = torch.randn(3, WIDTH, requires_grad=True)
    condition = torch.rand(WIDTH, requires_grad=True)
    leaves = [x, condition, *(p for part in parts for p in part.parameters())]
    with recorder:
        out = call(x * 1, condition=condition * 1)  # both made and freed on the way
        loss = sum(y.square().sum() for y in (out if isinstance(out, tuple) else (out,)))
        loss.backward()
        for leaf in leaves:
            assert leaf.grad is not None
            leaf.grad = leaf.grad * 2  # a use on the caller's stream
        del loss, out, leaf
        gc.collect()
    if net is reversible:
        found = [leaf.grad / 2 for leaf in leaves]
        y = stored(parts, x, x, condition=condition)
        assert_same(found, torch.autograd.grad(sum(t.square().sum() for t in y), leaves), 1e-5)
    return recorder.faults


DEPTHS = range(1, 10)


@pytest.mark.parametrize("net", [reversible, anchored, checkpointed])
@pytest.mark.parametrize("depth", DEPTHS)
def test_order_waits_and_lifetimes(depth: int, net: Net, recorder: Recorder) -> None:
    assert _train(recorder, depth, net) == []
    for i in range(depth):
        (first_r, last_r), (first_b, last_b) = recorder.marks[f"R{i}"], recorder.marks[f"B{i}"]
        assert last_r.stream == last_b.stream == ("main", "side")[(depth - 1 - i) % 2]
        assert first_b.after(last_r)
        if i + 1 < depth:
            (_, later_r), (later_b, later_b_end) = recorder.marks[f"R{i + 1}"], recorder.marks[f"B{i + 1}"]
            assert first_b.after(later_b_end)
            assert first_r.after(later_r) or net is not reversible
            # What it is all for: neither waits for the other.
            assert not first_r.after(later_b) and not later_b_end.after(first_r)


def test_stored_inputs_need_no_chain_of_recoveries(recorder: Recorder) -> None:
    assert _train(recorder, 4, checkpointed) == []
    assert not recorder.marks["R2"][0].after(recorder.marks["R3"][0])


def _no_wait_for_recovery(schedule: type[_reversible_schedule.TwoStreams]) -> object:
    """The first wait of a node, which is for RECOVER of its own block, is left out."""

    def run(self, tape, here, before, grads):  # type: ignore[no-untyped-def]
        streams, waits = self._streams, []
        right = streams.wait
        streams.wait = lambda *a: right(*a) if waits else waits.append(a)
        try:
            return correct(self, tape, here, before, grads)
        finally:
            streams.wait = right

    correct = schedule.run
    return run


def _no_join(schedule: type[_reversible_schedule.TwoStreams]) -> object:
    """The caller's stream waits for nothing."""

    def run(self, tape, here, before, grads):  # type: ignore[no-untyped-def]
        streams, right = self._streams, self._streams.wait
        streams.wait = lambda stream, event: right(stream, event) if stream.name == "side" else None
        try:
            return correct(self, tape, here, before, grads)
        finally:
            streams.wait = right

    correct = schedule.run
    return run


def _pairs_from_the_front(schedule: type[_reversible_schedule.TwoStreams]) -> object:
    """Streams alternate from block 0 on: right for even depths only, as in a public implementation."""

    def run(self, tape, here, before, grads):  # type: ignore[no-untyped-def]
        tape.count += tape.count % 2
        try:
            return correct(self, tape, here, before, grads)
        finally:
            tape.count = len(tape.steps)

    correct = schedule.run
    return run


@pytest.mark.parametrize(
    ("mutation", "depths"),
    [(_no_wait_for_recovery, (2, 3, 6, 9)), (_no_join, (2, 3, 6, 9)), (_pairs_from_the_front, (3, 5, 9))],
)
def test_forgotten_waits_are_noticed(mutation, depths, recorder, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    schedule = _reversible_schedule.TwoStreams
    monkeypatch.setattr(schedule, "run", mutation(schedule))
    for depth in depths:
        recorder.faults.clear()
        assert any("does not wait for" in fault for fault in _train(recorder, depth))


def test_one_side_stream_serves_the_process(recorder: Recorder) -> None:
    """A stream has a pool of memory of its own, which a new one for every step would leave behind."""
    assert _train(recorder, 3) == [] and _train(recorder, 4) == []
    assert recorder.sides == 1


def test_memory_that_is_not_kept_is_noticed(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_reversible_schedule.CudaStreams, "keep", lambda *_: None)
    assert any("is freed while" in fault for fault in _train(recorder, 4))


def test_waits_of_the_host_are_noticed(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(self: _reversible_schedule.CudaStreams, stream: Stream, event: Event) -> None:
        event.synchronize()

    monkeypatch.setattr(_reversible_schedule.CudaStreams, "wait", wait)
    with pytest.raises(AssertionError, match="the host waits"):
        _train(recorder, 4)


def test_one_stream_after_the_other_is_no_overlap(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The overlap that `test_order_waits_and_lifetimes` asks for is absent where the schedule is serial."""
    monkeypatch.setattr(_reversible_schedule, "choose", lambda *_: _reversible_schedule.Schedule())
    monkeypatch.setattr(_reversible_watch, "watched", lambda: True)  # or RECOVER and GRADS take turns
    assert _train(recorder, 3) == []
    assert recorder.marks["R1"][0].after(recorder.marks["B2"][1])


def test_what_is_chosen_where() -> None:
    """Two streams when asked for: nothing that has not run on hardware is automatic."""
    kinds = {
        (device, overlap): type(
            _reversible_schedule.choose(torch.device(device), overlap, _reversible_schedule.Probe())
        ).__name__
        for device in ("cuda", "cpu", "meta")
        for overlap in (True, False)
    }
    serial = dict.fromkeys([("cuda", False), ("cpu", False), ("meta", False), ("meta", True)], "Schedule")
    assert kinds == {**serial, ("cuda", True): "TwoStreams", ("cpu", True): "Worker"}
    automatic = _reversible_schedule.choose(torch.device("cuda"), "auto", _reversible_schedule.Probe())
    assert type(automatic) is _reversible_schedule.Schedule


@needs_device
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("net", [reversible, anchored, checkpointed])
def test_two_streams_of_a_device_give_the_bits_of_one(net: Net, dropout: float) -> None:
    """Many steps, with memory coming and going: a forgotten wait or memory reused too early shows at times."""
    for depth in (1, 2, 5, 8):
        parts, _ = net(depth)
        for module in (m for part in parts for m in part.modules() if isinstance(m, nn.Dropout)):
            module.p = dropout
        modules = nn.ModuleList(parts).cuda()
        x = torch.randn(4096, WIDTH, device="cuda")
        found: dict[bool, list[list[Tensor]]] = {}
        for overlap in (False, True):
            found[overlap] = []
            for step in range(10):
                torch.manual_seed(step)
                if net is checkpointed:
                    loss = effkern.checkpoint_sequence(modules, x, overlap=overlap).square().sum()
                else:
                    stack = ReversibleSequence(modules, overlap=overlap, error_budget=1e-5)
                    loss = sum(y.square().sum() for y in stack(x))
                found[overlap].append(
                    [g.clone() for g in torch.autograd.grad(loss, list(modules.parameters()))]
                )
                del loss
        for one, two in zip(found[False], found[True], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@needs_device
def test_the_host_of_a_device_never_waits() -> None:
    net = ReversibleSequence(blocks(5), overlap=True).cuda()
    x = torch.randn(64, WIDTH, device="cuda")
    sum(y.square().sum() for y in net(x)).backward()  # what is made once
    torch.cuda.set_sync_debug_mode("error")
    try:
        sum(y.square().sum() for y in net(x)).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
