"""The plots of a run's measurements: ratios to the baselines, and the roofline."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from .cases import Case
from .results import Results, Row
from .theme import Theme
from .words import number


def ratio_plot(results: Results) -> Callable[[Theme], Figure] | None:
    """A row a case, a panel a pass: how many times faster than each baseline."""
    rows = [row for row in results.rows if row.ratio]
    failed = [row for row in results.rows if row.verdict == "fail"]
    if not rows:
        return None
    places = _places(results.rows)
    passes = [p for p in ("forward", "backward", "both") if any(row.pass_ == p for row in rows)]
    best = _best_baselines(rows)

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(10, 1.1 + 0.26 * len(places)), layout="constrained")
        panels = figure.subplots(1, len(passes), sharey=True, sharex=True, squeeze=False)[0]
        ratios = [row.ratio or 1.0 for row in rows]
        low, high = min(0.7, *ratios) / 1.1, max(2.0, *ratios) * 1.35
        for axes, pass_ in zip(panels, passes, strict=True):
            for row in rows:
                if row.pass_ == pass_:
                    key = (row.case, row.pass_, row.backend)
                    _ratio_mark(axes, places[row.case], row, best[key] is row, theme)
            for row in failed:
                if row.pass_ == pass_:
                    axes.text(
                        1.03,
                        places[row.case],
                        "failed verification",
                        va="center",
                        fontsize=8.5,
                        color=theme.alarm,
                    )
            axes.axvline(1, color=theme.text, linewidth=1)
            axes.set_xscale("log")
            axes.set_xlim(low, high)
            ticks = [t for t in (0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128) if low <= t <= high]
            axes.set_xticks(ticks, [f"{t:g}x" for t in ticks])
            axes.minorticks_off()
            axes.set_yticks(list(places.values()), [case.replace("/", " ") for case in places])
            axes.set_ylim(max(places.values()) + 0.7, -0.7)
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(False)
            axes.grid(axis="x", color=theme.faint, alpha=0.25, linewidth=0.8)
            axes.set_axisbelow(True)
            axes.set_title(pass_)
        names = ", ".join(sorted({row.baseline or "" for row in rows}))
        figure.supxlabel(f"times as fast as {names} (log scale)", fontsize=9)
        return figure

    return draw


def _places(rows: Sequence[Row]) -> dict[str, float]:
    """Height of each case: models before the grid, one dtype after the other, a gap between such groups."""
    kinds = {row.case: (not row.case.startswith("grid"), row.dtype) for row in rows}
    groups = list(dict.fromkeys(kinds.values()))
    order = sorted(kinds, key=lambda case: groups.index(kinds[case]))
    places, height = {}, 0.0
    for i, case in enumerate(order):
        height += 0.0 if i == 0 else 1.0 if kinds[case] == kinds[order[i - 1]] else 1.7
        places[case] = height
    return places


def _best_baselines(rows: Sequence[Row]) -> dict[tuple[str, str, str], Row]:
    """The fastest baseline of each (case, pass, backend): the one that gets the bar and the number."""
    best: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        key = (row.case, row.pass_, row.backend)
        if key not in best or (row.ratio or 0.0) < (best[key].ratio or 0.0):
            best[key] = row
    return best


def _ratio_mark(axes: Axes, y: float, row: Row, is_best: bool, theme: Theme) -> None:
    ratio = row.ratio or 1.0
    colour = theme.forward if row.pass_ == "forward" else theme.backward
    if not is_best:
        axes.plot(ratio, y, "o", markersize=4, markerfacecolor="none", markeredgecolor=theme.faint)
        return
    axes.barh(y, ratio - 1, left=1, height=0.62, color=colour if ratio >= 1 else theme.faint)
    side = 1 if ratio >= 1 else -1
    axes.annotate(
        f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}",
        (ratio, y),
        xytext=(4 * side, 0),
        textcoords="offset points",
        ha="left" if side > 0 else "right",
        va="center",
        fontsize=8.5,
    )


def roofline_plot(results: Results, cases: Sequence[Case]) -> Callable[[Theme], Figure] | None:
    """Achieved rate over arithmetic intensity; a line leads from the fastest baseline (hollow) to ours."""
    known = {case.name: case for case in cases}
    timed = [row for row in results.rows if row.median_ms and row.case in known]
    best = _best_baselines(timed)
    dtypes = list(dict.fromkeys(row.dtype for row in timed))
    if not timed or "copy" not in results.roofs:
        return None

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(10, 4.6), layout="constrained")
        panels = figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0]
        for axes, dtype in zip(panels, dtypes, strict=True):
            points = []
            for row in (row for row in best.values() if row.dtype == dtype):
                flops = known[row.case].flops(row.pass_)
                points.append((flops / known[row.case].bytes(row.pass_), flops, row))
            _roofs(axes, results.roofs, dtype, [p[0] for p in points], theme)
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
            axes.xaxis.set_major_formatter(FuncFormatter(_plain_number))
            axes.grid(color=theme.faint, alpha=0.25, linewidth=0.8)
        panels[0].set_ylabel("GFLOP/s")
        panels[0].yaxis.set_major_formatter(FuncFormatter(_plain_number))
        _legend(figure, theme)
        return figure

    return draw


def _roofs(
    axes: Axes, roofs: dict[str, float], dtype: str, intensities: Sequence[float], theme: Theme
) -> None:
    low, high = min(intensities) / 2, max(intensities) * 2.5
    grid = [low * (high / low) ** (i / 200) for i in range(201)]
    names = [name for name in dict.fromkeys((f"matmul {dtype}", "matmul float32")) if name in roofs]
    for name in names:
        line = [min(roofs[name], roofs["copy"] * x) / 1e9 for x in grid]
        axes.loglog(grid, line, color=theme.text, linewidth=1.2, linestyle="-" if name == names[0] else "--")
        # Below the line for the lower of two roofs, above it for the higher one: the labels never meet.
        above = roofs[name] == max(roofs[n] for n in names)
        axes.annotate(
            f"torch.{name}: {number(roofs[name] / 1e9)} GFLOP/s",
            (grid[-1], line[-1]),
            xytext=(0, 4 if above else -4),
            textcoords="offset points",
            ha="right",
            va="bottom" if above else "top",
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


def _plain_number(value: float, position: int | None) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"
