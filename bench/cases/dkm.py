"""Differentiable k-means of a linear layer's weight against the same iterations under autograd."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import effkern
from effkern.ops.dkm import dkm_bytes, dkm_flops
from effkern.reference import dkm as reference

from . import Baseline, Call, Case, Oracle

SIZE = 0.02  # of a weight


@dataclass(frozen=True)
class DkmCase(Case):
    """A weight of (rows, columns), 2^bits clusters, T iterations from evenly spaced centroids. Neighbouring clusters
    share weights: the square of the gap between them is 20 temperatures."""

    rows: int = 4096
    columns: int = 4096
    bits: int = 3
    iterations: int = 3

    family = "dkm"
    op = "dkm"

    @property
    def shape(self) -> str:
        return f"{self.rows}x{self.columns} {self.bits}bit T{self.iterations}"

    def _options(self) -> dict[str, Any]:
        return {"temperature": (4 * SIZE / 2**self.bits) ** 2 / 20, "iterations": self.iterations}

    def _start(self, device: torch.device) -> Tensor:
        return torch.linspace(-2 * SIZE, 2 * SIZE, 2**self.bits, device=device)

    def inputs(self, device: torch.device, seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        weight = SIZE * torch.randn(self.rows, self.columns, generator=generator)
        return (weight.to(device, self.dtype),)

    def ours(self, backend: str | None) -> Call:
        def call(weight: Tensor) -> Tensor:
            start = self._start(weight.device)
            return effkern.dkm(weight, start, **self._options(), backend=backend)[0]

        return call

    def _composed(self, weight: Tensor) -> Tensor:
        """What the paper's layer does, intermediates in the weight's dtype."""
        temperature = self._options()["temperature"]
        column, centroids = weight.reshape(-1, 1), self._start(weight.device).to(weight.dtype)
        for _ in range(self.iterations):
            shares = torch.softmax(-(column - centroids).square() / temperature, 1)
            centroids = (shares * column).sum(0) / shares.sum(0)
        return (shares @ centroids).reshape(weight.shape)

    def baselines(self, device: torch.device, pass_: str, full: bool) -> dict[str, Baseline]:
        return {"autograd": Baseline(self._composed)}

    def oracle(self, inputs: Sequence[Tensor], grad_out: Tensor | None) -> Oracle:
        (weight,) = (t.detach() for t in inputs)
        options = self._options()
        start = self._start(weight.device).reshape(1, -1, 1)
        given = (options["temperature"], self.iterations, 0.0, 1, 1)
        with torch.no_grad():
            exact, *saved = reference.dkm_iterate(weight.double(), start, *given)
            if grad_out is not None:
                passed = (grad_out.double(), weight.double(), *saved, options["temperature"], 1, 1)
                exact = reference.dkm_backward(*passed)
        leaf = weight.requires_grad_(grad_out is not None)
        plain = self._composed(leaf)
        if grad_out is not None:
            (plain,) = torch.autograd.grad(plain, leaf, grad_out)
        return Oracle(lambda tensors: [t.detach() for t in tensors], [exact], [plain], "all")

    def _count(self, formula: Any, pass_: str) -> float:
        weight = torch.empty(self.rows, self.columns, dtype=self.dtype, device="meta")
        start = torch.empty(2**self.bits, device="meta")
        directions = {"forward": [False], "backward": [True], "both": [False, True]}[pass_]
        return sum(formula(weight, start, iterations=self.iterations, backward=b) for b in directions)

    def flops(self, pass_: str) -> float:
        return self._count(dkm_flops, pass_)

    def bytes(self, pass_: str) -> float:
        return self._count(dkm_bytes, pass_)

    def tiny(self) -> DkmCase:
        return DkmCase("tiny", self.dtype, self.passes, (), rows=8, columns=8)


def cases() -> list[Case]:
    found: list[Case] = []
    passes = ("forward", "backward", "both")
    for dtype, short in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        found += [
            DkmCase(f"dkm/1024/3bit/{short}", dtype, passes, ("forward", "both"), rows=1024, columns=1024),
            DkmCase(f"dkm/4096/3bit/{short}", dtype, passes, ()),
            DkmCase(f"dkm/1024/4bit/{short}", dtype, passes, (), rows=1024, columns=1024, bits=4),
        ]
    return found
