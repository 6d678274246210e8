"""Products with palettised weights in plain PyTorch: the dense weight, then a matmul."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from effkern.ops.palettize import Palette

__all__ = ["palettized_linear"]


def palettized_linear(
    x: Tensor,
    palette: Palette,
    bias: Tensor | None = None,
    *,
    low_rank: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`effkern.palettized_linear`; the dense weight exists for the length of the call."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = palette.to_dense().flatten(1).to(wide)
    out = x.to(wide) @ weight.mT
    if bias is not None:
        out = out + bias.to(wide)
    if low_rank is not None:
        first, second = (factor.to(wide) for factor in low_rank)
        out = out + x.to(wide) @ first.mT @ second.mT
    return out.to(x.dtype)
