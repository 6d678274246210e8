"""The three passes of a long convolution over memory, for its page in docs/:

python -m effkern.bench.long_conv_plot docs/images/long-conv-passes.png
"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from .theme import LIGHT, Theme, render

ROWS, COLUMNS, TILE = 8, 24, 4  # of the drawing


def _cell(axes: Axes, row: int, column: int, colour: str, alpha: float) -> None:
    axes.add_patch(Rectangle((column + 0.06, row + 0.08), 0.88, 0.84, color=colour, alpha=alpha, linewidth=0))


def _box(axes: Axes, theme: Theme, x: float, y: float, text: str, colour: str) -> None:
    width, height = 18.0, 1.5
    shape = FancyBboxPatch(
        (x - width / 2, y - height / 2),
        width,
        height,
        boxstyle="round,pad=0.1,rounding_size=0.4",
        facecolor=theme.page,
        edgecolor=colour,
        linewidth=1.6,
    )
    axes.add_patch(shape)
    axes.text(x, y, text, ha="center", va="center", fontsize=9)


def _arrow(axes: Axes, colour: str, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=colour, linewidth=1.5)
    )


def _matrix(axes: Axes, theme: Theme, colours: tuple[str, str], active: tuple[range, range]) -> None:
    """Rows of memory, as the pass before and this one have left them; `active` rows and columns are in the cache."""
    rows, columns = active
    by_row = len(columns) == COLUMNS
    for row in range(ROWS):
        for column in range(COLUMNS):
            finished = row < rows.stop if by_row else column < columns.stop
            in_cache = row in rows and column in columns
            _cell(axes, row, column, colours[finished], 1.0 if in_cache else 0.35 if finished else 0.22)
    outline = Rectangle(
        (columns.start, rows.start), len(columns), len(rows), fill=False, edgecolor=theme.text, linewidth=1.6
    )
    axes.add_patch(outline)
    axes.text(-0.5, 0.5, "row 0", ha="right", va="center", fontsize=8)
    axes.text(-0.5, ROWS - 0.5, "row n - 1", ha="right", va="center", fontsize=8)


def passes_plot(theme: Theme) -> Figure:
    figure = Figure(figsize=(12.5, 4.6), layout="constrained")
    panels = figure.subplots(1, 3)
    tile = range(2 * TILE, 3 * TILE)
    every_row, every_column = range(ROWS), range(COLUMNS)
    middle = (tile.start + tile.stop) / 2
    drawings = (
        (
            "1  down the columns",
            theme.forward,
            (every_row, tile),
            "passes down a tile of columns,\nthen every row turned to $x^C = i$",
            "reads u, times its gate; writes the rows",
        ),
        (
            "2  along the rows",
            theme.backward,
            (range(3, 4), every_column),
            "passes along the row, times the\nkernel's spectrum, and back",
            "reads and writes the rows; reads the spectrum",
        ),
        (
            "3  up the columns",
            theme.series[2],
            (every_row, tile),
            "turned back, passes up a tile of\ncolumns: the real part is the output",
            "reads the rows; writes out, with skip and gate",
        ),
    )
    before = theme.faint
    for axes, (title, colour, active, work, memory) in zip(panels, drawings, strict=True):
        _matrix(axes, theme, (before, colour), active)
        before = colour
        rows, columns = active
        x = middle if columns is tile else COLUMNS / 2
        bottom = rows.stop if columns is tile else ROWS
        _box(axes, theme, COLUMNS / 2, ROWS + 3.0, work, colour)
        _arrow(axes, colour, (x - 0.8, bottom + 0.15), (x - 0.8, ROWS + 2.0))
        _arrow(axes, colour, (x + 0.8, ROWS + 2.0), (x + 0.8, bottom + 0.15))
        axes.text(COLUMNS / 2, ROWS + 4.6, memory, ha="center", va="center", fontsize=8.5, style="italic")
        axes.set_title(title)
        axes.set_xlim(-4.2, COLUMNS + 0.3)
        axes.set_ylim(ROWS + 5.2, -0.4)
        axes.set_axis_off()
    return figure


if __name__ == "__main__":
    Path(sys.argv[1]).write_bytes(render(passes_plot, LIGHT))
