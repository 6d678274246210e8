"""Dual-residual blocks: pretrained residual networks that become reversible while they are finetuned."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from effkern.nn import _reversible_anchors as anchors
from effkern.nn._reversible_couplings import Coupling, Dual
from effkern.nn.reversible import Coupled, check_modules


class DualResidualBlock(Coupled):
    """A block of two streams around one sub-block, between a residual block and a reversible one.

        out = f(x) + alpha x + y        kept = beta x

    alpha = 1 with beta -> 0 is a residual block, so its pretrained weights work from the first step;
    `DualResidualSchedule` then moves the pair to where the block is undone accurately: x = kept / beta,
    y = out - f(x) - alpha x. Every undone block multiplies the error of rounding by about 1 / beta (for alpha + beta
    = 1), which is why `ReversibleSequence` predicts it and stores a state where it would exceed a budget.

    Args:
        f: module that returns a floating-point tensor of the shape of its input; as in `ReversibleBlock`.
        alpha, beta: finite numbers; attributes of the block, which may change between steps. They are not part of the
            state dict.

    Calling it:
        block(x, y, *args, **kwargs) -> (out, kept); extra arguments as in `ReversibleBlock`.

    Raises:
        TypeError, ValueError: f is no module; alpha or beta is not finite.

    Source: Zhao et al. 2024 (Dr2Net: Dynamic Reversible Dual-Residual Networks for Memory-Efficient Finetuning).
    """

    def __init__(self, f: nn.Module, alpha: float = 0.3, beta: float = 0.7) -> None:
        super().__init__()
        check_modules("DualResidualBlock", f=f)
        self.f = f
        self.alpha, self.beta = check_pair("DualResidualBlock", alpha, beta)

    def parts(self) -> list[tuple[str, nn.Module]]:
        return [("f", self.f)]

    def coupling(self, q: int | None) -> Coupling:
        return Dual(self.alpha, self.beta, q)

    @staticmethod
    def predicted_error(alpha: float, beta: float, depth: int, dtype: torch.dtype = torch.float32) -> float:
        """Error of a stack's recovered input after `depth` blocks whose streams are of `dtype`, states of size one."""
        return anchors.predicted_error(*check_pair("DualResidualBlock", alpha, beta), depth, dtype)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}, beta={self.beta:g}"


class DualResidualSchedule:
    """Moves alpha and beta of all dual-residual blocks of a model from one pair to another, linearly in the step.

    Args:
        model: module that has `DualResidualBlock`s in it.
        steps: how many calls of `step` the way takes; 0 is at the end at once.
        start: (alpha, beta) before the first step; None: the one that the blocks have, so that nothing changes before
            it. (1, 0), where `effkern.convert.reversible` starts, is the pretrained network.
        end: (alpha, beta) after the last one.

    Raises:
        ValueError: no such block in the model; steps is negative; a number is not finite; start is None and the blocks
            have several pairs, or end already.

    The blocks have the pair of step 0 from the construction on; call `step` after each step of the optimizer, never
    between a forward pass and its backward pass's end.
    """

    def __init__(
        self,
        model: nn.Module,
        steps: int,
        *,
        start: tuple[float, float] | None = None,
        end: tuple[float, float] = (0.3, 0.7),
    ) -> None:
        self._blocks = [module for module in model.modules() if isinstance(module, DualResidualBlock)]
        if not self._blocks:
            raise ValueError("DualResidualSchedule: model has no DualResidualBlock")
        if steps < 0:
            raise ValueError(f"DualResidualSchedule: steps must not be negative, got {steps}")
        self.steps = steps
        self.end = check_pair("DualResidualSchedule", *end)
        if start is None:
            start, *others = {(block.alpha, block.beta) for block in self._blocks}
            if others or (steps and start == self.end):
                found = sorted([start, *others])
                raise ValueError(
                    f"DualResidualSchedule: start must be given where blocks have no common pair or are at the end, "
                    f"{self.end}, already, got {', '.join(map(str, found))}"
                )
        self.start = check_pair("DualResidualSchedule", *start)
        self.done = 0
        self._apply()

    def step(self) -> tuple[float, float]:
        """One step on; returns the (alpha, beta) that holds from now on."""
        self.done = min(self.done + 1, self.steps)
        return self._apply()

    def _apply(self) -> tuple[float, float]:
        way = self.done / self.steps if self.done < self.steps else 1.0
        alpha, beta = (a + way * (b - a) if way < 1 else b for a, b in zip(self.start, self.end))
        for block in self._blocks:
            block.alpha, block.beta = alpha, beta
        return alpha, beta

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done, "steps": self.steps, "start": self.start, "end": self.end}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up the schedule where it was saved and gives the blocks its pair."""
        self.done, self.steps = state["done"], state["steps"]
        self.start, self.end = tuple(state["start"]), tuple(state["end"])
        self._apply()


def check_pair(owner: str, alpha: float, beta: float) -> tuple[float, float]:
    alpha, beta = float(alpha), float(beta)
    if not all(abs(number) < float("inf") for number in (alpha, beta)):
        raise ValueError(f"{owner}: alpha and beta must be finite, got ({alpha}, {beta})")
    return alpha, beta
