"""Backward passes that run blocks a second time instead of storing what is inside them.

The backward of block i is split in two. RECOVER(i) runs the sub-blocks again, each with a small graph of its own, and
on the way finds the block's inputs, from its outputs or from a stored copy; GRADS(i) takes the gradient through those
graphs. The chains are RECOVER(i) -> RECOVER(i - 1), GRADS(i) -> GRADS(i - 1) and RECOVER(i) -> GRADS(i), so GRADS(i)
may run beside RECOVER(i - 1): `_reversible_schedule` says how.

Every block is one autograd node and returns the gradients of its parameters, so that whatever hangs on them (buckets of
DDP, shards of FSDP, hooks, accumulation, torch.autograd.grad) sees them block by block, as those of any other layer.
Node i holds what RECOVER(i - 1) starts from; that is why it can start before node i - 1 runs.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from effkern.nn._reversible_couplings import Coupling, State
from effkern.nn._reversible_replay import (
    Autocast,
    RngState,
    drawn_since,
    replayed_rng,
    rng_state,
    without_hooks,
)
from effkern.nn._reversible_schedule import Schedule
from effkern.nn._reversible_sides import Arguments, Sides


@dataclass
class Step:
    """One block in one forward pass: all that its second run needs, except the tensors that autograd keeps."""

    index: int
    label: str
    block: nn.Module
    coupling: Coupling
    parts: Sequence[tuple[str, nn.Module]]  # sub-blocks and their names
    sides: Sides
    device: torch.device
    dtypes: tuple[torch.dtype, ...]  # of the block's inputs
    stored: bool  # its inputs are kept, not recovered
    traced: bool  # the first run builds graphs too, so that it takes the same kernels as the second
    autocast: Autocast
    differentiable: bool = False
    rng: dict[int, RngState | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.parameters = [[p for p in part.parameters() if p.requires_grad] for _, part in self.parts]
        self.leaves = list({id(p): p for part in self.parameters for p in part}.values())
        self.versions = [p._version for p in self.leaves]

    def first(self, calls: list[Arguments], slot: int, x: Tensor) -> Tensor:
        name, part = self.parts[slot]
        args, kwargs = calls[slot]
        before = rng_state(self.device) if self.differentiable else None
        if self.differentiable and self.traced:
            with torch.enable_grad():
                out = part(x.detach().requires_grad_(), *args, **kwargs)
        else:
            out = part(x, *args, **kwargs)
        if not isinstance(out, Tensor):
            raise TypeError(f"{self.label}: {name} must return a tensor, got {type(out).__name__}")
        if self.coupling.keeps_shape and out.shape != x.shape:
            raise RuntimeError(
                f"{self.label}: {name} must return the shape of its input, {tuple(x.shape)}, got {tuple(out.shape)}"
            )
        if before is not None:
            self.rng[slot] = drawn_since(before, self.device)
        return out.detach() if self.traced else out

    def draws(self) -> bool:
        """Whether the second run moves the generators, for a while."""
        return any(state is not None for state in self.rng.values())

    def check_parameters(self) -> None:
        for parameter, version in zip(self.leaves, self.versions):
            if parameter._version != version:
                names = {id(p): name for name, p in self.block.named_parameters()}
                raise RuntimeError(
                    f"{self.label}: parameter {names.get(id(parameter), '?')} was modified in place after the forward "
                    "pass; the block cannot be run again as it was"
                )


class Replay:
    """The second run of a block: its inputs, and the graphs of its sub-blocks until `gradients` has used them."""

    def __init__(self, step: Step, sides: Sequence[Tensor]) -> None:
        self.step = step
        self.state: State = ()
        self.ready: Any = None  # event, where there are streams
        self._graphs: dict[int, tuple[Tensor, Tensor]] = {}
        self._side_leaves = [t.detach().requires_grad_(t.requires_grad) for t in sides]
        self._wanted = [t for t in self._side_leaves if t.requires_grad]
        self._calls = step.sides.calls(self._side_leaves)
        self._sums: dict[int, Tensor] = {}

    def call(self, slot: int, x: Tensor) -> Tensor:
        step = self.step
        leaf = x.detach().requires_grad_(x.is_floating_point())
        args, kwargs = self._calls[slot]
        with torch.enable_grad(), step.autocast.replayed(), replayed_rng(step.rng[slot], step.device):
            out = step.parts[slot][1](leaf, *args, **kwargs)
        self._graphs[slot] = leaf, out
        return out.detach()

    def _pull(self, slot: int, grad: Tensor) -> Tensor:
        leaf, out = self._graphs.pop(slot)
        inputs = [t for t in (leaf, *self.step.parameters[slot], *self._wanted) if t.requires_grad]
        found: Sequence[Tensor | None] = ()
        if out.requires_grad:
            with without_hooks(self.step.parameters[slot]):
                found = torch.autograd.grad(out, inputs, grad.to(out.dtype), allow_unused=True)
        through: Tensor | None = None
        for tensor, part in zip(inputs, found):
            if part is not None and tensor is leaf:
                through = part
            elif part is not None:
                known = self._sums.get(id(tensor))
                self._sums[id(tensor)] = part if known is None else known + part
        return torch.zeros_like(leaf) if through is None else through

    def gradients(self, grads: State) -> tuple[Tensor | None, ...]:
        """Gradients of the block's inputs, parameters and side inputs, in the order of `Node.apply`."""
        inputs = self.step.coupling.gradient(self._pull, grads)
        return (*inputs, *(self._sums.get(id(t)) for t in [*self.step.leaves, *self._side_leaves]))


@dataclass
class Source:
    """What RECOVER of a block starts from: its inputs where they are stored, else its outputs once they are known."""

    step: Step
    state: State
    sides: Sequence[Tensor]

    def prepare(self) -> None:
        """Gathers the parameters of a block that FSDP has sharded: it would do so only when the block's node runs."""
        unshard = getattr(self.step.block, "unshard", None)
        if unshard is not None:
            unshard()

    def recover(self) -> Replay:
        step = self.step
        step.check_parameters()
        replay = Replay(step, self.sides)
        if step.stored:
            step.coupling.forward(replay.call, self.state)
            replay.state = self.state
        else:
            replay.state = step.coupling.inverse(replay.call, self.state, step.dtypes)
        return replay


class Tape:
    """One pass through a stack of `count` blocks."""

    def __init__(
        self,
        owner: str,
        count: int,
        schedule: Schedule,
        *,
        stored: Collection[int] = (),
        q: int | None = None,
    ) -> None:
        self.owner, self.count, self.schedule = owner, count, schedule
        self.stored, self.q = stored, q
        self.steps: list[Step] = []
        self.slots: dict[int, Any] = {}  # block -> Source, Replay or a promise of one, from the node before
        self._previous: list[Tensor] = []
        self._identities: list[tuple[int, int]] = []
        self._started = 0.0

    def run(
        self,
        block: nn.Module,
        coupling: Coupling,
        parts: Sequence[tuple[str, nn.Module]],
        state: State,
        calls: list[Arguments],
    ) -> State:
        """The outputs of the next block."""
        index = len(self.steps)
        label = f"{self.owner}: block {index}" if self.count > 1 else self.owner
        x = state[0]
        step = Step(
            index,
            label,
            block,
            coupling,
            parts,
            Sides(calls),
            x.device,
            tuple(t.dtype for t in state),
            index in self.stored or not coupling.invertible,
            self.q is not None,
            Autocast.now(x.device),
        )
        self._check_identities(index, state)
        _refuse_sharded_parts(label, block)
        tensors = [*state, *step.leaves, *step.sides.tensors]
        step.differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        self.steps.append(step)
        last = index == self.count - 1
        if step.differentiable:
            out = Node.apply(self, step, calls, len(state), *tensors)
            self._previous = [] if last else [*(state if step.stored else ()), *step.sides.tensors]
        else:
            out = coupling.forward(lambda slot, x: step.first(calls, slot, x), state)
        kept = step.differentiable and not last
        self._identities = [(t.data_ptr(), t._version) for t in out] if kept else []
        return out

    def _check_identities(self, index: int, state: State) -> None:
        if self._identities and self._identities != [(t.data_ptr(), t._version) for t in state]:
            raise RuntimeError(
                f"{self.owner}: the output of block {index - 1} was changed before block {index} got it (by a hook?); "
                "it could not be recovered in the backward pass"
            )

    def kept(self, step: Step, state: State, out: State) -> list[Tensor]:
        """What the node of `step` saves: where RECOVER of the block before it starts, in the last block its own too."""
        own: list[Tensor] = []
        if step.index == self.count - 1:
            own = [*(state if step.stored else out), *step.sides.tensors]
        return [*self._previous, *own]

    def retreat(self, step: Step, saved: Sequence[Tensor], grads: State) -> tuple[Tensor | None, ...]:
        before: Source | None = None
        rest = list(saved)
        if step.index > 0 and self.steps[step.index - 1].differentiable:
            previous = self.steps[step.index - 1]
            width = len(previous.dtypes) if previous.stored else 0
            end = width + len(previous.sides.tensors)
            before, rest = (
                Source(previous, tuple(t.detach() for t in rest[:width]), rest[width:end]),
                rest[end:],
            )
        if step.index == self.count - 1:
            self.slots.clear()
            self._started = time.perf_counter()
            width = len(grads) if not step.stored else len(step.dtypes)
            here = Source(step, tuple(t.detach() for t in rest[:width]), rest[width:])
        else:
            here = self.slots.pop(step.index, None)
            if here is None:
                raise RuntimeError(
                    f"{step.label}: a gradient came to this block's output but not to the output of the stack; states "
                    "between blocks are not kept, so end the stack where its output is used"
                )
        found = self.schedule.run(self, here, before, grads)
        if before is None:
            self.schedule.finished(time.perf_counter() - self._started, grads[0].numel())
        return found


def _refuse_sharded_parts(label: str, block: nn.Module) -> None:
    """FSDP must gather all parameters of a block at once: those of a sharded part exist only while the part runs."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    inside = [module for module in block.modules() if module is not block]
    if any(hasattr(module, "unshard") for module in inside):
        raise RuntimeError(
            f"{label}: fully_shard must be given the block as a whole or a model around it, not a part of it"
        )


class Node(torch.autograd.Function):
    """One block: tape, step, calls and the number of states, then states, parameters and side inputs -> states."""

    @staticmethod
    def forward(
        ctx: Any, tape: Tape, step: Step, calls: list[Arguments], width: int, *tensors: Tensor
    ) -> State:
        state = tensors[:width]
        out = step.coupling.forward(lambda slot, x: step.first(calls, slot, x), state)
        ctx.save_for_backward(*tape.kept(step, state, out))
        ctx.tape, ctx.step = tape, step
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, None, None, *ctx.tape.retreat(ctx.step, ctx.saved_tensors, grads))
