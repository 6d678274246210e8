"""One block in one pass: its first run, what is noted of it, and the second run that must be the first one again."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from effkern import backends
from effkern.nn._reversible_couplings import Coupling, State
from effkern.nn._reversible_replay import (
    Autocast,
    RngState,
    forced_again,
    replayed_rng,
    rng_state,
    same_numbers,
    without_hooks,
)
from effkern.nn._reversible_sides import Arguments, Sides
from effkern.nn._reversible_watch import span


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
    stored: bool  # inputs are stored, not recovered
    reads: int  # how many of the stored ones
    traced: bool  # the first run builds graphs too, so that it takes the same kernels as the second
    autocast: Autocast
    forced: str | None  # backend
    differentiable: bool = False
    leaves: list[nn.Parameter] = field(default_factory=list)  # parameters that get gradients, each once
    rng: list[RngState | None] = field(default_factory=list)  # before sub-blocks that drew numbers, by slot

    def find_parameters(self) -> None:
        modules = [_modules(part) for _, part in self.parts]
        _refuse_sharded_parts(self.label, self.block, itertools.chain(*modules))
        self._owned = [_parameters(part) for part in modules]
        self.parameters = [[p for p in owned if p.requires_grad] for owned in self._owned]
        self.leaves = list({id(p): p for part in self.parameters for p in part}.values())

    def begin(self) -> None:
        """Notes what a second run would otherwise find changed."""
        self.sides.check(self.label)
        self._versions = [p._version for owned in self._owned for p in owned]
        self._numbers = [rng_state(self.device)]

    def end(self) -> None:
        pairs = itertools.pairwise(self._numbers)
        # None saves the memory of a state, and the replay.
        self.rng = [None if same_numbers(before, after) else before for before, after in pairs]
        del self._numbers

    def call(self, calls: list[Arguments], slot: int, x: Tensor) -> Tensor:
        """The first run of the sub-block in `slot`."""
        name, part = self.parts[slot]
        args, kwargs = calls[slot]
        if self.differentiable:
            version = x._version
            if self.traced:
                with torch.enable_grad():
                    out = part(x.detach().requires_grad_(), *args, **kwargs)
            else:
                out = part(x, *args, **kwargs)
            if x._version != version:
                raise RuntimeError(
                    f"{self.label}: {name} changes its input in place, as a first layer with inplace=True does; the "
                    "block could not be run again"
                )
            self._numbers.append(rng_state(self.device))
        else:
            out = part(x, *args, **kwargs)
        if not isinstance(out, Tensor):
            raise TypeError(f"{self.label}: {name} must return a tensor, got {type(out).__name__}")
        if self.coupling.keeps_shape and out.shape != x.shape:
            raise RuntimeError(
                f"{self.label}: {name} must return the shape of its input, {tuple(x.shape)}, got {tuple(out.shape)}"
            )
        return out.detach() if self.traced else out

    @contextlib.contextmanager
    def conditions(self) -> Iterator[None]:
        """Those of the second run, which builds graphs and is otherwise like the first.

        Around the whole block, not each sub-block: states have no graph, and sums are those of the forward pass.
        """
        with torch.enable_grad(), self.autocast.replayed(), forced_again(self.forced):
            yield

    def draws(self) -> bool:
        """Whether the first run has drawn random numbers."""
        return any(state is not None for state in self.rng)

    def alone(self) -> bool:
        """Whether the second run changes for a while what the whole process sees: generators, the forced backend."""
        return self.draws() or self.forced != backends.forced()

    def check_parameters(self) -> None:
        """RuntimeError where a second run would not find the parameters of the first."""
        versions = iter(self._versions)
        for (_, part), owned in zip(self.parts, self._owned):
            present = _parameters(_modules(part))
            if len(present) != len(owned) or any(p is not q for p, q in zip(present, owned)):
                raise RuntimeError(
                    f"{self.label}: a parameter is not the one of the forward pass any more, as after "
                    "torch.func.functional_call or an assignment to it; the block cannot be run again as it was"
                )
            for parameter in owned:
                if parameter._version != next(versions):
                    names = {id(p): name for name, p in self.block.named_parameters()}
                    raise RuntimeError(
                        f"{self.label}: parameter {names.get(id(parameter), '?')} was modified in place after the "
                        "forward pass; the block cannot be run again as it was"
                    )


def _modules(part: nn.Module) -> list[nn.Module]:
    """A sub-block and all modules in it, each once. `part.modules()` makes their names too, and takes several times as
    long: much of a block's time on the host."""
    found, seen = [part], {part}
    for module in found:  # which grows
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found


def _parameters(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """All that `modules` have, each once."""
    return list(dict.fromkeys(p for module in modules for p in module._parameters.values() if p is not None))


def _refuse_sharded_parts(label: str, block: nn.Module, modules: Iterable[nn.Module]) -> None:
    """FSDP must gather all parameters of a block at once: those of a sharded part exist only while the part runs."""
    if any(hasattr(type(module), "unshard") for module in modules if module is not block):
        raise RuntimeError(
            f"{label}: fully_shard must be given the block as a whole or a model around it, not a part of it"
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

    def replay(self) -> Replay:
        return self

    def call(self, slot: int, x: Tensor) -> Tensor:
        step = self.step
        leaf = x.detach().requires_grad_(x.is_floating_point() or x.is_complex())
        args, kwargs = self._calls[slot]
        numbers = step.rng[slot]
        if numbers is None:
            out = step.parts[slot][1](leaf, *args, **kwargs)
        else:
            with replayed_rng(numbers, step.device):
                out = step.parts[slot][1](leaf, *args, **kwargs)
        self._graphs[slot] = leaf, out
        return out.detach()

    def pull(self, slot: int, grad: Tensor) -> Tensor:
        """The gradient of the slot's input; those of parameters and side inputs are added to what is known of them."""
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
        with span("gradients", self.step):
            inputs = self.step.coupling.gradient(self.pull, grads)
        return self.completed(inputs)

    def completed(self, inputs: State) -> tuple[Tensor | None, ...]:
        """With the gradients of the block's inputs, all of them, once every slot has been pulled."""
        return (*inputs, *(self._sums.get(id(t)) for t in [*self.step.leaves, *self._side_leaves]))


@dataclass
class Source:
    """What RECOVER of a block starts from: its inputs where they are stored, else its outputs once they are known."""

    step: Step
    state: State
    sides: Sequence[Tensor]

    def replay(self) -> Replay:
        self.prepare()
        return self.recover()

    def prepare(self) -> None:
        """Gathers the parameters of a block that FSDP has sharded: it would do so only when the block's node runs."""
        unshard = getattr(self.step.block, "unshard", None)
        if unshard is not None:
            unshard()

    def recover(self) -> Replay:
        step = self.step
        step.check_parameters()
        replay = Replay(step, self.sides)
        with span("recover", step), step.conditions():
            if step.stored:
                step.coupling.rerun(replay.call, self.state)
                replay.state = self.state
            else:
                replay.state = step.coupling.inverse(replay.call, self.state, step.dtypes)
        return replay

    def unwind(self, grads: State) -> tuple[Replay, tuple[Tensor | None, ...]]:
        """RECOVER and GRADS in turns, where the block allows it: graphs of one sub-block, not of the whole block.

        With nothing beside them, and each timed with the other: for whoever waits for both and looks on at neither.
        """
        step = self.step
        if step.stored or not step.coupling.unwinds:
            replay = self.replay()
            return replay, replay.gradients(grads)
        self.prepare()
        step.check_parameters()
        replay = Replay(step, self.sides)
        autocast, forced = Autocast.now(step.device), backends.forced()

        def pull(slot: int, grad: Tensor) -> Tensor:
            with torch.no_grad(), autocast.replayed(), forced_again(forced):  # those of this backward pass
                return replay.pull(slot, grad)

        grads = tuple(grad.detach() for grad in grads)  # their sums are made where graphs are built
        with step.conditions():
            replay.state, inputs = step.coupling.unwind(replay.call, pull, self.state, step.dtypes, grads)
        return replay, replay.completed(inputs)
