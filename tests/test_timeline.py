"""The picture of a training step: what is timed, and that the simulated streams are those of the CUDA schedule."""

from __future__ import annotations

import contextlib
import itertools
import random
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from reversible_nets import WIDTH, Plain, blocks
from torch import Tensor, nn

import effkern
from effkern.nn import (
    DualResidualBlock,
    ReversibleSequence,
    _reversible_schedule,
    _reversible_step,
    _reversible_watch,
)
from effkern.reversible import BlockTimes, Span, simulate, timeline


class Summed(nn.Module):
    def __init__(self, *stacks: nn.Module) -> None:
        super().__init__()
        self.stacks = nn.ModuleList(stacks)

    def forward(self, x: Tensor) -> Tensor:
        for stack in self.stacks:
            y1, y2 = stack(x)
            x = y1 + y2
        return x


class Checkpointed(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Plain() for _ in range(depth))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": effkern.checkpoint_sequence(self.layers, x)}


def _of(spans: list[Span], kind: str, block: int, stack: int = 0) -> Span:
    (found,) = [s for s in spans if (s.kind, s.block, s.stack) == (kind, block, stack)]
    return found


def _times(depth: int, recover: float, gradients: float, stored: bool = False) -> list[BlockTimes]:
    return [BlockTimes(0, block, stored, 1.0, (recover, gradients)) for block in range(depth)]


@pytest.mark.parametrize("depth", range(1, 8))
@pytest.mark.parametrize(("recover", "gradients"), [(1.0, 2.0), (2.0, 1.0), (1.5, 1.5)])
def test_simulated_streams_obey_the_chains(depth: int, recover: float, gradients: float) -> None:
    spans = simulate(_times(depth, recover, gradients))
    assert [s.kind for s in spans[:depth]] == ["forward"] * depth
    for block in range(depth):
        r, g = _of(spans, "recover", block), _of(spans, "gradients", block)
        assert r.stream == g.stream == (depth - 1 - block) % 2
        assert r.start >= depth and g.start >= r.end
        assert (r.end - r.start, g.end - g.start) == (recover, gradients)
        if block + 1 < depth:
            assert r.start >= _of(spans, "recover", block + 1).end
            assert g.start >= _of(spans, "gradients", block + 1).end
    for stream in (0, 1):
        row = sorted((s.start, s.end) for s in spans if s.stream == stream)
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(row))


class VirtualStreams:
    """Streams, and a watcher, in a time of their own: work takes as long as it is said to."""

    serial = False

    def __init__(self, durations: list[dict[str, float]]) -> None:
        self.durations, self.stream = durations, "main"
        self.clock = {"main": 0.0, "side": 0.0}
        self.spans: list[Span] = []
        self.stored: dict[int, bool] = {}

    def current(self) -> str:
        return self.stream

    def side(self) -> str:
        return "side"

    @contextlib.contextmanager
    def use(self, stream: str) -> Iterator[None]:
        before, self.stream = self.stream, stream
        yield
        self.stream = before

    def record(self, stream: str) -> float:
        return self.clock[stream]

    def wait(self, stream: str, event: float) -> None:
        self.clock[stream] = max(self.clock[stream], event)

    def keep(self, tensor: Tensor, stream: str) -> None: ...

    @contextlib.contextmanager
    def span(self, kind: _reversible_watch.Kind, step: _reversible_step.Step) -> Iterator[None]:
        begin = self.clock[self.stream]
        yield
        end = self.clock[self.stream] = begin + self.durations[step.index][kind]
        self.spans.append(Span(kind, 0, step.index, int(self.stream == "side"), begin, end))
        self.stored[step.index] = step.stored


@pytest.mark.parametrize("kind", ["reversible", "anchored", "checkpointed"])
@pytest.mark.parametrize("depth", range(1, 9))
def test_simulation_is_what_the_schedule_does(depth: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real two-stream schedule, on virtual streams, with work of odd lengths."""
    draw = random.Random(depth)
    lengths = [
        {name: draw.randint(1, 9) / 4 for name in ("forward", "recover", "gradients")} for _ in range(depth)
    ]
    streams = VirtualStreams(lengths)
    monkeypatch.setattr(_reversible_schedule, "choose", lambda *_: _reversible_schedule.TwoStreams(streams))
    dual = [DualResidualBlock(Plain(), 1.0, 0.1) for _ in range(depth)]
    model = {
        "reversible": Summed(ReversibleSequence(blocks(depth))),
        "anchored": Summed(ReversibleSequence(dual, error_budget=1e-4)),
        "checkpointed": Checkpointed(depth),
    }[kind]
    with _reversible_watch.watching(streams):
        out = model(torch.randn(3, WIDTH))
        (out["out"] if isinstance(out, dict) else out).sum().backward()
    times = [
        BlockTimes(0, block, streams.stored[block], spans["forward"], (spans["recover"], spans["gradients"]))
        for block, spans in enumerate(lengths)
    ]
    assert sorted(simulate(times), key=repr) == sorted(streams.spans, key=repr)
    assert kind == "reversible" or depth < 6 or any(streams.stored.values())


def test_simulated_time_is_that_of_the_longer_chain() -> None:
    """depth times GRADS, after the first RECOVER: the 4/3 of the paper, as the second run is a third of the whole."""
    spans = simulate(_times(12, 1.0, 2.0))
    assert max(s.end for s in spans) == 12 + 1 + 12 * 2.0
    slow = simulate(_times(12, 2.0, 1.0))
    assert max(s.end for s in slow) == 12 + 12 * 2.0 + 1
    # Stored inputs need no chain of RECOVERs, so that two of them run at once where they are the longer part.
    assert max(s.end for s in simulate(_times(12, 2.0, 1.0, stored=True))) < max(s.end for s in slow)


def test_blocks_without_gradients_and_second_stacks() -> None:
    times = [BlockTimes(0, 0, False, 1.0, None), BlockTimes(0, 1, False, 1.0, (1.0, 2.0))]
    times += [BlockTimes(1, 0, False, 1.0, (1.0, 2.0)), BlockTimes(1, 1, False, 1.0, (1.0, 2.0))]
    spans = simulate(times)
    assert [s for s in spans if (s.stack, s.block, s.kind) == (0, 0, "recover")] == []
    assert _of(spans, "recover", 1, 0).start == _of(spans, "gradients", 0, 1).end
    assert _of(spans, "recover", 1, 1).stream == _of(spans, "recover", 1, 0).stream == 0


@pytest.mark.parametrize("overlap", ["auto", True])
def test_a_step_on_the_cpu(overlap: bool | str) -> None:
    """Both kinds of stack, timed one after the other whatever they would do, and nothing else is changed."""
    frozen = blocks(3, dropout=0.5)
    frozen[0].requires_grad_(False)
    dual = [DualResidualBlock(Plain(), 1.0, 0.1) for _ in range(4)]
    model = Summed(ReversibleSequence(frozen, overlap=overlap), ReversibleSequence(dual, error_budget=1e-6))
    x = torch.randn(3, WIDTH)
    state = torch.get_rng_state()
    taken = timeline(model, x)
    assert torch.equal(torch.get_rng_state(), state) and not x.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert taken.simulated and taken.device == "cpu"
    counts = {kind: sum(s.kind == kind for s in taken.spans) for kind in ("forward", "recover", "gradients")}
    assert counts == {"forward": 7, "recover": 7, "gradients": 7}
    assert 0 < taken.backward <= taken.serial * (1 + 1e-9)
    assert "simulated from block times on cpu" in str(taken)
    assert model.stacks[0]._probe.seconds == [] and model.stacks[0].overlap == overlap


def test_checkpointed_blocks_and_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "timeline.png"
    taken = timeline(Checkpointed(5), torch.randn(3, WIDTH), path=path)
    assert {s.block for s in taken.spans if s.kind == "gradients"} == set(range(5))
    assert path.read_bytes().startswith(b"\x89PNG")
    axes = taken.figure().axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "the caller's stream",
        "the other stream",
    ]
    assert len(axes.patches) == len(taken.spans) and axes.get_title(loc="left") == str(taken)


def test_events_of_two_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU would report, on a clock that counts: spans keep the stream and the moment they were recorded with."""
    ticks = itertools.count()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: object) -> None:
            self.moment = next(ticks)

        def elapsed_time(self, other: Event) -> float:
            return float(other.moment - self.moment)

    streams = itertools.chain([0], itertools.cycle([0, 7]))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=next(streams))
    )
    watch = effkern.reversible._Watch(torch.device("cuda"), serial=False)
    step = types.SimpleNamespace(index=0)
    with watch.span("recover", step), watch.span("forward", step):  # a stack within the block
        pass
    (mark,) = watch.marks
    assert (mark.kind, mark.stream) == ("recover", 1)
    assert (watch.milliseconds(mark.start), watch.milliseconds(mark.end)) == (1.0, 2.0)


def test_models_that_have_nothing_to_show() -> None:
    x = torch.randn(3, WIDTH)
    with pytest.raises(RuntimeError, match="timeline: no reversible or checkpointed stack ran"):
        timeline(nn.Linear(WIDTH, 2), x)
    with pytest.raises(RuntimeError, match="timeline: what the model returns requires no gradient"):
        timeline(nn.Embedding(3, 2).requires_grad_(False), torch.zeros(1, dtype=torch.long))

    class Within(Plain):
        def forward(self, x: Tensor) -> Tensor:
            timeline(Plain(), x)
            return x

    with pytest.raises(RuntimeError, match="timeline: another one is being taken"):
        timeline(Within(), x)
    timeline(Checkpointed(1), x)  # and nobody looks on any more


def test_complex_inputs_are_differentiated() -> None:
    x = torch.randn(2, 3, dtype=torch.complex64)
    assert effkern.reversible._leaf(x).requires_grad and effkern.reversible._leaf(x.real).requires_grad
    assert not effkern.reversible._leaf(x.real.long()).requires_grad
