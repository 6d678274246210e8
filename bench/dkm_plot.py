"""What clustering makes of one weight, and how much of its gradient it lets through, for its page in docs/:

python -m effkern.bench.dkm_plot docs/images/dkm-temperature.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

import effkern

from .theme import LIGHT, Theme, render

# Temperatures, of the squared gap between centroids: where layers start, and on to where they end.
FACTORS = (0.1, 0.03, 0.01)
BITS = 3
STEEPEST = 8.0


def temperature_plot(theme: Theme) -> Figure:
    others = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    places = torch.linspace(-2.6, 2.6, 2001)
    centroids = effkern.kmeans_init(others, 1 << BITS)
    gap = centroids.diff().mean().item()
    figure = Figure(figsize=(10.5, 3.9), layout="constrained")
    values, slopes = figure.subplots(1, 2)
    nearest = centroids[(places[:, None] - centroids).abs().argmin(1)]
    values.plot(places, nearest, color=theme.faint, linewidth=1.2, label="rounded, as in eval()")
    # The other weights hold the centroids where they are.
    weight = torch.cat((places, others))
    for factor, colour in zip(FACTORS, theme.series):
        clustered, _ = effkern.dkm(weight, centroids, temperature=factor * gap**2, iterations=1)
        curve = clustered[: len(places)]
        (slope,) = torch.gradient(curve, spacing=(places,))
        label = f"temperature {factor:g} gap²"
        values.plot(places, curve, color=colour, linewidth=1.6, label=label)
        slopes.plot(places, slope.clamp(max=STEEPEST), color=colour, linewidth=1.4, label=label)
    values.set(title="Clustered weight", xlabel="weight")
    slopes.set(title="Its slope: what training feels", xlabel="weight", ylim=(0, STEEPEST))
    values.legend(frameon=False, fontsize=8.5)
    return figure


if __name__ == "__main__":
    Path(sys.argv[1]).write_bytes(render(temperature_plot, LIGHT))
