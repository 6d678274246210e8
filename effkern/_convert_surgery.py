"""What surgery on models needs whatever it puts in: which layers, their places, who owns a parameter, the way back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

Criterion = str | type[nn.Module] | Callable[[str, nn.Module], bool]
Filter = Criterion | Sequence[Criterion] | None
Children = Mapping[str, nn.Module | None]
Place = tuple[nn.Module, str, str, nn.Module]  # parent, attribute, name, layer

_SHOWN = 8  # names in the message of a filter that matches nothing
_DRY = "it was a dry run, which changed nothing"


def select(
    op: str, what: str, candidates: Iterable[tuple[str, nn.Module]], only: Filter, skip: Filter
) -> dict[str, str | None]:
    """By the name of a candidate: why the filters leave it alone, None where they take it.

    Raises:
        TypeError: a filter is none of what `Filter` lists.
        ValueError: a part of a filter matches no candidate, as a misspelt name does.
    """
    found = list(candidates)
    reasons: dict[str, str | None] = dict.fromkeys((name for name, _ in found), None)
    if only is not None:
        taken = _matched(op, what, "only", only, found)
        if not taken:
            raise ValueError(f"{op}: only is empty, which would leave every layer alone")
        reasons.update((name, "only does not match it") for name in reasons if name not in taken)
    if skip is not None:
        left = _matched(op, what, "skip", skip, found)
        reasons.update((name, "skip matches it") for name in left if reasons[name] is None)
    return reasons


def _matched(
    op: str, what: str, argument: str, filter: Filter, found: Sequence[tuple[str, nn.Module]]
) -> set[str]:
    criteria: list[object] = list(filter) if isinstance(filter, (list, tuple, set, frozenset)) else [filter]
    matched: set[str] = set()
    for criterion in criteria:
        test = _test(op, argument, criterion)
        names = {name for name, module in found if test(name, module)}
        if not names:
            known = ", ".join(name for name, _ in found[:_SHOWN]) + ", ..." * (len(found) > _SHOWN)
            shown = f"{len(found)} {what}: {known}" if found else f"{what}: there are none"
            raise ValueError(f"{op}: {argument} {_words(criterion)} matches none of the model's {shown}")
        matched |= names
    return matched


def _test(op: str, argument: str, criterion: object) -> Callable[[str, nn.Module], bool]:
    if isinstance(criterion, str):
        pattern = criterion
        return lambda name, module: fnmatchcase(name, pattern)
    if isinstance(criterion, type):
        kind = criterion
        return lambda name, module: isinstance(module, kind)
    if callable(criterion) and not isinstance(criterion, nn.Module):
        function = criterion
        return lambda name, module: bool(function(name, module))
    raise TypeError(
        f"{op}: {argument} must be a pattern of names, a class, a function of name and module, or a list of these, "
        f"got {type(criterion).__name__}"
    )


def _words(criterion: object) -> str:
    return repr(criterion) if isinstance(criterion, str) else getattr(criterion, "__name__", repr(criterion))


@dataclass
class _Edit:
    """Children of a container, under the keys before and after."""

    name: str
    container: nn.Module
    before: Children
    after: Children
    pairs: Sequence[tuple[nn.Module, nn.Module]]  # what was there, and what stands for it
    modes: list[bool] = field(default_factory=list)  # of the second ones once they are in place

    def put(self, children: Children) -> None:
        if self.before.keys() == self.after.keys():
            for key, child in children.items():
                setattr(self.container, key, child)
        else:  # a list of another length
            self.container._modules.clear()
            self.container._modules.update(children)

    def stands(self) -> bool:
        now = self.container._modules
        same_length = self.before.keys() == self.after.keys() or list(now) == list(self.after)
        return same_length and all(now.get(key) is child for key, child in self.after.items())

    def follow_modes(self) -> None:
        """A change of mode since the conversion did not reach the modules that were out of the model."""
        for (old, new), mode in zip(self.pairs, self.modes):
            if new.training != mode:
                inside = {id(module) for module in new.modules()}
                for module in old.modules():
                    if id(module) not in inside:
                        module.training = new.training


class Surgery:
    """What a conversion puts where: noted first, then put in place at once, and taken back on request."""

    def __init__(self, op: str, model: nn.Module) -> None:
        self.op = op
        self._model: nn.Module | None = model
        self._edits: list[_Edit] = []
        self._built: list[tuple[str, nn.Module, dict[str, nn.Module | None]]] = []
        self._ended = ""

    def replace(self, place: Place, new: nn.Module) -> None:
        parent, attribute, name, old = place
        self._edits.append(_Edit(name, parent, {attribute: old}, {attribute: new}, [(old, new)]))

    def replace_children(
        self, name: str, container: nn.Module, after: Children, pairs: Sequence[tuple[nn.Module, nn.Module]]
    ) -> None:
        self._edits.append(_Edit(name, container, dict(container._modules), after, pairs))

    def perform(self, dry_run: bool) -> None:
        """Puts the new modules in place; a dry run does not touch the model."""
        if dry_run:
            self._end(_DRY)
            return
        with self.applied():
            pass

    @contextlib.contextmanager
    def applied(self, dry_run: bool = False) -> Iterator[None]:
        """The new modules are in place inside, and afterwards where nothing failed and this is no dry run."""
        done = False
        try:
            for edit in self._edits:
                edit.put(edit.after)
            yield
            done = not dry_run
        finally:
            if not done:
                self._put_back()
        if dry_run:
            self._end(_DRY)
            return
        for edit in self._edits:
            edit.modes = [new.training for _, new in edit.pairs]
            old = {
                id(module)
                for child in edit.before.values()
                if child is not None
                for module in child.modules()
            }
            for new in dict.fromkeys(new for _, new in edit.pairs):
                self._built += [(edit.name, m, dict(m._modules)) for m in new.modules() if id(m) not in old]

    def undo(self) -> None:
        """As `Report.undo`."""
        if self._model is None:
            raise RuntimeError(f"undo of {self.op}: {self._ended}")
        reached = {id(module) for module in self._model.modules()}
        for edit in self._edits:
            if id(edit.container) not in reached or not edit.stands():
                raise RuntimeError(
                    f"undo of {self.op}: what it put in the place of {edit.name} is no longer there; undo first what "
                    "came later"
                )
        for name, module, children in self._built:
            if module._modules != children:
                raise RuntimeError(
                    f"undo of {self.op}: what it put in the place of {name} was converted in its turn; undo that first"
                )
        self._put_back()
        for edit in self._edits:
            edit.follow_modes()
        self._end("it has been undone already")

    def release(self) -> None:
        """As `Report.release`."""
        if self._model is not None:
            self._end("what it replaced has been released")

    def held_bytes(self) -> int:
        """As `Report.held_bytes`."""
        live = {memory(tensor) for tensor in _tensors([] if self._model is None else [self._model])}
        out = (child for edit in self._edits for child in edit.before.values() if child is not None)
        kept = {memory(tensor): tensor.untyped_storage().nbytes() for tensor in _tensors(out)}
        return sum(size for place, size in kept.items() if place not in live)

    def _put_back(self) -> None:
        for edit in reversed(self._edits):
            edit.put(edit.before)

    def _end(self, reason: str) -> None:
        self._edits, self._built, self._model, self._ended = [], [], None, reason


def _tensors(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    for module in modules:
        yield from module.parameters()
        yield from module.buffers()


def places(model: nn.Module, kinds: type[nn.Module] | tuple[type[nn.Module], ...]) -> Iterator[Place]:
    """(parent, attribute, name, layer) of every place in which a layer of these kinds stands; of a parent with several
    names the first."""
    for prefix, parent in model.named_modules():
        for attribute, child in parent._modules.items():
            if isinstance(child, kinds):
                yield parent, attribute, f"{prefix}.{attribute}" if prefix else attribute, child


def memory(parameter: Tensor) -> int:
    """The same number for tensors that share memory."""
    return parameter.untyped_storage()._cdata


def has_hooks(module: nn.Module) -> bool:
    return any(
        (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    )


def weight_reason(layer: nn.Module, parent: nn.Module, kinds: tuple[type[nn.Module], ...]) -> str | None:
    """Why the weight of a layer cannot be taken whatever replaces it, None when it can."""
    if isinstance(parent, nn.TransformerEncoderLayer):
        return "its parent reads its weight"
    if type(layer) not in kinds:
        expected = " or ".join(f"nn.{kind.__name__}" for kind in kinds)
        return f"its class is {type(layer).__name__}, not {expected}"
    weight = layer._parameters.get("weight")
    if not isinstance(weight, nn.Parameter):
        return "its weight is computed from other parameters"
    if has_hooks(layer):
        return "it has hooks"
    if not weight.is_floating_point() or not weight.isfinite().all():
        return "its weight is not finite" if weight.is_floating_point() else f"its weight is {weight.dtype}"
    return None


def relative_error(weight: Tensor, approximation: Tensor) -> float:
    """|W - approximation| / |W|, Frobenius."""
    weight, approximation = (t.detach().double() for t in (weight, approximation))
    norm = torch.linalg.norm(weight).item()
    return torch.linalg.norm(weight - approximation).item() / norm if norm else 0.0
