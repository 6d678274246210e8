"""Linear layers of a model by Monarch matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from effkern._convert_report import Report
from effkern._convert_surgery import Filter, Surgery, memory, places, relative_error, select, weight_reason
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
    """What `monarchize` did."""

    operation: str = "monarchize"
    replaced: list[Monarchized] = field(default_factory=list)

    @property
    def parameters_before(self) -> int:
        """Of the replaced layers, without biases."""
        return sum(layer.parameters_before for layer in self.replaced)

    @property
    def parameters_after(self) -> int:
        """The same of the layers in their place."""
        return sum(layer.parameters_after for layer in self.replaced)

    def _entries(self) -> Sequence[Monarchized]:
        return self.replaced

    def _totals(self) -> dict[str, Any]:
        return {"parameters_before": self.parameters_before, "parameters_after": self.parameters_after}

    def _table(self) -> Table:
        from rich.table import Table

        table = Table("layer", "relative error", "parameters", "after", "speed, at most")
        for layer in self.replaced:
            counts = f"{layer.parameters_before:,}", f"{layer.parameters_after:,}"
            table.add_row(layer.name, f"{layer.error:.3g}", *counts, f"{layer.speedup:.2f}x")
        if self.replaced:
            before, after = self.parameters_before, self.parameters_after
            table.add_section()
            table.add_row(
                f"{len(self.replaced)} layers", "", f"{before:,}", f"{after:,}", f"{before / after:.2f}x"
            )
        return table


def monarchize(
    model: nn.Module,
    nblocks: int = 4,
    *,
    only: Filter = None,
    skip: Filter = None,
    rank: int | None = None,
    dry_run: bool = False,
) -> MonarchReport:
    """Replaces the linear layers of a model by `effkern.nn.MonarchLinear`, in place, each by its best approximation.

    Args:
        model: changed in place. A model that is itself an nn.Linear cannot be: use `MonarchLinear.from_linear`.
        nblocks: as in MonarchLinear.
        only: the layers to replace: a pattern of their names ("*.mlp.*"), a subclass of nn.Linear, a function of name
            and module, or a list of these; None takes all.
        skip: the layers to leave alone, in the same way.
        rank: as in MonarchLinear.
        dry_run: the report is that of a conversion, and the model is not touched.

    Returns:
        A report: `.replaced` [(name, error, parameters before, parameters after)] and `.skipped` [(name, reason)] for
        every other linear layer. Parameters count the weight, not the bias. `.undo()` puts the dense layers back, with
        the weights that they had; until then, or until `.release()`, the report keeps them in memory.

    Raises:
        ValueError: nblocks is not positive, or a part of only or skip matches no linear layer.
        TypeError: model is an nn.Linear itself, or only or skip is none of the above.

    The factors are new Parameters: make the optimizer afterwards. No random numbers are drawn.

    A layer is left alone, and the report says why, when only or skip leaves it out, when it stands in several places
    or shares memory with another parameter, when its class is not exactly nn.Linear (others may be read from outside,
    as MultiheadAttention does with its output projection), when it belongs to an nn.TransformerEncoderLayer (which
    reads its weights), when it has hooks, when a parametrization or torch.nn.utils computes its weight, when the weight
    is not finite or not floating, or when a Monarch matrix would have as many parameters.
    """
    if nblocks < 1:
        raise ValueError(f"monarchize: nblocks must be at least 1, got {nblocks}")
    if isinstance(model, nn.Linear):
        raise TypeError("monarchize: the model is a linear layer itself; use MonarchLinear.from_linear")
    found = list(places(model, nn.Linear))
    named = [(name, layer) for _, _, name, layer in found]
    reasons = select("monarchize", "linear layers", named, only, skip)
    owners, surgery = _owners(model), Surgery("monarchize", model)
    report = MonarchReport(dry_run=dry_run, surgery=surgery)
    for place in found:
        parent, _, name, linear = place
        assert isinstance(linear, nn.Linear)
        reason = reasons[name] or _reason(linear, parent, owners, nblocks, rank)
        if reason is not None:
            report.skipped.append((name, reason))
            continue
        made = MonarchLinear.from_linear(linear, nblocks, rank)
        for own, weight in ((made.w1, linear.weight), (made.w2, linear.weight), (made.bias, linear.bias)):
            if own is not None:
                own.requires_grad_(weight.requires_grad)
        surgery.replace(place, made)
        counts = linear.weight.numel(), made.w1.numel() + made.w2.numel()
        error = relative_error(linear.weight, made.dense_weight())
        report.replaced.append(Monarchized(name, error, *counts))
    surgery.perform(dry_run)
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
