"""When the blocks of reversible and checkpointed stacks run: a picture of one training step.

effkern.reversible.timeline(model, x, path="timeline.png")
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from effkern.nn._reversible_replay import replayed_rng, rng_state
from effkern.nn._reversible_watch import Kind, watching

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from effkern.nn._reversible_engine import Step

__all__ = ["BlockTimes", "Span", "Timeline", "simulate", "timeline"]

_REPEATS = 3  # on the CPU, whose clock is shared with everything else


@dataclass(frozen=True)
class Span:
    """A piece of work on one of the two streams, in milliseconds from the beginning of the step."""

    kind: Kind  # forward, recover, gradients
    stack: int  # in the order of the forward pass
    block: int  # in its stack
    stream: int  # 0: the caller's, 1: the other
    start: float
    end: float


@dataclass(frozen=True)
class BlockTimes:
    """What one block takes when nothing runs beside it, in milliseconds."""

    stack: int
    block: int
    stored: bool  # its inputs are, so that RECOVER need not wait for that of the next block
    forward: float
    backward: tuple[float, float] | None  # RECOVER and GRADS; None where the block is frozen


@dataclass(frozen=True)
class Timeline:
    """One training step of a model, block by block."""

    spans: list[Span]
    serial: float  # RECOVER and GRADS of all blocks one after the other, in milliseconds
    device: str
    simulated: bool

    @property
    def backward(self) -> float:
        """Milliseconds from the first RECOVER to the last GRADS."""
        spans = [span for span in self.spans if span.kind != "forward"]
        return max(span.end for span in spans) - min(span.start for span in spans)

    def figure(self) -> Figure:
        """Two rows, the caller's stream and the other, over time. Needs matplotlib."""
        from effkern._timeline_plot import draw

        return draw(self)

    def __str__(self) -> str:
        how = "simulated from block times" if self.simulated else "measured"
        return (
            f"backward {_readable(self.backward)} ms on two streams, {_readable(self.serial)} ms on one: "
            f"{self.serial / self.backward:.2f}x ({how} on {self.device})"
        )


def _readable(milliseconds: float) -> str:
    return f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def timeline(
    model: nn.Module, *inputs: Any, path: str | PathLike[str] | None = None, **kwargs: Any
) -> Timeline:
    """Runs a training step and says when each block of the model's reversible and checkpointed stacks ran.

    On a CUDA device both streams are timed by events. A CPU has no streams: there every block is timed alone, in one
    thread, and the two streams are simulated from that, as if neither slowed down the other.

    Args:
        model: a module with a `ReversibleSequence` in it, or one that calls `checkpoint_sequence`.
        inputs, kwargs: what the model is called with. The gradient is that of the sum of its outputs.
        path: PNG to write, with matplotlib; None for none.

    Returns:
        A `Timeline`: `.spans`, `.backward`, `.serial`, `.simulated`, `.figure()`; print it for the gain.

    Raises:
        RuntimeError: no stack ran, or the outputs require no gradient.

    The step runs four times on the CPU and three times on CUDA. Gradients that parameters have, and random number
    generators, are left as they are; running statistics are not.
    """
    leaves = (*pytree.tree_leaves((inputs, kwargs)), *model.parameters())
    device = next((leaf.device for leaf in leaves if isinstance(leaf, Tensor)), torch.device("cpu"))
    simulated = device.type != "cuda"
    with replayed_rng(rng_state(device), device):
        _watched(model, inputs, kwargs, device, simulated)
        alone = [_watched(model, inputs, kwargs, device, True) for _ in range(_REPEATS if simulated else 1)]
        times = _block_times(alone)
        spans = simulate(times) if simulated else _spans(_watched(model, inputs, kwargs, device, False))
    serial = sum(sum(block.backward) for block in times if block.backward is not None)
    made = Timeline(spans, serial, str(device), simulated)
    if path is not None:
        made.figure().savefig(path, dpi=150)
    return made


def simulate(blocks: Sequence[BlockTimes]) -> list[Span]:
    """The step that blocks with such times would make on two streams that do not slow each other down.

    Work is put on the streams in the order, and waits for what, it does on CUDA: GRADS(i) beside RECOVER(i - 1).
    """
    spans: list[Span] = []
    now = 0.0
    for block in blocks:
        spans.append(Span("forward", block.stack, block.block, 0, now, now + block.forward))
        now = spans[-1].end
    for stack in sorted({block.stack for block in blocks}, reverse=True):
        run = [b for b in blocks if b.stack == stack and b.backward is not None]
        found = _two_streams(run, now)
        spans += found
        now = max((span.end for span in found), default=now)
    return spans


def _two_streams(blocks: Sequence[BlockTimes], start: float) -> list[Span]:
    """The backward pass of one stack."""
    spans: list[Span] = []
    free = [start, start]

    def put(kind: Kind, block: BlockTimes, stream: int, after: float) -> float:
        assert block.backward is not None
        begin = max(free[stream], after)
        free[stream] = begin + block.backward[kind == "gradients"]
        spans.append(Span(kind, block.stack, block.block, stream, begin, free[stream]))
        return free[stream]

    recovered = arrived = start
    for place in range(len(blocks) - 1, -1, -1):
        here = blocks[place]
        own = (len(blocks) - 1 - place) % 2  # counted from the last block, which is on the caller's stream
        if place == len(blocks) - 1:
            recovered = put("recover", here, own, start)
        ready = recovered
        if place > 0:
            before = blocks[place - 1]
            recovered = put("recover", before, 1 - own, start if before.stored else ready)
        arrived = put("gradients", here, own, max(ready, arrived))
    return spans


@dataclass
class _Mark:
    kind: Kind
    step: Step
    stream: int
    start: Any
    end: Any


class _Watch:
    """Notes what runs when, by the clock of the device."""

    def __init__(self, device: torch.device, serial: bool) -> None:
        self.serial, self.marks = serial, list[_Mark]()
        self._device = device
        self._inside = False  # a stack within a block is part of that block
        self._main = self._stream()
        self.origin = self._now()

    def _stream(self) -> int:
        return torch.cuda.current_stream(self._device).cuda_stream if self._device.type == "cuda" else 0

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def milliseconds(self, moment: Any) -> float:
        if self._device.type != "cuda":
            return (moment - self.origin) * 1e3
        return float(self.origin.elapsed_time(moment))

    @contextlib.contextmanager
    def span(self, kind: Kind, step: Step) -> Iterator[None]:
        if self._inside:
            yield
            return
        self._inside = True
        stream = int(self._stream() != self._main)
        start = self._now()
        try:
            yield
        finally:
            self._inside = False
            self.marks.append(_Mark(kind, step, stream, start, self._now()))


def _watched(
    model: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device, serial: bool
) -> list[tuple[Span, Step]]:
    """One step; where each span comes from."""
    inputs, kwargs = pytree.tree_map_only(Tensor, _leaf, (inputs, kwargs))
    leaves = [t for t in pytree.tree_leaves((inputs, kwargs)) if isinstance(t, Tensor) and t.requires_grad]
    leaves += [p for p in model.parameters() if p.requires_grad]
    watch = _Watch(device, serial)
    with watching(watch), torch.enable_grad():
        out = model(*inputs, **kwargs)
        outs = pytree.tree_leaves(dict(out) if isinstance(out, Mapping) else out)
        outs = [t for t in outs if isinstance(t, Tensor) and t.requires_grad]
        if not outs:
            raise RuntimeError("timeline: what the model returns requires no gradient")
        torch.autograd.grad(outs, leaves, [torch.ones_like(t) for t in outs], allow_unused=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if not any(mark.kind == "recover" for mark in watch.marks):
        raise RuntimeError("timeline: no reversible or checkpointed stack ran in the model")
    stacks: dict[int, int] = {}
    for mark in watch.marks:
        if mark.kind == "forward":
            stacks[id(mark.step)] = max(stacks.values(), default=-1) + (mark.step.index == 0)
    return [
        (
            Span(
                mark.kind,
                stacks[id(mark.step)],
                mark.step.index,
                mark.stream,
                watch.milliseconds(mark.start),
                watch.milliseconds(mark.end),
            ),
            mark.step,
        )
        for mark in watch.marks
    ]


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_(x.is_floating_point() or x.is_complex())


def _spans(found: Sequence[tuple[Span, Step]]) -> list[Span]:
    return [span for span, _ in found]


def _block_times(runs: Sequence[Sequence[tuple[Span, Step]]]) -> list[BlockTimes]:
    """Medians over runs of the same step."""
    import statistics  # which takes longer to import than the rest of effkern

    times: dict[tuple[int, int], dict[str, list[float]]] = {}
    stored: dict[tuple[int, int], bool] = {}
    for run in runs:
        for span, step in run:
            place = span.stack, span.block
            times.setdefault(place, {}).setdefault(span.kind, []).append(span.end - span.start)
            stored[place] = step.stored
    made = []
    for (stack, block), kinds in sorted(times.items()):
        medians = {kind: statistics.median(values) for kind, values in kinds.items()}
        backward = (medians["recover"], medians["gradients"]) if "recover" in medians else None
        made.append(BlockTimes(stack, block, stored[stack, block], medians["forward"], backward))
    return made
