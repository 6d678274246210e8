"""The plot of ratios: how many times faster than each baseline, a row a case."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .results import Results, Row, best_baselines
from .theme import Theme


def ratio_plot(results: Results) -> Callable[[Theme], Figure] | None:
    """A row a case, a panel a pass: how many times faster than each baseline."""
    rows = [row for row in results.rows if row.ratio]
    failed = [row for row in results.rows if row.verdict == "fail"]
    if not rows:
        return None
    places = _places(results.rows)
    passes = [p for p in ("forward", "backward", "both") if any(row.pass_ == p for row in rows)]
    best = best_baselines(rows)

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(12, 1.1 + 0.26 * len(places)), layout="constrained")
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
