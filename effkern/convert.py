"""Surgery on models: layers replaced in place by compressed ones, with a report of what was done and what was not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from effkern.nn.monarch import MonarchLinear

if TYPE_CHECKING:  # rich costs more to import than the rest of effkern
    from rich.console import Console, ConsoleOptions, RenderResult

__all__ = ["MonarchReport", "Monarchized", "monarchize"]

Filter = str | Sequence[str] | type[nn.Module] | Callable[[str, nn.Module], bool] | None


class Monarchized(NamedTuple):
    """One replaced layer."""

    name: str
    error: float  # |W - M| / |W|, Frobenius
    parameters_before: int
    parameters_after: int

    @property
    def speedup(self) -> float:
        """Multiplications of the dense layer over those of the new one: the most that many tokens can gain."""
        return self.parameters_before / self.parameters_after


@dataclass
class MonarchReport:
    """What `monarchize` did. Prints as a table: `rich.print(report)` or `print(report)`."""

    replaced: list[Monarchized] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)  # (name, reason)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Table

        table = Table("layer", "relative error", "parameters", "after", "speed, at most")
        for layer in self.replaced:
            counts = f"{layer.parameters_before:,}", f"{layer.parameters_after:,}"
            table.add_row(layer.name, f"{layer.error:.3g}", *counts, f"{layer.speedup:.2f}x")
        if self.replaced:
            total = Monarchized(
                f"{len(self.replaced)} layers",
                0.0,
                sum(layer.parameters_before for layer in self.replaced),
                sum(layer.parameters_after for layer in self.replaced),
            )
            counts = f"{total.parameters_before:,}", f"{total.parameters_after:,}"
            table.add_section()
            table.add_row(total.name, "", *counts, f"{total.speedup:.2f}x")
        yield table
        if self.skipped:
            left = Table("not replaced", "reason")
            for row in self.skipped:
                left.add_row(*row)
            yield left

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=110)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def monarchize(
    model: nn.Module, nblocks: int = 4, filter: Filter = None, *, rank: int | None = None
) -> MonarchReport:
    """Replaces the linear layers of a model by `effkern.nn.MonarchLinear`, in place, each by its best approximation.

    Args:
        model: changed in place. A model that is itself an nn.Linear cannot be: use `MonarchLinear.from_linear`.
        nblocks: as in MonarchLinear.
        filter: which layers: a pattern of their names ("*.mlp.*") or several, a subclass of nn.Linear, or a function of
            name and module; None takes all.
        rank: as in MonarchLinear.

    Returns:
        A report: `.replaced` [(name, error, parameters before, parameters after)] and `.skipped` [(name, reason)] for
        every other linear layer. Parameters count the weight, not the bias.

    Raises:
        ValueError: nblocks is not positive.
        TypeError: model is an nn.Linear itself, or filter is none of the above.

    A layer is left alone, and the report says why, when the filter does not take it, when it stands in several places
    or shares memory with another parameter, when its class is not exactly nn.Linear (others may be read from outside,
    as MultiheadAttention does with its output projection), when it belongs to an nn.TransformerEncoderLayer (which
    reads its weights), when it has hooks, when a parametrization or torch.nn.utils computes its weight, when the weight
    is not finite or not floating, or when a Monarch matrix would have as many parameters.
    """
    if nblocks < 1:
        raise ValueError(f"monarchize: nblocks must be at least 1, got {nblocks}")
    if isinstance(model, nn.Linear):
        raise TypeError("monarchize: the model is a linear layer itself; use MonarchLinear.from_linear")
    takes = _predicate(filter)
    owners = _owners(model)
    report = MonarchReport()
    for parent, attribute, name, linear in list(_linears(model)):
        reason: str | None = "the filter does not take it"
        if takes(name, linear):
            read = isinstance(parent, nn.TransformerEncoderLayer)
            reason = "its parent reads its weight" if read else _reason(linear, owners, nblocks, rank)
        if reason is not None:
            report.skipped.append((name, reason))
            continue
        made = MonarchLinear.from_linear(linear, nblocks, rank)
        for own, weight in ((made.w1, linear.weight), (made.w2, linear.weight), (made.bias, linear.bias)):
            if own is not None:
                own.requires_grad_(weight.requires_grad)
        setattr(parent, attribute, made)
        counts = linear.weight.numel(), made.w1.numel() + made.w2.numel()
        report.replaced.append(Monarchized(name, _error(linear.weight, made.dense_weight()), *counts))
    return report


def _predicate(filter: Filter) -> Callable[[str, nn.Module], bool]:
    if filter is None:
        return lambda name, module: True
    if isinstance(filter, type):
        kind = filter
        return lambda name, module: isinstance(module, kind)
    if callable(filter):
        return filter
    patterns = (
        [filter] if isinstance(filter, str) else list(filter) if isinstance(filter, Sequence) else [None]
    )
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(
            "monarchize: filter must be a pattern, several, a class, or a function of name and module"
        )
    return lambda name, module: any(fnmatchcase(name, str(pattern)) for pattern in patterns)


def _linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, nn.Linear]]:
    """(parent, attribute, name, layer) of every linear layer, once."""
    for prefix, parent in model.named_modules():
        for attribute, child in parent.named_children():
            if isinstance(child, nn.Linear):
                yield parent, attribute, f"{prefix}.{attribute}" if prefix else attribute, child


def _memory(parameter: Tensor) -> int:
    return parameter.untyped_storage()._cdata


def _owners(model: nn.Module) -> dict[int, int]:
    """How many (module, attribute) places hold each piece of memory."""
    count: dict[int, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            count[_memory(parameter)] = count.get(_memory(parameter), 0) + 1
    return count


def _reason(linear: nn.Linear, owners: dict[int, int], nblocks: int, rank: int | None) -> str | None:
    """Why a layer stays as it is, None when it can be replaced."""
    if type(linear) is not nn.Linear:
        return f"its class is {type(linear).__name__}, not nn.Linear"
    if not isinstance(linear._parameters.get("weight"), nn.Parameter):
        return "its weight is computed from other parameters"
    weight = linear.weight
    if any(owners.get(_memory(parameter), 1) > 1 for parameter in linear.parameters(recurse=False)):
        return "it stands in several places, or shares its parameters with another module"
    hooks = (
        linear._forward_hooks,
        linear._forward_pre_hooks,
        linear._backward_hooks,
        linear._backward_pre_hooks,
    )
    if any(hooks):
        return "it has hooks"
    if not weight.is_floating_point() or not weight.isfinite().all():
        return "its weight is not finite" if weight.is_floating_point() else f"its weight is {weight.dtype}"
    columns, rows = -(-linear.in_features // nblocks), -(-linear.out_features // nblocks)
    inner = -(-min(columns, rows) // nblocks) if rank is None else rank
    if inner > min(columns, rows):
        return f"rank {inner} is more than its blocks have ({min(columns, rows)})"
    after = nblocks * nblocks * inner * (columns + rows)
    return f"{after:,} parameters would replace {weight.numel():,}" if after >= weight.numel() else None


def _error(weight: Tensor, approximation: Tensor) -> float:
    weight, approximation = (t.detach().double() for t in (weight, approximation))
    norm = torch.linalg.norm(weight).item()
    return torch.linalg.norm(weight - approximation).item() / norm if norm else 0.0
