"""Linear layers of a model by Monarch matrices."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from effkern._convert_surgery import (
    Filter,
    Report,
    memory,
    places,
    predicate,
    relative_error,
    weight_reason,
)
from effkern.nn.monarch import MonarchLinear

if TYPE_CHECKING:
    from rich.table import Table


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
class MonarchReport(Report):
    """What `monarchize` did. Prints as a table: `rich.print(report)` or `print(report)`."""

    replaced: list[Monarchized] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)  # (name, reason)

    def _table(self) -> Table:
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
        return table


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
    takes = predicate("monarchize", filter)
    owners = _owners(model)
    report = MonarchReport()
    for parent, attribute, name, linear in list(places(model, nn.Linear)):
        assert isinstance(linear, nn.Linear)
        reason: str | None = "the filter does not take it"
        if takes(name, linear):
            reason = _reason(linear, parent, owners, nblocks, rank)
        if reason is not None:
            report.skipped.append((name, reason))
            continue
        made = MonarchLinear.from_linear(linear, nblocks, rank)
        for own, weight in ((made.w1, linear.weight), (made.w2, linear.weight), (made.bias, linear.bias)):
            if own is not None:
                own.requires_grad_(weight.requires_grad)
        setattr(parent, attribute, made)
        counts = linear.weight.numel(), made.w1.numel() + made.w2.numel()
        error = relative_error(linear.weight, made.dense_weight())
        report.replaced.append(Monarchized(name, error, *counts))
    return report


def _owners(model: nn.Module) -> dict[int, int]:
    """How many (module, attribute) places hold each piece of memory."""
    count: dict[int, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            count[memory(parameter)] = count.get(memory(parameter), 0) + 1
    return count


def _reason(
    linear: nn.Linear, parent: nn.Module, owners: dict[int, int], nblocks: int, rank: int | None
) -> str | None:
    """Why a layer stays as it is, None when it can be replaced."""
    reason = weight_reason(linear, parent, (nn.Linear,))
    if reason is not None:
        return reason
    if any(owners.get(memory(parameter), 1) > 1 for parameter in linear.parameters(recurse=False)):
        return "it stands in several places, or shares its parameters with another module"
    columns, rows = -(-linear.in_features // nblocks), -(-linear.out_features // nblocks)
    inner = -(-min(columns, rows) // nblocks) if rank is None else rank
    if inner > min(columns, rows):
        return f"rank {inner} is more than its blocks have ({min(columns, rows)})"
    after = nblocks * nblocks * inner * (columns + rows)
    weight = linear.weight
    return f"{after:,} parameters would replace {weight.numel():,}" if after >= weight.numel() else None
