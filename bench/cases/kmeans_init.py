"""Start values of weight clustering against Lloyd's iterations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import effkern
from effkern.ops.kmeans_init import kmeans_bytes, kmeans_flops
from effkern.reference import kmeans_init as reference

from . import Baseline, Call, Case, Oracle

ROUNDS = 25


@dataclass(frozen=True)
class KmeansCase(Case):
    """A Gaussian weight of (rows, columns), its values those of bfloat16 whatever the dtype: so few of them that the
    optimum can be found by trying everything."""

    rows: int = 4096
    columns: int = 4096
    clusters: int = 8

    family = "dkm"
    op = "kmeans_init"

    @property
    def shape(self) -> str:
        return f"{self.rows}x{self.columns}, {self.clusters} clusters"

    def inputs(self, device: torch.device, seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        weight = 0.02 * torch.randn(self.rows, self.columns, generator=generator)
        return (weight.bfloat16().to(device, self.dtype),)

    def ours(self, backend: str | None) -> Call:
        return lambda weight: effkern.kmeans_init(weight, self.clusters, backend=backend)

    def _lloyd(self, weight: Tensor) -> Tensor:
        """From quantiles of a sample; ends in a local optimum."""
        values = weight.float().flatten()
        sample = values[:: max(1, len(values) // 65536)]
        levels = (torch.arange(self.clusters, device=weight.device) + 0.5) / self.clusters
        centroids = sample.quantile(levels)
        for _ in range(ROUNDS):
            nearest = torch.bucketize(values, (centroids[1:] + centroids[:-1]) / 2)
            count = torch.bincount(nearest, minlength=self.clusters)
            total = torch.bincount(nearest, values.double(), minlength=self.clusters)
            centroids = torch.where(count > 0, total / count.clamp(min=1), centroids).float()
        return centroids

    def baselines(self, device: torch.device, pass_: str, full: bool) -> dict[str, Baseline]:
        return {"lloyd": Baseline(self._lloyd)}

    def oracle(self, inputs: Sequence[Tensor], grad_out: Tensor | None) -> Oracle:
        """How far the cost is above that of the exact optimum, relative to it: what is allowed is float32's rounding,
        whatever the dtype of the weight."""
        values, counts = inputs[0].double().unique(return_counts=True)
        exact = reference.kmeans_init(values, self.clusters, importance=counts.double())
        least = reference.kmeans_cost(values, exact, importance=counts)

        def excess(centroids: Tensor) -> Tensor:
            return reference.kmeans_cost(values, centroids, importance=counts) / least - 1

        return Oracle(
            lambda tensors: [excess(tensors[0])], [torch.zeros_like(least)], [excess(exact.float())], "all"
        )

    def _meta(self) -> Tensor:
        return torch.empty(self.rows, self.columns, dtype=self.dtype, device="meta")

    def flops(self, pass_: str) -> float:
        return kmeans_flops(self._meta(), self.clusters)

    def bytes(self, pass_: str) -> float:
        return kmeans_bytes(self._meta(), self.clusters)

    def tiny(self) -> KmeansCase:
        # One cluster: with more, Lloyd's iterations need not end where the optimum is.
        return KmeansCase("tiny", self.dtype, self.passes, (), rows=8, columns=8, clusters=1)


def cases() -> list[Case]:
    found: list[Case] = []
    for dtype, short in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for clusters in (8, 16):
            quick = ("forward",) if dtype == torch.bfloat16 and clusters == 8 else ()
            name = f"kmeans/4096/k{clusters}/{short}"
            found.append(KmeansCase(name, dtype, ("forward",), quick, clusters=clusters))
    return found
