"""The drawings of the documentation that code makes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from matplotlib.figure import Figure

from effkern.bench.dkm_plot import temperature_plot
from effkern.bench.long_conv_plot import passes_plot
from effkern.bench.theme import THEMES, Theme, render


@pytest.mark.parametrize("drawing", [passes_plot, temperature_plot])
def test_a_drawing_is_made_on_either_page(drawing: Callable[[Theme], Figure]) -> None:
    drawn = [render(drawing, theme) for theme in THEMES.values()]
    assert all(png.startswith(b"\x89PNG") and len(png) > 10_000 for png in drawn)
    assert len(set(drawn)) == len(drawn)
