"""The schedule of training with clustered weights: clustering hardens, centroids move on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from effkern.nn._clustering import ClusteredWeight


class TemperatureSchedule:
    """Hardens the clustering of a model over its training, and moves the centroids on.

        temperature after step s = start * end^(s / steps),  s up to steps

    Args:
        model: every ClusteredLinear and ClusteredEmbedding in it, found now, each with its own start temperature.
        steps: of the training.
        end: the last temperature over the first; 1 keeps it.

    Call `step()` once after every optimizer step. `state_dict()` and `load_state_dict()` are as those of a learning
    rate schedule.
    """

    def __init__(self, model: nn.Module, steps: int, *, end: float = 0.1) -> None:
        if steps < 1:
            raise ValueError(f"TemperatureSchedule: steps must be at least 1, got {steps}")
        if not 0 < end < math.inf:
            raise ValueError(f"TemperatureSchedule: end must be positive and finite, got {end}")
        self.steps, self.end, self.taken = steps, end, 0
        self.layers = [module for module in model.modules() if isinstance(module, ClusteredWeight)]
        if not self.layers:
            raise ValueError("TemperatureSchedule: the model has no clustered layer")
        self.starts = [layer.temperature for layer in self.layers]

    def step(self) -> None:
        """After an optimizer step: moves the centroids on and lowers the temperatures."""
        for layer in self.layers:
            layer.update_centroids()
        self._set(self.taken + 1)

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken, "starts": list(self.starts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if len(state["starts"]) != len(self.layers):
            raise ValueError(
                f"TemperatureSchedule: the state is of {len(state['starts'])} layers, the model has "
                f"{len(self.layers)}"
            )
        self.starts = list(state["starts"])
        self._set(state["taken"])

    def _set(self, taken: int) -> None:
        self.taken = taken
        factor = self.end ** (min(taken, self.steps) / self.steps)
        for layer, start in zip(self.layers, self.starts):
            layer.temperature = start * factor
