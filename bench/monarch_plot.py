"""Where Monarch matrices pay: how many times faster than a dense layer, over the number of blocks, a line a width."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.figure import Figure

from .cases import Case
from .cases.monarch import GRID, MonarchCase
from .results import Results
from .theme import Theme


def monarch_plot(results: Results, cases: Sequence[Case]) -> Callable[[Theme], Figure] | None:
    """A panel a pass; solid against the dense layer, dashed against two batched products. None without such rows."""
    known = {case.name: case for case in cases if case.name.startswith(GRID)}
    lines: dict[tuple[str, str, int], list[tuple[int, float]]] = {}
    for row in results.rows:
        case = known.get(row.case)
        if isinstance(case, MonarchCase) and row.ratio and row.baseline in ("dense", "bmm"):
            lines.setdefault((row.pass_, row.baseline, case.width), []).append((case.nblocks, row.ratio))
    if not lines:
        return None
    passes = [p for p in ("forward", "both") if any(key[0] == p for key in lines)]
    widths = sorted({width for _, _, width in lines})
    titles = {"forward": "forward", "both": "forward and backward"}

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(12, 4.4), layout="constrained")
        panels = figure.subplots(1, len(passes), sharey=True, squeeze=False)[0]
        for axes, pass_ in zip(panels, passes, strict=True):
            for i, width in enumerate(widths):
                colour = theme.series[i % len(theme.series)]
                for baseline, style in (("dense", "-"), ("bmm", "--")):
                    points = sorted(lines.get((pass_, baseline, width), []))
                    label = f"width {width}" if baseline == "dense" else None
                    axes.plot(
                        *zip(*points, strict=True), style, color=colour, marker="o", markersize=4, label=label
                    )
            axes.axhline(1, color=theme.text, linewidth=1)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            blocks = sorted({n for points in lines.values() for n, _ in points})
            axes.set_xticks(blocks, [f"{n}" for n in blocks])
            ticks = [
                t for t in (0.5, 1, 2, 4, 8, 16, 32) if t <= 2 * max(r for p in lines.values() for _, r in p)
            ]
            axes.set_yticks(ticks, [f"{t:g}x" for t in ticks])
            axes.minorticks_off()
            axes.grid(color=theme.faint, alpha=0.25, linewidth=0.8)
            axes.set_title(titles[pass_])
            axes.set_xlabel("blocks of each factor")
            axes.legend(frameon=False, labelcolor=theme.text)
        panels[0].set_ylabel("times as fast as a dense layer\n(dashed: as two batched products)")
        return figure

    return draw
