"""What happens between two sub-blocks of a reversible transformer against the PyTorch operations it replaces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import effkern
from effkern.ops.coupling import coupling_bytes, coupling_flops

from . import Baseline, Call, Case, Oracle

Q, ALPHA, BETA = 14, 0.3, 0.7


def exact_add(f: Tensor, y: Tensor) -> Tensor:
    """On the grid, with the look at the range that bit-exact recovery needs."""
    rounded = f.to(y.dtype).mul(2.0**Q).round_().mul_(2.0**-Q)
    out = y + rounded
    out.abs().amax()
    return out


def dual_add(f: Tensor, y: Tensor, x: Tensor) -> Tensor:
    out = torch.add(f, x, alpha=ALPHA) + y
    _ = x * BETA
    return out


@dataclass(frozen=True)
class CouplingCase(Case):
    """Streams in float32, the sub-block's output in the case's dtype, as under autocast."""

    tokens: int = 2048
    width: int = 1024
    dual: bool = False

    family = "reversible"
    op = "coupling"

    @property
    def shape(self) -> str:
        return f"{self.tokens}x{self.width} {'dual' if self.dual else 'exact'}"

    def inputs(self, device: torch.device, seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        made = [
            torch.randn(self.tokens, self.width, generator=generator) for _ in range(3 if self.dual else 2)
        ]
        if not self.dual:
            made[1] = effkern.coupling(made[1], q=Q)[0]
        return made[0].to(device, self.dtype), *(t.to(device) for t in made[1:])

    def _options(self) -> dict[str, Any]:
        return {"alpha": ALPHA, "keep": BETA} if self.dual else {"q": Q}

    def ours(self, backend: str | None) -> Call:
        return lambda *inputs: effkern.coupling(*inputs, **self._options(), backend=backend)[0]

    def baselines(self, device: torch.device, pass_: str, full: bool) -> dict[str, Baseline]:
        return {"pytorch": Baseline(dual_add if self.dual else exact_add)}

    def oracle(self, inputs: Sequence[Tensor], grad_out: Tensor | None) -> Oracle:
        plain = dual_add if self.dual else exact_add
        exact, composition = plain(*(t.double() for t in inputs)), plain(*inputs)
        return Oracle(lambda tensors: [t.detach() for t in tensors], [exact], [composition], "all")

    def _count(self, formula: Any) -> float:
        shape, wide = (self.tokens, self.width), torch.float32
        kinds = [self.dtype, wide, wide][: 3 if self.dual else 2]
        return formula(*(torch.empty(shape, dtype=kind, device="meta") for kind in kinds), **self._options())

    def flops(self, pass_: str) -> float:
        return self._count(coupling_flops)

    def bytes(self, pass_: str) -> float:
        return self._count(coupling_bytes)

    def tiny(self) -> CouplingCase:
        return CouplingCase("tiny", self.dtype, self.passes, (), tokens=2, width=8, dual=self.dual)


def cases() -> list[Case]:
    found: list[Case] = []
    for dtype, short in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        for name, tokens, width in (("vit-b", 8 * 197, 768), ("gpt2-medium", 4096, 1024)):
            for dual in (False, True):
                kind = "dual" if dual else "exact"
                quick = ("forward",) if name == "gpt2-medium" else ()
                found.append(
                    CouplingCase(
                        f"coupling/{name}/{kind}/{short}", dtype, ("forward",), quick, tokens, width, dual
                    )
                )
    return found
