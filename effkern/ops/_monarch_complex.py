"""Complex Monarch products as real ones of twice the size: no kernel of their own, and every mode of the real op.

Real and imaginary parts stand as two planes. A block of the first factor writes one plane from both parts of its
input ([re, -im] or [im, re]), so the first factor has twice the blocks; the second maps both planes of its input to
both of its output. The permutation between them stays the same, because the planes are its slowest index.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _planes(w: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """What gives the real part, and what gives the imaginary part, of a product with inputs [re | im]."""
    return torch.cat((w.real, -w.imag), dim), torch.cat((w.imag, w.real), dim)


def double_input(x: Tensor, blocks: int) -> Tensor:
    """(..., k p) complex -> (..., 2 k 2 p) real: each block's [re | im], once for each plane."""
    parts = torch.view_as_real(x.resolve_conj().unflatten(-1, (blocks, -1))).mT.flatten(-2)  # (..., k, 2 p)
    return torch.stack((parts, parts), -3).flatten(-3)


def double_first(w: Tensor) -> Tensor:
    """(k, q, p) complex -> (2 k, q, 2 p) real"""
    return torch.cat(_planes(w, 2), 0)


def double_second(w: Tensor) -> Tensor:
    """(l, s, r) complex -> (l, 2 s, 2 r) real"""
    return torch.cat(_planes(w, 2), 1)


def join(planes: Tensor, dim: int) -> Tensor:
    """Real planes along `dim` -> complex."""
    return torch.complex(*planes.unbind(dim))
