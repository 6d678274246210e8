"""What converting a model to clustered or palettised layers reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from effkern._convert_report import Report
from effkern._convert_surgery import relative_error
from effkern.ops.palettize import Palette

if TYPE_CHECKING:
    from rich.table import Table


class Palettized(NamedTuple):
    """One replaced layer."""

    name: str
    bits_per_weight: float  # tables, padding and a low-rank correction included
    error: float  # |W - palette| / |W|, Frobenius, the correction included
    bytes_before: int
    bytes_after: int
    tied_to: str = ""  # the layer that has the same weight; the bytes of the palette are counted there
    factor_bytes: int = 0  # of bytes_after, those of the low-rank correction, which each layer has of its own

    @property
    def weights(self) -> float:
        return 8 * self.bytes_after / self.bits_per_weight


@dataclass
class ClusterReport(Report):
    """What `cluster` or `finalize` did."""

    replaced: list[Palettized] = field(default_factory=list)

    @property
    def bytes_before(self) -> int:
        """Of the weights that were replaced, each once."""
        return sum(layer.bytes_before for layer in self.replaced if not layer.tied_to)

    @property
    def bytes_after(self) -> int:
        """The same as palettes, tables and low-rank corrections included."""
        return sum(layer.factor_bytes if layer.tied_to else layer.bytes_after for layer in self.replaced)

    @property
    def bits_per_weight(self) -> float:
        """Of all replaced weights together; 0 where there are none."""
        count = sum(layer.weights for layer in self.replaced if not layer.tied_to)
        return 8 * self.bytes_after / count if count else 0.0

    def _entries(self) -> Sequence[Palettized]:
        return self.replaced

    def _totals(self) -> dict[str, Any]:
        return {
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "bits_per_weight": self.bits_per_weight,
        }

    def _table(self) -> Table:
        from rich.table import Table

        table = Table("layer", "bits per weight", "relative error", "bytes", "after", "smaller")
        for layer in self.replaced:
            numbers = [f"{layer.bits_per_weight:.4f}", f"{layer.error:.3g}"]
            sizes = [f"the weight of {layer.tied_to}", "", ""]
            if not layer.tied_to:
                sizes = _sizes(layer.bytes_before, layer.bytes_after)
            table.add_row(layer.name, *numbers, *sizes)
        if self.replaced:
            table.add_section()
            sizes = _sizes(self.bytes_before, self.bytes_after)
            table.add_row(f"{len(self.replaced)} layers", f"{self.bits_per_weight:.4f}", "", *sizes)
        return table

    def add(
        self,
        name: str,
        weight: Tensor,
        palette: Palette,
        first: str,
        low_rank: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """A layer called `name`; `first` is the one its weight was met in first."""
        dense, factors = palette.to_dense(), 0
        if low_rank is not None:
            dense = dense.float() + low_rank[1].float() @ low_rank[0].float()
            factors = sum(factor.nbytes for factor in low_rank)
        tied = "" if first == name else first
        after = palette.indices.nbytes + palette.lut.nbytes + factors
        bits, error = 8 * after / weight.numel(), relative_error(weight, dense)
        self.replaced.append(Palettized(name, bits, error, weight.nbytes, after, tied, factors))


def _sizes(before: int, after: int) -> list[str]:
    return [f"{before:,}", f"{after:,}", f"{before / after:.2f}x"]
