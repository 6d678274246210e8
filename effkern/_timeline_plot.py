"""The picture of a training step: two streams over time. Needs matplotlib.

`python -m effkern._timeline_plot PATH` draws a small stack, as in docs/images/reversible-timeline.png.
"""

from __future__ import annotations

import sys

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from effkern.nn.reversible_transformer import ReversibleTransformer
from effkern.reversible import Timeline, timeline

# Blue and orange differ for every kind of colour vision, and in lightness.
_COLOURS = {"forward": "#c4ccd4", "recover": "#e08a1e", "gradients": "#1f5f99"}
_LABELS = {"forward": "forward", "recover": "RECOVER, the second run", "gradients": "GRADS"}
_WIDTH = 11.0  # inches
_LABEL = 0.02  # share of the picture that a span needs for its number


def draw(timeline: Timeline) -> Figure:
    """One row a stream, one bar a piece of work, with the number of its block."""
    figure = Figure(figsize=(_WIDTH, 2.8), layout="constrained")
    axes = figure.add_subplot()
    end = max(span.end for span in timeline.spans)
    for span in timeline.spans:
        row, length = 1 - span.stream, span.end - span.start
        axes.add_patch(
            Rectangle(
                (span.start, row - 0.4),
                length,
                0.8,
                facecolor=_COLOURS[span.kind],
                edgecolor="white",
                linewidth=0.6,
            )
        )
        if length > _LABEL * end:
            colour = "#1f2933" if span.kind == "forward" else "white"
            middle = (span.start + span.end) / 2
            axes.text(middle, row, str(span.block), ha="center", va="center", fontsize=8, color=colour)
    axes.set_xlim(0, end)
    axes.set_ylim(-0.6, 1.6)
    axes.set_yticks([1, 0], ["the caller's stream", "the other stream"])
    axes.set_xlabel("ms")
    axes.set_title(str(timeline), fontsize=10, loc="left")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    patches = [Patch(facecolor=_COLOURS[kind], label=label) for kind, label in _LABELS.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def example(path: str) -> None:
    """Seven blocks of a transformer."""
    print(timeline(ReversibleTransformer(256, 7, 4), torch.randn(2, 256, 256), path=path))


if __name__ == "__main__":
    example(sys.argv[1])
