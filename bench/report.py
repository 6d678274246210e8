"""report.html: one file with everything in it, and the plots beside it as PNG."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jinja2
from matplotlib.figure import Figure

from . import cases as case_list
from .monarch_plot import monarch_plot
from .ratio_plot import ratio_plot
from .results import Results, Row, best_baselines
from .roofline_plot import roofline_plot
from .theme import THEMES, Theme, render
from .training_plot import loss_plot
from .words import machine_lines, number, percent, size

TEMPLATE = Path(__file__).with_name("report.html.j2")


def write(results: Results, folder: Path) -> list[Path]:
    """Write report.html and the light version of each plot; returns what was written."""
    drawn: dict[str, Callable[[Theme], Figure] | None] = {
        "ratios": ratio_plot(results),
        "roofline": roofline_plot(results, case_list.discover()),
        "monarch": monarch_plot(results, case_list.discover()),
        "training": loss_plot(results.end_to_end) if results.end_to_end else None,
    }
    written, plots = [], {}
    for name, draw in drawn.items():
        if draw is None:
            continue
        images = {theme: render(draw, colours) for theme, colours in THEMES.items()}
        path = folder / f"{name}.png"
        path.write_bytes(images["light"])
        written.append(path)
        plots[name] = {theme: base64.b64encode(data).decode("ascii") for theme, data in images.items()}
    page = folder / "report.html"
    page.write_text(_page(results, plots), encoding="utf-8")
    return [page, *written]


def _page(results: Results, plots: dict[str, dict[str, str]]) -> str:
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(number=number, percent=percent, size=size)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        results=results,
        machine=machine_lines(results),
        cards=_cards(results),
        groups=_groups(results.rows),
        plots=plots,
        fastest=max((row.ratio or 0.0 for row in results.rows), default=1.0),
    )


def _cards(results: Results) -> list[dict[str, str]]:
    """The few numbers a reader looks for first."""
    measured = {(row.case, row.pass_, row.backend): row.verdict for row in results.rows}
    passed = sum(verdict == "pass" for verdict in measured.values())
    cards = [{"value": f"{passed} of {len(measured)}", "label": "measurements verified against float64"}]
    best = best_baselines(results.rows).values()
    for dtype in dict.fromkeys(row.dtype for row in results.rows):
        for pass_ in ("forward", "backward"):
            ratios = [row.ratio for row in best if (row.dtype, row.pass_) == (dtype, pass_) and row.ratio]
            if ratios:
                mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
                label = f"{dtype} {pass_}, geometric mean of {len(ratios)} against the fastest baseline"
                cards.append({"value": f"{mean:.2f}x", "label": label})
    if results.end_to_end and len(results.end_to_end.curves) > 1:
        plain, *swapped = results.end_to_end.curves
        for curve in swapped:
            label = f"training step, {curve.variant} against {plain.variant}"
            cards.append({"value": f"{plain.step_ms / curve.step_ms:.2f}x", "label": label})
    return cards


def _groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of one (case, pass, backend), which share all numbers but the baseline's."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.case, row.pass_, row.backend), []).append(row)
    return list(groups.values())
