"""How every plot looks, on a light and on a dark page."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.figure import Figure


@dataclass(frozen=True)
class Theme:
    page: str
    text: str
    faint: str  # grid, baselines
    forward: str
    backward: str
    alarm: str
    series: tuple[str, ...]  # end-to-end variants after the first, which is grey


LIGHT = Theme(
    "#ffffff",
    "#1f2933",
    "#9aa5b1",
    "#0f6fb8",
    "#c2571a",
    "#b00020",
    ("#0f6fb8", "#c2571a", "#2f8f5b", "#8a4fbf"),
)
DARK = Theme(
    "#16191d",
    "#e4e7eb",
    "#6b7785",
    "#5cb3f2",
    "#f2a066",
    "#ff8a80",
    ("#5cb3f2", "#f2a066", "#6fd39b", "#c39bf0"),
)
THEMES = {"light": LIGHT, "dark": DARK}

STYLE: dict[Any, Any] = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "figure.dpi": 110,
}


def render(draw: Callable[[Theme], Figure], theme: Theme) -> bytes:
    colours: dict[Any, Any] = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), theme.text
    )
    pages: dict[Any, Any] = dict.fromkeys(("figure.facecolor", "axes.facecolor"), theme.page)
    with matplotlib.rc_context({**STYLE, **colours, **pages}):
        figure = draw(theme)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", bbox_inches="tight", pad_inches=0.15)
    return buffer.getvalue()
