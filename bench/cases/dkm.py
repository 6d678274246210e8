"""Differentiable k-means of a linear layer's weight against the same iterations under autograd, and coremltools.

coremltools' layer computes the same function here: same start, same temperature of the same squared distances, all
iterations; `effkern.bench.rivals` says what had to be switched off for that. In bfloat16 its centroids are bfloat16
too. Its error stands in its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import effkern
from effkern.ops.dkm import dkm_bytes, dkm_flops

from .. import rivals
from ..dkm_plain import chunked, unrolled
from ..memory import available_bytes
from . import Baseline, Call, Case, Oracle

SIZE = 0.02  # of a weight
LARGE = 1 << 22  # weights from which on coremltools takes ten seconds or more, and is timed once


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

    def _plain(self, weight: Tensor) -> Tensor:
        return unrolled(weight, self._start(weight.device), **self._options())

    def _fits(self, device: torch.device, pass_: str, kept: int = 2) -> bool:
        """Whether the unrolled iterations do: `kept` tensors of weights x clusters each are kept, and some more come
        and go; a backward that is timed alone keeps the graphs of two input sets."""
        shares = self.rows * self.columns * 2**self.bits * self.dtype.itemsize
        held = 4 if pass_ == "forward" else kept * self.iterations + 4
        return shares * held * (2 if pass_ == "backward" else 1) < 0.6 * available_bytes(device)

    def baselines(self, device: torch.device, pass_: str, full: bool) -> dict[str, Baseline]:
        found = {"autograd": Baseline(self._plain)} if self._fits(device, pass_) else {}
        large = self.rows * self.columns > LARGE
        if (
            rivals.installed("coremltools")
            and pass_ != "backward"
            and (self.bits == 3 or not large)
            and self._fits(device, pass_, kept=4)
        ):
            call = rivals.palettized(self._start(device), **self._options())
            found["coremltools"] = Baseline(call, once=large)
        return found

    def oracle(self, inputs: Sequence[Tensor], grad_out: Tensor | None) -> Oracle:
        (weight,) = (t.detach() for t in inputs)
        start, options = self._start(weight.device), self._options()
        exact = chunked(weight.double(), start, **options, grad_out=grad_out)
        if self._fits(weight.device, "forward" if grad_out is None else "both"):
            leaf = weight.requires_grad_(grad_out is not None)
            plain = self._plain(leaf)
            if grad_out is not None:
                (plain,) = torch.autograd.grad(plain, leaf, grad_out)
        else:
            plain = chunked(weight, start, **options, grad_out=grad_out)
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
        for bits in (2, 3, 4):
            name = f"{bits}bit/{short}"
            quick = ("forward", "both") if bits == 3 else ()
            found += [
                DkmCase(f"dkm/1024/{name}", dtype, passes, quick, rows=1024, columns=1024, bits=bits),
                DkmCase(f"dkm/4096/{name}", dtype, passes, (), bits=bits),
                DkmCase(f"dkm/4096x11008/{name}", dtype, passes, (), columns=11008, bits=bits),
            ]
    return found
