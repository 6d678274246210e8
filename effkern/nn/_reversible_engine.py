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
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from effkern import backends
from effkern.nn._reversible_couplings import Coupling, State
from effkern.nn._reversible_replay import Autocast
from effkern.nn._reversible_schedule import Promise, Schedule
from effkern.nn._reversible_sides import Arguments, Sides
from effkern.nn._reversible_step import Replay, Source, Step
from effkern.nn._reversible_watch import span


class Tape:
    """One pass through a stack of `count` blocks."""

    def __init__(
        self,
        owner: str,
        count: int,
        schedule: Schedule,
        *,
        q: int | None = None,
    ) -> None:
        self.owner, self.count, self.schedule = owner, count, schedule
        self.stored: frozenset[int] = (
            frozenset()
        )  # blocks whose inputs are kept although they could be recovered
        self.q = q
        self.steps: list[Step] = []
        self.ranges: list[Tensor] = []  # with q, the largest magnitude that each block has made
        self.waiting: dict[int, Source | Replay | Promise] = {}  # for the nodes of their blocks
        self._previous: list[Tensor] = []  # what RECOVER of the block before starts from
        self._identities: list[tuple[int, int]] = []
        self._dtypes: list[torch.dtype] = []
        self._autocast: dict[torch.device, Autocast] = {}
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
        device = state[0].device
        if device not in self._autocast:
            self._autocast[device] = Autocast.now(device)
        stored = index in self.stored or not coupling.invertible
        # The block before starts from these states, too, unless it has its own.
        chained = bool(self.steps) and self.steps[-1].differentiable and not self.steps[-1].stored
        read = len(state) if chained or coupling.reads is None else coupling.reads
        step = Step(
            index,
            label,
            block,
            coupling,
            parts,
            Sides(calls),
            device,
            tuple(t.dtype for t in state),
            stored,
            read if stored else 0,
            self.q is not None,
            self._autocast[device],
            backends.forced(),
        )
        self._check_identities(index, state)
        if torch.is_grad_enabled():
            step.find_parameters()
        tensors = [*state, *step.leaves, *step.sides.tensors]
        step.differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        with span("forward", step):
            if step.differentiable:
                step.begin()
                out = Node.apply(self, step, calls, len(state), *tensors)
                step.end()
                step.differentiable = any(t.requires_grad for t in out)  # whole numbers have no gradient
            else:
                out = self.forward(step, calls, state)
        self.steps.append(step)
        followed = step.differentiable and index < self.count - 1
        self._previous = [*state[: step.reads], *step.sides.tensors] if followed else []
        self._identities = [(t.data_ptr(), t._version) for t in out] if followed else []
        self._dtypes = [t.dtype for t in out]
        return out

    def forward(self, step: Step, calls: list[Arguments], state: State) -> State:
        """The first run of a block."""
        largest: list[Tensor] = []
        out = step.coupling.forward(lambda slot, x: step.call(calls, slot, x), state, largest)
        if largest:
            self.ranges.append(torch.stack(largest).amax())
        return out

    def _check_identities(self, index: int, state: State) -> None:
        if self._identities and self._identities != [(t.data_ptr(), t._version) for t in state]:
            cast = self._dtypes != [t.dtype for t in state]
            by = "FSDP's MixedPrecisionPolicy(cast_forward_inputs=True) or a hook" if cast else "a hook"
            raise RuntimeError(
                f"{self.owner}: the output of block {index - 1} was changed before block {index} got it, as by {by}; "
                "it could not be recovered in the backward pass"
            )

    def saved(self, step: Step, state: State, out: State) -> list[Tensor]:
        """What the node of `step` saves: where RECOVER of the block before it starts, in the last block its own too."""
        own: list[Tensor] = []
        if step.index == self.count - 1:
            own = [*(state[: step.reads] if step.stored else out), *step.sides.tensors]
        return [*self._previous, *own]

    def retreat(self, step: Step, saved: Sequence[Tensor], grads: State) -> tuple[Tensor | None, ...]:
        before: Source | None = None
        rest = list(saved)
        if step.index > 0 and self.steps[step.index - 1].differentiable:
            previous = self.steps[step.index - 1]
            width = previous.reads
            end = width + len(previous.sides.tensors)
            before, rest = (
                Source(previous, tuple(t.detach() for t in rest[:width]), rest[width:end]),
                rest[end:],
            )
        if step.index == self.count - 1:
            self.waiting.clear()
            self._started = time.perf_counter()
            width = step.reads if step.stored else len(grads)
            here: Source | Replay | Promise = Source(
                step, tuple(t.detach() for t in rest[:width]), rest[width:]
            )
        else:
            known = self.waiting.pop(step.index, None)
            if known is None:
                raise RuntimeError(
                    f"{step.label}: a gradient came to this block's output but not to the output of the stack; states "
                    "between blocks are not kept, so end the stack where its output is used"
                )
            here = known
        found = self.schedule.run(self, here, before, grads)
        if before is None:
            self.schedule.finished(time.perf_counter() - self._started, grads[0].numel())
        return found


class Node(torch.autograd.Function):
    """One block: tape, step, calls and the number of states, then states, parameters and side inputs -> states."""

    @staticmethod
    def forward(
        ctx: Any, tape: Tape, step: Step, calls: list[Arguments], width: int, *tensors: Tensor
    ) -> State:
        state = tensors[:width]
        out = tape.forward(step, calls, state)
        ctx.save_for_backward(*tape.saved(step, state, out))
        ctx.tape, ctx.step = tape, step
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, None, None, *ctx.tape.retreat(ctx.step, ctx.saved_tensors, grads))
