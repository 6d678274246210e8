"""The picture of a mask: its tiles as a kernel sees them. Needs matplotlib.

`python -m effkern._mask_plot PATH` draws one panel of each kind of mask, as in docs/images/masks.png.
"""

from __future__ import annotations

import sys
import textwrap
from os import PathLike

import numpy
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from effkern._mask_base import check_integer
from effkern.masks import BlockSparse, Document, Lambda, Mask, ShiftedGroups, SlidingWindow

# Blue and orange differ for every kind of colour vision, and in lightness; the hidden pairs of a tile are its tint.
_COLOURS = {"skipped": "#ffffff", "full": "#1f5f99", "partial": "#e08a1e", "hidden": "#f7dfbf"}
_LABELS = {
    "full": "full tile: no mask needed",
    "partial": "partial tile: visible pairs",
    "hidden": "partial tile: hidden pairs",
    "skipped": "skipped tile",
}
_SKIPPED, _FULL, _PARTIAL, _HIDDEN = range(4)


def classify(seen: Tensor, query_tile: int, key_tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """seen (Sq, Sk) -> a number a pair (its tile skipped, full; visible or hidden in a partial one), and two bool
    matrices over tiles: full, partial."""
    sq, sk = seen.shape
    rows, columns = torch.arange(sq) // query_tile, torch.arange(sk) // key_tile
    tiles = -(-sq // query_tile), -(-sk // key_tile)
    index = (rows[:, None] * tiles[1] + columns).flatten()
    sizes = torch.bincount(index, minlength=tiles[0] * tiles[1])
    visible = torch.bincount(index[seen.flatten()], minlength=tiles[0] * tiles[1])
    full, partial = (visible == sizes).view(tiles), ((visible > 0) & (visible < sizes)).view(tiles)
    pairs = torch.full((sq, sk), _SKIPPED)
    pairs[full[rows][:, columns]] = _FULL
    inside = partial[rows][:, columns]
    pairs[inside & seen], pairs[inside & ~seen] = _PARTIAL, _HIDDEN
    return pairs, full, partial


def draw(axes: Axes, seen: Tensor, query_tile: int, key_tile: int, title: str) -> None:
    """One head of a mask, seen (Sq, Sk), with the number of tiles visited under its title."""
    pairs, full, partial = classify(seen, query_tile, key_tile)
    sq, sk = seen.shape
    palette = ListedColormap([_COLOURS[name] for name in ("skipped", "full", "partial", "hidden")])
    axes.imshow(pairs.numpy(), cmap=palette, vmin=0, vmax=3, interpolation="nearest", aspect="equal")
    edges = numpy.arange(0, sq, query_tile)[1:] - 0.5, numpy.arange(0, sk, key_tile)[1:] - 0.5
    lines = [[(-0.5, y), (sk - 0.5, y)] for y in edges[0]] + [[(x, -0.5), (x, sq - 0.5)] for x in edges[1]]
    axes.add_collection(LineCollection(lines, colors="#b8b8b8", linewidths=0.5))
    visited, total = int(full.sum() + partial.sum()), full.numel()
    share = f" ({visited / total:.0%})" if total else ""
    axes.set_title(
        f"{textwrap.fill(title, 80)}\n{visited} of {total} tiles visited{share}, {int(partial.sum())} partial",
        fontsize=9,
    )
    axes.set_xlabel(f"key j (tiles of {key_tile})", fontsize=8)
    axes.set_ylabel(f"query i (tiles of {query_tile})", fontsize=8)
    axes.tick_params(labelsize=7)


def legend(figure: Figure) -> None:
    patches = [Patch(facecolor=_COLOURS[n], edgecolor="#808080", label=_LABELS[n]) for n in _LABELS]
    figure.legend(handles=patches, loc="outside lower center", ncols=2, fontsize=8, frameon=False)


def one_head(mask: Mask, Sq: int, Sk: int, heads: int, head: int, causal: bool, align: str) -> Tensor:
    """(Sq, Sk), of the first batch entry."""
    check_integer("plot", "head", head, 0)
    if head >= heads:
        raise ValueError(f"plot: head {head} of {heads} heads")
    seen = mask.to_dense(Sq, Sk, heads, align)[0].cpu()
    seen = seen[head if seen.shape[0] > 1 else 0]
    first = 0 if align == "top_left" else Sk - Sq
    return seen & (torch.arange(Sk) <= torch.arange(Sq)[:, None] + first) if causal else seen


def plot(
    mask: Mask,
    Sq: int,
    Sk: int,
    heads: int,
    head: int,
    causal: bool,
    align: str,
    query_tile: int,
    key_tile: int,
    path: str | PathLike[str] | None,
) -> Figure:
    for name, value in (("Sq", Sq), ("Sk", Sk), ("query_tile", query_tile), ("key_tile", key_tile)):
        check_integer("plot", name, value, 1)
    figure = Figure(figsize=(6, 1.5 + 5.2 * min(max(Sq / Sk, 0.3), 1.5)), layout="constrained")
    title = f"{mask}{', causal' if causal else ''}{f', head {head}' if heads > 1 else ''}"
    seen = one_head(mask, Sq, Sk, heads, head, causal, align)
    draw(figure.add_subplot(), seen, query_tile, key_tile, title)
    legend(figure)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def gallery(path: str) -> None:
    """A panel of each kind of mask, in square tiles of 32."""
    layout = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(3)) < 0.12
    layout |= torch.eye(16, dtype=torch.bool)
    documents = Document(torch.arange(4).repeat_interleave(torch.tensor([90, 190, 52, 180])))
    panels: list[tuple[str, Mask, int, int, bool]] = [  # title, mask, heads, head, causal
        ("SlidingWindow(left=100, right=60)", SlidingWindow(100, 60), 1, 0, False),
        ("Lambda(sink=24, window=112)", Lambda(24, 112), 1, 0, False),
        ("ShiftedGroups(128), causal, a shifted head", ShiftedGroups(128), 2, 1, True),
        ("BlockSparse(layout, block=32), causal", BlockSparse(layout, 32), 1, 0, True),
        ("Document(ids)", documents, 1, 0, False),
        ("SlidingWindow(150) & Document(ids), causal", SlidingWindow(150) & documents, 1, 0, True),
    ]
    figure = Figure(figsize=(11, 8.2), layout="constrained")
    for axes, (title, mask, heads, head, causal) in zip(figure.subplots(2, 3).flat, panels, strict=True):
        draw(axes, one_head(mask, 512, 512, heads, head, causal, "bottom_right"), 32, 32, title)
    legend(figure)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    gallery(sys.argv[1])
