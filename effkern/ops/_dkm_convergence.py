"""How the iterations of differentiable k-means went."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class DkmConvergence(NamedTuple):
    """What `effkern.dkm` did with the centroids of each group; outside the graph."""

    iterations: Tensor  # (groups), int64: below T where a group settled within the tolerance
    moved: (
        Tensor  # (groups, T): the most that any coordinate of a centroid moved by; 0 once a group has settled
    )
    counts: Tensor  # (groups, K): how many weights each cluster had at last, softly; an empty one has next to none

    @classmethod
    def of(cls, trajectory: Tensor, counts: Tensor, steps: Tensor) -> DkmConvergence:
        """From all centroids (groups, T+1, K, dim), all soft counts (groups, T, K) and the iterations made."""
        return cls(steps, trajectory.diff(dim=1).abs().amax((2, 3)).float(), counts.select(1, -1).float())
