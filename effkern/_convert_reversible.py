"""Pretrained residual networks made reversible: `effkern.convert.reversible`."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from effkern._convert_report import Report
from effkern._convert_surgery import Filter, Surgery, has_hooks, select
from effkern._residual_trace import Residual, Untraceable, trace
from effkern.nn import _reversible_anchors as anchoring
from effkern.nn._reversible_couplings import Dual
from effkern.nn._reversible_stack import ReversibleStack, stack_key
from effkern.nn.dual_residual import DualResidualBlock
from effkern.nn.reversible import Coupled
from effkern.nn.reversible_sequence import ReversibleSequence

if TYPE_CHECKING:  # rich costs more to import than the rest of effkern
    from rich.table import Table

_END = (0.3, 0.7)  # where `DualResidualSchedule` leads
_REVERSIBLE = (Coupled, ReversibleSequence, ReversibleStack)
_ROUNDINGS = 64  # that outputs of the same model may differ by


class Reversed(NamedTuple):
    """A run of blocks that has become one `ReversibleStack`."""

    name: str  # of the first of them, as it was
    blocks: int
    branches: int  # residual branches in all of them
    arguments: tuple[str, ...]  # what is handed on to children
    stored: int  # branches whose input is stored, at the (alpha, beta) it was made with
    stored_at_end: int  # and at (0.3, 0.7)


@dataclass
class ReversibleReport(Report):
    """What `reversible` did."""

    operation: str = "reversible"
    replaced: list[Reversed] = field(default_factory=list)
    difference: float | None = (
        None  # of the outputs on the example, relative to the largest; None without one
    )

    def _entries(self) -> Sequence[Reversed]:
        return self.replaced

    def _totals(self) -> dict[str, Any]:
        return {"difference": self.difference}

    def _table(self) -> Table:
        from rich.table import Table

        table = Table("stack", "blocks", "branches", "arguments", "inputs stored", f"at {_END}")
        if self.difference is not None:
            table.caption = f"outputs differ by {self.difference:.2g} of the largest"
        for stack in self.replaced:
            counts = [str(n) for n in (stack.blocks, stack.branches)]
            kept = [str(n) for n in (stack.stored, stack.stored_at_end)]
            table.add_row(stack.name, *counts, ", ".join(stack.arguments), *kept)
        return table


def reversible(
    model: nn.Module,
    *,
    only: Filter = None,
    skip: Filter = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    overlap: bool | str = "auto",
    error_budget: float = 1e-3,
    example: Tensor | Sequence[Any] | Mapping[str, Any] | None = None,
    dry_run: bool = False,
) -> ReversibleReport:
    """Makes the residual blocks of a pretrained model dual-residual ones, in place, to finetune it in less memory.

    Blocks that compute x = x + f(x), x = x + g(x), ... and follow each other in an nn.ModuleList or nn.Sequential
    become one `ReversibleStack` in the place of the first: a `DualResidualBlock` for every f and g, whose weights are
    those of the block. With alpha = 1 and beta = 0 the model computes what it did, and stores the inputs of f and g,
    nothing inside them. `effkern.nn.DualResidualSchedule` then moves the pair to (0.3, 0.7), where even those are
    recovered. What a block computes is found by running its forward on stand-ins for its children, so names do not
    matter: blocks of timm's ViT and of GPT-2 in transformers are such blocks, post-norm blocks of BERT are not.

    Args:
        model: changed in place; a block that is the model itself cannot be converted. Load checkpoints before: names of
            parameters change, the parameters themselves stay.
        only: the blocks to convert: a pattern of their names ("encoder.*"), a class, a function of name and module, or
            a list of these; None takes all.
        skip: the blocks to leave alone, in the same way.
        alpha, beta: the pair to start from.
        overlap, error_budget: as in `effkern.nn.ReversibleSequence`.
        example: input of the model, a tensor, positional arguments or keywords, to compare its outputs before and
            after. A model that reads its blocks otherwise than one after the other is found out only this way.
        dry_run: the report is that of a conversion, and the model ends as it was: with an example it is run.

    Returns:
        A report: `.replaced` [(name, blocks, branches, arguments, stored, stored_at_end)], `.skipped` [(name, reason)]
        for other blocks with children in such lists, `.difference` of the outputs on the example with alpha = 1 and
        beta = 0. `.undo()` puts the blocks back; their Parameters are the same, so this costs no memory, and have the
        values that training has made for the (alpha, beta) of the end, with which the blocks do not compute.

    Raises:
        TypeError: only or skip is none of the above.
        ValueError: a part of only or skip matches no child of such a list that has children of its own; alpha, beta,
            overlap or error_budget is out of range.
        RuntimeError: the outputs on the example differ by more than roundings; the model is then as it was.

    A block is left alone, and the report says why, when only or skip leaves it out, when it has hooks, when its
    forward is no sequence of residual branches or calls its children differently in training, and when it has
    parameters that no branch has. Arguments of blocks that only go to their children are handed on; others must keep
    their defaults. Caches of keys and values work without gradients, where all blocks share one.

    Source: Zhao et al. 2024 (Dr2Net: Dynamic Reversible Dual-Residual Networks for Memory-Efficient Finetuning).
    """
    options = {"alpha": alpha, "beta": beta, "overlap": overlap, "error_budget": error_budget}
    earlier = {id(block) for block in _dual_blocks(model)}
    lists = [(name, module) for name, module in model.named_modules() if _runs_in_turn(module)]
    blocks = [named for name, module in lists for named in _children(name, module) if _is_block(named[1])]
    reasons = select("reversible", "blocks in lists", blocks, only, skip)
    expected = None if example is None else _outputs(model, example)
    surgery = Surgery("reversible", model)
    report = ReversibleReport(dry_run=dry_run, surgery=surgery)
    inside: set[int] = set()  # of what is converted
    for name, module in lists:
        if id(module) not in inside:
            inside |= _convert(name, module, reasons, options, report, surgery)
    if example is None or expected is None:
        surgery.perform(dry_run)
        return report
    with surgery.applied(dry_run):
        new = [block for block in _dual_blocks(model) if id(block) not in earlier]
        with _pretrained_pair(new):
            report.difference = _checked_difference(expected, _outputs(model, example))
    return report


def _runs_in_turn(module: nn.Module) -> bool:
    """Whether its children are, as far as one can tell, called one after the other."""
    return isinstance(module, nn.ModuleList) or type(module).forward is nn.Sequential.forward


def _convert(
    prefix: str,
    container: nn.Module,
    reasons: Mapping[str, str | None],
    options: dict[str, Any],
    report: ReversibleReport,
    surgery: Surgery,
) -> set[int]:
    """Makes a stack of each run of blocks of one kind; returns the modules that are not to be looked at again."""
    entries = _children(prefix, container)
    names, children = [name for name, _ in entries], [child for _, child in entries]
    traces = [_trace(name, child, reasons, report) for name, child in entries]
    kinds = [
        None if found is None else (type(child), found.nones, stack_key(found))
        for child, found in zip(children, traces)
    ]
    made: list[nn.Module] = []
    pairs: list[tuple[nn.Module, nn.Module]] = []
    for kind, group in itertools.groupby(range(len(children)), kinds.__getitem__):
        places = list(group)
        if kind is None:
            made += [children[place] for place in places]
            continue
        run = [(children[place], found) for place in places if (found := traces[place]) is not None]
        stack = ReversibleStack([block for block, _ in run], [found for _, found in run], **options)
        report.replaced.append(_reversed(names[places[0]], len(run), stack, options["error_budget"]))
        made.append(stack)
        pairs += [(block, stack) for block, _ in run]
    if pairs:
        after = {str(place): child for place, child in enumerate(made)}
        surgery.replace_children(prefix or "the model", container, after, pairs)
    settled = [module for module in made if isinstance(module, _REVERSIBLE)]
    return {id(inner) for module in settled for inner in module.modules()}


def _children(prefix: str, container: nn.Module) -> list[tuple[str, nn.Module]]:
    return [
        (f"{prefix}.{key}" if prefix else key, child)
        for key, child in container._modules.items()
        if child is not None
    ]


def _is_block(module: nn.Module) -> bool:
    return not isinstance(module, _REVERSIBLE) and any(True for _ in module.children())


def _trace(
    name: str, block: nn.Module, reasons: Mapping[str, str | None], report: ReversibleReport
) -> Residual | None:
    """The branches of a block, None where it stays as it is."""
    if not _is_block(block):
        return None
    found: Residual | None = None
    reason = reasons[name]
    if reason is None:
        try:
            found = trace(block)
            reason = _reason(block, found)
        except Untraceable as refusal:
            reason = str(refusal)
    if reason is not None:
        report.skipped.append((name, reason))
        return None
    return found


def _reason(block: nn.Module, found: Residual) -> str | None:
    """Why a block of residual branches stays as it is all the same."""
    if has_hooks(block):
        return "it has hooks"
    parts = [block.get_submodule(call.child) for branch in found.branches for call in branch]
    reached = {id(tensor) for part in parts for _, tensor in _tensors(part)}
    left = next((name for name, tensor in _tensors(block) if id(tensor) not in reached), None)
    return None if left is None else f"its branches do not use its {left}"


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return itertools.chain(module.named_parameters(), module.named_buffers())


def _reversed(name: str, blocks: int, stack: ReversibleStack, budget: float) -> Reversed:
    couplings = [block.coupling(None) for block in _dual_blocks(stack)]
    weight = next((p for p in stack.parameters() if p.is_floating_point()), None)
    dtype = torch.float32 if weight is None else weight.dtype

    def stored(pairs: Sequence[Any]) -> int:
        return len(anchoring.choose_anchors(tuple(pairs), dtype, budget))

    at_end = stored([Dual(*_END)] * len(couplings))
    return Reversed(name, blocks, len(couplings), stack.arguments, stored(couplings), at_end)


def _outputs(model: nn.Module, example: Tensor | Sequence[Any] | Mapping[str, Any]) -> list[Tensor]:
    """The floating-point tensors that the model returns in evaluation, copied."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            if isinstance(example, Mapping):
                out = model(**example)
            else:
                out = model(*([example] if isinstance(example, Tensor) else example))
    finally:
        for module, training in modes:
            module.training = training
    leaves = pytree.tree_leaves(dict(out) if isinstance(out, Mapping) else out)
    return [leaf.clone() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _checked_difference(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """How far the outputs of the converted model are from those it had, relative to the largest number in each."""
    if [t.shape for t in found] != [t.shape for t in expected]:
        raise RuntimeError(
            f"reversible: the model returned {len(expected)} tensors on the example and then {len(found)}, or of other "
            "shapes: it reads its blocks otherwise than one after the other; it was left as it was"
        )
    largest = 0.0
    for a, b in zip(found, expected):
        scale = b.abs().max().item() if b.numel() else 0.0
        difference = (a - b).abs().max().item() / scale if scale else 0.0
        if not difference <= _ROUNDINGS * torch.finfo(b.dtype).eps:
            raise RuntimeError(
                f"reversible: an output on the example differs by {difference:.2g} of its largest number, so the model "
                "does not run its blocks one after the other; it was left as it was"
            )
        largest = max(largest, difference)
    return largest


def _dual_blocks(model: nn.Module) -> list[DualResidualBlock]:
    return [block for block in model.modules() if isinstance(block, DualResidualBlock)]


@contextlib.contextmanager
def _pretrained_pair(blocks: Sequence[DualResidualBlock]) -> Iterator[None]:
    """(alpha, beta) = (1, 0) for a while."""
    pairs = [(block.alpha, block.beta) for block in blocks]
    try:
        for block in blocks:
            block.alpha, block.beta = 1.0, 0.0
        yield
    finally:
        for block, (alpha, beta) in zip(blocks, pairs):
            block.alpha, block.beta = alpha, beta
