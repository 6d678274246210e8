"""The roofline: what each kernel reaches, under the roofs measured in the same run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from .cases import Case
from .results import Results, Row, best_baselines
from .theme import Theme
from .words import number


def roofline_plot(results: Results, cases: Sequence[Case]) -> Callable[[Theme], Figure] | None:
    """Achieved rate over arithmetic intensity; a line leads from the fastest baseline (hollow) to ours."""
    known = {case.name: case for case in cases}
    timed = [row for row in results.rows if row.median_ms and row.case in known]
    best = best_baselines(timed)
    dtypes = list(dict.fromkeys(row.dtype for row in timed))
    if not timed or "copy" not in results.roofs:
        return None

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(12, 4.6), layout="constrained")
        panels = figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0]
        for axes, dtype in zip(panels, dtypes, strict=True):
            points = []
            for row in (row for row in best.values() if row.dtype == dtype):
                flops = known[row.case].flops(row.pass_)
                points.append((flops / known[row.case].bytes(row.pass_), flops, row))
            _roofs(axes, results.roofs, dtype, points, theme)
            for intensity, flops, row in points:
                colour = theme.forward if row.pass_ == "forward" else theme.backward
                ours = flops / (row.median_ms or 1.0) / 1e6  # GFLOP/s
                if row.baseline_ms:
                    theirs = flops / row.baseline_ms / 1e6
                    axes.plot([intensity] * 2, [theirs, ours], color=colour, linewidth=1, alpha=0.45)
                    axes.plot(
                        intensity,
                        theirs,
                        "o",
                        markersize=5,
                        markerfacecolor=theme.page,
                        markeredgecolor=colour,
                    )
                axes.plot(intensity, ours, "o", markersize=6, color=colour)
            axes.set_title(dtype)
            axes.set_xlabel("FLOP per byte that must move")
            _plain_ticks(axes.xaxis)
            axes.grid(color=theme.faint, alpha=0.25, linewidth=0.8)
        panels[0].set_ylabel("GFLOP/s")
        _plain_ticks(panels[0].yaxis)
        _legend(figure, theme)
        return figure

    return draw


def _roofs(
    axes: Axes, roofs: dict[str, float], dtype: str, points: Sequence[tuple[float, float, Row]], theme: Theme
) -> None:
    intensities = [intensity for intensity, _, _ in points]
    slowest = min(flops / max(row.median_ms or 0.0, row.baseline_ms or 0.0) * 1e3 for _, flops, row in points)
    names = [name for name in dict.fromkeys((f"matmul {dtype}", "matmul float32")) if name in roofs]
    top = max(names, key=lambda name: roofs[name])
    # From left of the ridge, so that the slope of the copy roof shows.
    ridge = roofs[top] / roofs["copy"]
    low, high = min(ridge / 2, *(x / 2 for x in intensities)), max(ridge * 2, *(x * 2.5 for x in intensities))
    grid = [low * (high / low) ** (i / 200) for i in range(201)]
    for name in names:
        label = f"torch.{name}: {number(roofs[name] / 1e9)} GFLOP/s"
        if roofs[name] < slowest / 2:
            # A CPU without units for the dtype: the line would squeeze all that matters into a corner.
            axes.text(0.02, 0.02, f"{label}, below this plot", transform=axes.transAxes, fontsize=8.5)
            continue
        line = [min(roofs[name], roofs["copy"] * x) / 1e9 for x in grid]
        axes.loglog(grid, line, color=theme.text, linewidth=1.2, linestyle="-" if name == top else "--")
        axes.annotate(
            label,
            (grid[-1], line[-1]),
            xytext=(0, 4 if name == top else -4),
            textcoords="offset points",
            ha="right",
            va="bottom" if name == top else "top",
            fontsize=8.5,
        )
    axes.annotate(
        f"memory copy: {number(roofs['copy'] / 1e9)} GB/s",
        (low * 1.15, roofs["copy"] * low * 1.15 / 1e9),
        xytext=(10, -2),
        textcoords="offset points",
        va="center",
        fontsize=8.5,
    )
    axes.set_xlim(low, high)


def _legend(figure: Figure, theme: Theme) -> None:
    def dot(label: str, colour: str, fill: str | None = None) -> Line2D:
        return Line2D([], [], ls="", marker="o", color=colour, markerfacecolor=fill or colour, label=label)

    handles = [
        dot("forward", theme.forward),
        dot("backward", theme.backward),
        dot("effkern", theme.text),
        dot("fastest baseline", theme.text, theme.page),
    ]
    figure.legend(
        handles=handles, loc="outside upper right", ncols=4, frameon=False, fontsize=9, handletextpad=0.1
    )


def _plain_ticks(axis: Axis) -> None:
    low, high = axis.get_view_interval()
    crowded = math.log10(high / low) > 3
    axis.set_major_locator(LogLocator(subs=(1.0,) if crowded else (1.0, 2.0, 5.0), numticks=12))
    axis.set_major_formatter(FuncFormatter(_plain_number))
    axis.set_minor_locator(NullLocator())


def _plain_number(value: float, position: int | None) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"
