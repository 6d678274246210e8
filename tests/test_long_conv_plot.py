"""The drawing on the page of the long convolutions."""

from __future__ import annotations

from effkern.bench.long_conv_plot import passes_plot
from effkern.bench.theme import THEMES, render


def test_the_passes_are_drawn_on_either_page() -> None:
    drawn = [render(passes_plot, theme) for theme in THEMES.values()]
    assert all(png.startswith(b"\x89PNG") and len(png) > 10_000 for png in drawn)
    assert len(set(drawn)) == len(drawn)
