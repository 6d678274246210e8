"""Products with palettised weights against the dense layer that they replace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import effkern
from effkern.ops import _palette_layout as layout
from effkern.ops.palettized_linear import palettized_linear_bytes, palettized_linear_flops

from . import Baseline, Call, Case, Oracle


@dataclass(frozen=True)
class PalettizedCase(Case):
    """Tokens through a layer from `width` to `outputs` features, of which every weight is one of 2^bits."""

    width: int = 4096
    outputs: int = 4096
    bits: int = 3
    tokens: int = 1

    family = "dkm"
    op = "palettized_linear"

    @property
    def shape(self) -> str:
        return f"{self.tokens} tokens, {self.width} to {self.outputs}, {self.bits} bit"

    def inputs(self, device: torch.device, seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.tokens, self.width, generator=generator)
        # Any bits are indices: the layers are of whole blocks.
        bytes_a_row = layout.row_bytes(self.width, self.bits)
        indices = torch.randint(256, (self.outputs, bytes_a_row), generator=generator, dtype=torch.uint8)
        lut = torch.randn(2**self.bits, generator=generator).sort().values * self.width**-0.5
        return x.to(device, self.dtype), indices.to(device), lut.to(device, self.dtype)

    def _palette(self, indices: Tensor, lut: Tensor) -> effkern.Palette:
        return effkern.Palette(indices, lut, (self.outputs, self.width), self.bits)

    def ours(self, backend: str | None) -> Call:
        return lambda x, indices, lut: effkern.palettized_linear(
            x, self._palette(indices, lut), backend=backend
        )

    def baselines(self, device: torch.device, pass_: str, full: bool) -> dict[str, Baseline]:
        def dense(dtype: torch.dtype) -> Baseline:
            def prepare(x: Tensor, indices: Tensor, lut: Tensor) -> tuple[Tensor, Tensor]:
                return x.to(dtype), self._palette(indices, lut).to_dense().to(dtype)

            return Baseline(F.linear, prepare=prepare)

        found = {"dense": dense(self.dtype)}
        if full and self.dtype != torch.float32:
            found["dense-fp32"] = dense(torch.float32)  # faster where the CPU has no bf16 units
        return found

    def oracle(self, inputs: Sequence[Tensor], grad_out: Tensor | None) -> Oracle:
        x, indices, lut = inputs
        weight = self._palette(indices, lut).to_dense()
        exact = x.double() @ weight.double().mT
        plain = (x.float() @ weight.float().mT).to(self.dtype)
        return Oracle(lambda tensors: [t.detach() for t in tensors], [exact], [plain], "all")

    def _meta(self) -> tuple[Tensor, effkern.Palette]:
        rows, packed = self.outputs, layout.row_bytes(self.width, self.bits)
        indices = torch.empty(rows, packed, dtype=torch.uint8, device="meta")
        lut = torch.empty(2**self.bits, dtype=self.dtype, device="meta")
        x = torch.empty(self.tokens, self.width, dtype=self.dtype, device="meta")
        return x, self._palette(indices, lut)

    def flops(self, pass_: str) -> float:
        return palettized_linear_flops(*self._meta())

    def bytes(self, pass_: str) -> float:
        return palettized_linear_bytes(*self._meta())

    def tiny(self) -> PalettizedCase:
        return PalettizedCase(
            "tiny", self.dtype, self.passes, (), width=64, outputs=8, bits=self.bits, tokens=2
        )


def cases() -> list[Case]:
    found: list[Case] = []
    for outputs in (4096, 14336):
        for bits in (2, 3, 4):
            for tokens in (1, 4, 16, 256):
                for dtype, short in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
                    # In the first place decoding; without bf16 units many tokens take a dense bf16 layer seconds.
                    chosen = bits > 2 and (tokens == 1 or (tokens, dtype) == (256, torch.float32))
                    found.append(
                        PalettizedCase(
                            f"palettized/4096x{outputs}/{bits}bit/{tokens}/{short}",
                            dtype,
                            ("forward",),
                            ("forward",) if chosen and outputs == 4096 else (),
                            outputs=outputs,
                            bits=bits,
                            tokens=tokens,
                        )
                    )
    return found
