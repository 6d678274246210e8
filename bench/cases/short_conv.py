"""The short convolution in front of Mamba against the depthwise F.conv1d that models are written with."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import effkern
from effkern.ops.short_conv import short_conv_bytes, short_conv_flops
from effkern.reference.short_conv import short_conv as reference

from . import Baseline, Call, Case, Oracle


def conv1d_silu(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor | None = None) -> Tensor:
    """The causal slice of a padded Conv1d, as in the models; with a state the inputs are joined instead."""
    channels, taps = weight.shape
    if state is not None:
        return F.silu(F.conv1d(torch.cat((state, x), -1), weight[:, None], bias, groups=channels))
    padded = F.conv1d(x, weight[:, None], bias, padding=taps - 1, groups=channels)
    return F.silu(padded[..., : x.shape[-1]])


@dataclass(frozen=True)
class ShortConvCase(Case):
    """`channels` inner features of a model; length 1 is a decode step with a state."""

    batch: int = 1
    channels: int = 1536
    length: int = 2048
    taps: int = 4

    family = "long_conv"
    op = "short_conv"

    @property
    def shape(self) -> str:
        return f"B{self.batch} H{self.channels} L{self.length} W{self.taps}"

    def _shapes(self) -> list[tuple[int, ...]]:
        shapes: list[tuple[int, ...]] = [(self.batch, self.channels, self.length)]
        shapes += [(self.channels, self.taps), (self.channels,)]
        return [*shapes, (self.batch, self.channels, self.taps - 1)] if self.length == 1 else shapes

    def inputs(self, device: torch.device, seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        made = [torch.randn(shape, generator=generator) for shape in self._shapes()]
        made[1] *= self.taps**-0.5
        return tuple(t.to(device, self.dtype) for t in made)

    def ours(self, backend: str | None) -> Call:
        def call(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor | None = None) -> Tensor:
            return effkern.short_conv(x, weight, bias, activation="silu", state=state, backend=backend)

        return call

    def baselines(self, device: torch.device, pass_: str, full: bool) -> dict[str, Baseline]:
        found = {"conv1d": Baseline(conv1d_silu)}
        if full:
            torch._dynamo.reset()  # one graph a case
            torch._functorch.config.donated_buffer = (
                False  # the timed backward runs many times over one graph
            )
            found["compile-conv1d"] = Baseline(torch.compile(conv1d_silu, dynamic=False))
        return found

    def oracle(self, inputs: Sequence[Tensor], grad_out: Tensor | None) -> Oracle:
        def ran(call: Any, dtype: torch.dtype) -> list[Tensor]:
            leaves = [t.detach().to(dtype).requires_grad_(grad_out is not None) for t in inputs]
            out = call(*leaves)
            return [out] if grad_out is None else list(torch.autograd.grad(out, leaves, grad_out.to(dtype)))

        def exact(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor | None = None) -> Any:
            return reference(x, weight, bias, activation="silu", state=state)

        picked = ran(exact, torch.float64), ran(conv1d_silu, self.dtype)
        return Oracle(lambda tensors: [t.detach() for t in tensors], *picked, "all")

    def _count(self, formula: Any, pass_: str) -> float:
        made = [torch.empty(shape, dtype=self.dtype, device="meta") for shape in self._shapes()]
        count = functools.partial(formula, *made[:3], activation="silu", state=(*made, None)[3])
        directions = {"forward": [False], "backward": [True], "both": [False, True]}[pass_]
        return sum(count(backward=backward) for backward in directions)

    def flops(self, pass_: str) -> float:
        return self._count(short_conv_flops, pass_)

    def bytes(self, pass_: str) -> float:
        return self._count(short_conv_bytes, pass_)

    def tiny(self) -> ShortConvCase:
        return ShortConvCase(
            "tiny", self.dtype, self.passes, (), channels=4, length=min(8, self.length), taps=self.taps
        )


# Inner features of Mamba models, and the batch that makes about 6 to 8 million numbers at 2048 positions.
MODELS = {"mamba-130m": (1536, 2), "mamba-1.4b": (4096, 1), "mamba-2.8b": (5120, 1)}


def cases() -> list[Case]:
    found: list[Case] = []
    for dtype, short in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        for model, (channels, batch) in MODELS.items():
            judged = model != "mamba-2.8b"
            found.append(
                ShortConvCase(
                    f"short/{model}/{short}",
                    dtype,
                    ("forward", "backward", "both"),
                    ("forward", "both") if judged else (),
                    batch=batch,
                    channels=channels,
                )
            )
            found.append(
                ShortConvCase(
                    f"short/{model}/decode/{short}",
                    dtype,
                    ("forward",),
                    ("forward",) if model == "mamba-1.4b" else (),
                    batch=batch,
                    channels=channels,
                    length=1,
                )
            )
        found += [
            ShortConvCase(
                f"short/taps{taps}/{short}",
                dtype,
                ("forward", "backward", "both"),
                (),
                channels=1024,
                taps=taps,
            )
            for taps in (2, 3, 8, 16, 64, 128, 256)
        ]
    return found
