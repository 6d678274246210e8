"""What layers with clustered weights have in common: their centroids, the clustering, and the palette it ends in."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from effkern.ops._palette_layout import BITS
from effkern.ops.dkm import dkm
from effkern.ops.kmeans_init import kmeans_init
from effkern.ops.palettize import Palette, palettize

SOFTNESS = (
    0.1  # the temperature that a layer starts with, in squares of the gap between neighbouring centroids
)


class ClusteredWeight(nn.Module):
    """A weight that is used as `effkern.dkm` clusters it in training, and rounded to the nearest centroid otherwise.

    `weight` is the dense weight that is trained. `centroids` are where the clustering starts, `latest` where the last
    forward in training ended. A forward does not change where the next one starts, so that one which is repeated
    (activation checkpointing, several micro-batches a step) gives the same bits; `update_centroids` does, once a step.
    """

    weight: nn.Parameter
    centroids: Tensor
    latest: Tensor

    def __init__(
        self,
        shape: tuple[int, int],
        bits: int,
        *,
        groups: int,
        dim: int,
        temperature: float | None,
        iterations: int,
        tolerance: float,
        backend: str | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if min(shape) < 1:
            raise ValueError(f"{name}: sizes must be at least 1, got {shape[0]} and {shape[1]}")
        if bits not in BITS:
            raise ValueError(f"{name}: bits must be one of {', '.join(map(str, BITS))}, got {bits}")
        if groups < 1 or shape[0] % groups:
            raise ValueError(f"{name}: groups {groups} does not divide the {shape[0]} rows of the weight")
        if dim not in (1, 2, 4) or shape[1] % dim:
            raise ValueError(f"{name}: dim must be 1, 2 or 4 and divide {shape[1]}, got {dim}")
        if temperature is not None and not 0 < temperature < math.inf:
            raise ValueError(f"{name}: temperature must be positive and finite, got {temperature}")
        if iterations < 1:
            raise ValueError(f"{name}: iterations must be at least 1, got {iterations}")
        self.bits, self.groups, self.dim = bits, groups, dim
        self.iterations, self.tolerance, self.backend = iterations, tolerance, backend
        self._derived = temperature is None
        self.temperature = 1.0 if temperature is None else float(temperature)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        table = [groups] * (groups > 1) + [2**bits] + [dim] * (dim > 1)
        start = torch.zeros(table, device=device, dtype=torch.float32)
        self.register_buffer("centroids", start)
        self.register_buffer("latest", start.clone())

    @torch.no_grad()
    def reset_centroids(self, importance: Tensor | None = None) -> None:
        """Starts anew from the k-means of the weight; a temperature that was left open is chosen anew.

        Args:
            importance: as in `effkern.kmeans_init`.
        """
        if self.weight.is_meta:  # nothing to cluster yet: reset_parameters comes back once there is
            return
        found = kmeans_init(
            self.weight, 2**self.bits, groups=self.groups, dim=self.dim, importance=importance
        )
        self.centroids = found
        self.latest = found.clone()
        if self._derived:
            self.temperature = SOFTNESS * gap(found.reshape(self.groups, -1, self.dim)) ** 2

    def clustered_weight(self) -> Tensor:
        """The weight as the forward of training sees it, differentiable in `weight`."""
        clustered, found = dkm(
            self.weight,
            self.centroids,
            temperature=self.temperature,
            iterations=self.iterations,
            tolerance=self.tolerance,
            groups=self.groups,
            dim=self.dim,
            backend=self.backend,
        )
        self.latest.copy_(found)
        return clustered

    def effective_weight(self) -> Tensor:
        """`clustered_weight()` in training, else the dense form of `palette()`."""
        return self.clustered_weight() if self.training else self.palette().to_dense()

    def palette(self) -> Palette:
        """The weight rounded to the nearest of the centroids that the last forward in training ended with."""
        return palettize(self.weight.detach(), self.latest, groups=self.groups, dim=self.dim)

    @torch.no_grad()
    def update_centroids(self) -> None:
        """The next forward starts where the last one ended. Once after every optimizer step; `TemperatureSchedule` does
        it."""
        self.centroids.copy_(self.latest)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.temperature, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        self.temperature = float(state)

    def _settings(self) -> str:
        return (
            f"bits={self.bits}, groups={self.groups}, dim={self.dim}, temperature={self.temperature:.3g}, "
            f"iterations={self.iterations}"
        )


def gap(tables: Tensor) -> float:
    """The distance between neighbours of (groups, k, dim) centroids: the median over the centroids of that to the
    nearest other one; 1 where there are no two."""
    distances = torch.cdist(tables.double(), tables.double(), compute_mode="donot_use_mm_for_euclid_dist")
    others = torch.where(distances > 0, distances, torch.inf).amin(-1)
    others = others[others.isfinite()]
    return others.median().item() if others.numel() else 1.0
