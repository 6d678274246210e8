"""The plot of the end-to-end training: losses, step time, memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .results import Curve, EndToEnd
from .theme import Theme
from .words import number


def loss_plot(result: EndToEnd) -> Callable[[Theme], Figure]:
    """Left: bits per byte over steps. Right: what a step costs in time and memory."""

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(12, 4.2), layout="constrained")
        losses, times, memory = figure.subplots(1, 3, width_ratios=(3.2, 1, 1))
        for i, curve in enumerate(result.curves):
            colour = theme.faint if i == 0 else theme.series[(i - 1) % len(theme.series)]
            # The first variant is broad and grey, so that curves on top of it do not hide it.
            losses.plot(curve.steps, _smooth(curve.train_bits), color=colour, linewidth=5 if i == 0 else 1.6)
            size = 9 if i == 0 else 4.5
            losses.plot(curve.validation_steps, curve.validation_bits, "o", color=colour, markersize=size)
            losses.text(
                0.98,
                0.95 - 0.075 * i,
                f"{curve.variant}: {curve.final_bits:.3f}",
                color=theme.text if i == 0 else colour,
                transform=losses.transAxes,
                ha="right",
                va="top",
            )
        seen = [bits for c in result.curves for bits in [*_smooth(c.train_bits), *c.validation_bits]]
        losses.set_ylim(min(seen) - 0.15, max(seen) + 0.25)
        losses.set_title("Loss, bits per byte (line: training, smoothed; dots: validation)")
        losses.set_xlabel("step")
        losses.grid(color=theme.faint, alpha=0.25, linewidth=0.8)
        step = [curve.step_ms for curve in result.curves]
        _bars(times, result.curves, step, "Step, ms", theme)
        times.set_ylim(0, 1.1 * max(curve.step_p90_ms for curve in result.curves))
        spans = [(c.step_ms - c.step_p10_ms, c.step_p90_ms - c.step_ms) for c in result.curves]
        times.errorbar(
            range(len(step)),
            step,
            yerr=list(zip(*spans, strict=True)),
            fmt="none",
            ecolor=theme.text,
            elinewidth=1,
        )
        held = [(curve.peak_extra_bytes or 0) / (1 << 20) for curve in result.curves]
        _bars(memory, result.curves, held, "Peak memory, MiB", theme)
        return figure

    return draw


def _bars(axes: Axes, curves: Sequence[Curve], values: Sequence[float], title: str, theme: Theme) -> None:
    colours = [theme.faint, *(theme.series[i % len(theme.series)] for i in range(len(curves) - 1))]
    axes.bar(range(len(curves)), values, width=0.6, color=colours)
    for i, value in enumerate(values):
        axes.text(
            i, value * 0.03, number(value), ha="center", va="bottom", color=theme.page, fontweight="bold"
        )
    axes.set_xticks(range(len(curves)), [curve.variant.replace(" ", "\n", 1) for curve in curves], fontsize=9)
    axes.tick_params(axis="x", length=0)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_title(title, fontsize=10)
    axes.set_ylim(0, max(max(values), 1e-9) * 1.15)


def _smooth(values: Sequence[float]) -> list[float]:
    """Centred mean over a twentieth of the run: unlike a running mean it does not lag behind the loss."""
    reach = len(values) // 40
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]
