"""Attention masks as data: which keys a query sees, in a form that kernels turn into lists of tiles.

    window = effkern.masks.SlidingWindow(left=1024, right=0)
    out = effkern.attention(q, k, v, mask=window & effkern.masks.Document(ids))

Everywhere i is the row of a query, p its position (i + Sk - Sq, or i with align="top_left") and j the position of a
key; with cu_seqlens all three count inside a sequence. Masks are values: make a new one instead of changing one.
"""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from effkern._mask_base import UNBOUNDED, Lowered, Mask, check_integer
from effkern._mask_tables import BlockSparse, Dense, Document

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "UNBOUNDED",
    "BlockSparse",
    "Dense",
    "Document",
    "Lambda",
    "Lowered",
    "Mask",
    "ShiftedGroups",
    "SlidingWindow",
    "alibi_slopes",
    "plot",
]


class SlidingWindow(Mask):
    """p - left <= j <= p + right; None leaves an end open.

    Args:
        left: how many keys before its own position a query sees, at least 0.
        right: how many after it, at least 0.

    Source: Beltagy et al. 2020 (Longformer), section 3.1.
    """

    def __init__(self, left: int | None = None, right: int | None = None) -> None:
        for name, value in (("left", left), ("right", right)):
            if value is not None:
                check_integer("SlidingWindow", name, value, 0, or_none=True)
        self.left, self.right = left, right
        ends = (UNBOUNDED if n is None or n > UNBOUNDED else n for n in (left, right))
        self._lowered = Lowered() if left is None and right is None else Lowered(bands=(*ends, 0))

    def _sees(self, i: Tensor, p: Tensor, j: Tensor, heads: int) -> Tensor:
        seen = torch.ones_like(p - j, dtype=torch.bool)
        if self.left is not None:
            seen = seen & (j >= p - self.left)
        return seen if self.right is None else seen & (j <= p + self.right)

    def __repr__(self) -> str:
        return f"SlidingWindow(left={self.left}, right={self.right})"


class Lambda(Mask):
    """j <= p and (p - j < window or j < sink): the first keys, and the last ones before the query.

    Args:
        sink: how many keys at the start of the sequence stay visible, at least 0.
        window: how many keys up to and with its own position a query sees, at least 1.

    Source: Han et al. 2023 (LM-Infinite), section 4.1; Xiao et al. 2023 (StreamingLLM), section 3.2.
    """

    def __init__(self, sink: int, window: int) -> None:
        check_integer("Lambda", "sink", sink, 0)
        check_integer("Lambda", "window", window, 1)
        self.sink, self.window = sink, window
        self._lowered = Lowered(bands=(min(window - 1, UNBOUNDED), 0, min(sink, UNBOUNDED)))

    def _sees(self, i: Tensor, p: Tensor, j: Tensor, heads: int) -> Tensor:
        return (j <= p) & ((p - j < self.window) | (j < self.sink))

    def __repr__(self) -> str:
        return f"Lambda(sink={self.sink}, window={self.window})"


class ShiftedGroups(Mask):
    """(p + s) // group == (j + s) // group, with s = 0 in the first Hq // 2 query heads and group // 2 in the others.

    Nothing wraps around: where the published version rolls the sequence, and lets the first queries see the last
    keys, the first and the last group are simply shorter.

    Args:
        group: length of a group, at least 1.

    Source: Chen et al. 2023 (LongLoRA), section 3.2, shifted sparse attention.
    """

    def __init__(self, group: int) -> None:
        check_integer("ShiftedGroups", "group", group, 1)
        self.group = group
        self._lowered = Lowered(groups=(min(group, UNBOUNDED),))

    def _sees(self, i: Tensor, p: Tensor, j: Tensor, heads: int) -> Tensor:
        shift = torch.zeros(heads, 1, 1, dtype=torch.int64, device=j.device)
        shift[heads // 2 :] = self.group // 2
        return (p + shift).div(self.group, rounding_mode="floor") == (j + shift) // self.group

    def __repr__(self) -> str:
        return f"ShiftedGroups(group={self.group})"


def alibi_slopes(heads: int) -> Tensor:
    """The usual slopes of ALiBi: a geometric sequence that starts at its own ratio.

        slope_h = 2 ** (-8 (h + 1) / heads)

    Where `heads` is not a power of two, those of the next smaller one come first, then every other of the next larger.

    Args:
        heads: Hq, at least 1.

    Returns:
        float32 (heads,).

    Example:
        >>> effkern.masks.alibi_slopes(4)
        tensor([0.2500, 0.0625, 0.0156, 0.0039])

    Source: Press et al. 2021 (ALiBi), section 3.
    """
    check_integer("alibi_slopes", "heads", heads, 1)
    whole = 2 ** (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (h + 1) / whole) for h in range(whole)]
    slopes += [2.0 ** (-4.0 * (2 * h + 1) / whole) for h in range(heads - whole)]
    return torch.tensor(slopes)


def plot(
    mask: Mask,
    Sq: int,
    Sk: int,
    *,
    heads: int = 1,
    head: int = 0,
    causal: bool = False,
    align: str = "bottom_right",
    query_tile: int = 64,
    key_tile: int = 64,
    path: str | PathLike[str] | None = None,
) -> Figure:
    """Draws the tiles of a mask: those computed without looking at it, those masked pair by pair, those skipped.

    Args:
        mask: what to draw, of its first batch entry.
        Sq: number of queries.
        Sk: number of keys.
        heads: Hq, as in `Mask.to_dense`.
        head: the query head to draw.
        causal: whether keys after the query's position are hidden as well.
        align: where the queries stand when Sq != Sk, as in `effkern.attention`.
        query_tile: rows of a tile. The kernels' own sizes depend on machine, dtype and head dimension.
        key_tile: columns of a tile.
        path: where to save the picture; the ending chooses the format.

    Returns:
        The figure. Needs matplotlib.
    """
    from effkern._mask_plot import plot

    return plot(mask, Sq, Sk, heads, head, causal, align, query_tile, key_tile, path)
