"""What the harness shows in a terminal: the machine, a progress bar, and the table of results."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from .compare import Comparison
from .results import DecoderStep, EndToEnd, Results, Row, Saved
from .runner import Listener
from .words import machine_lines, number, percent, size

# A log file or pipe has no width of its own; the tables need this much not to be cut.
PLAIN_WIDTH = 150
SECONDS_BETWEEN_DRAWINGS = 1.0


def make_console(stderr: bool = False) -> Console:
    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=PLAIN_WIDTH)


def results_table(rows: Sequence[Row]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("case", "pass", "path"):
        table.add_column(name, no_wrap=True)
    for name in ("ms", "p10-p90", "host us", "extra"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("baseline", no_wrap=True)
    for name in ("its ms", "its extra", "ratio", "error", "its error", "of roof"):
        table.add_column(name, justify="right", no_wrap=True)
    for i, row in enumerate(rows):
        again = i > 0 and (row.case, row.pass_, row.path) == (
            rows[i - 1].case,
            rows[i - 1].pass_,
            rows[i - 1].path,
        )
        table.add_row(*([""] * 7 if again else _ours(row)), *_against(row))
    return table


def _ours(row: Row) -> list[str | Text]:
    path = row.path.partition(":")[2] or row.backend
    if row.median_ms is None or row.p10_ms is None or row.p90_ms is None:
        verdict = Text(row.verdict.upper(), style="bold red")
        return [row.case, row.pass_, path, verdict, "", "", ""]
    spread = f"{number(row.p10_ms)}-{number(row.p90_ms)}"
    host = "" if row.host_us is None else f"{row.host_us:.1f}"
    return [row.case, row.pass_, path, number(row.median_ms), spread, host, size(row.peak_extra_bytes)]


def _against(row: Row) -> list[str | Text]:
    ratio: str | Text = ""
    if row.ratio is not None:
        ratio = Text(f"{row.ratio:.2f}x", style="green" if row.ratio >= 1 else "yellow")
    errors = ["" if e is None else f"{e:.1e}" for e in (row.error, row.error_baseline)]
    extra = size(row.baseline_peak_extra_bytes)
    return [row.baseline or "", number(row.baseline_ms), extra, ratio, *errors, percent(row.share_of_roof)]


def end_to_end_table(result: EndToEnd) -> Table:
    title = f"end to end: {result.corpus}, {result.model}, context {result.context}, {result.dtype}"
    table = Table(box=None, header_style="bold", pad_edge=False, title=title, title_justify="left")
    table.add_column("variant")
    for name in ("step ms", "p10-p90", "tokens/s", "extra memory", "parameters", "size", "bits per byte"):
        table.add_column(name, justify="right", no_wrap=True)
    for curve in result.curves:
        spread = f"{curve.step_p10_ms:.0f}-{curve.step_p90_ms:.0f}"
        extra = size(curve.peak_extra_bytes)
        numbers = [f"{curve.step_ms:.1f}", spread, f"{curve.tokens_per_s:,.0f}", extra]
        counts = [f"{curve.parameters:,}", size(curve.size_bytes), f"{curve.final_bits:.4f}"]
        table.add_row(curve.variant, *numbers, *counts)
    return table


def saved_table(rows: Sequence[Saved]) -> Table:
    title = "saved for the backward of differentiable k-means"
    table = Table(box=None, header_style="bold", pad_edge=False, title=title, title_justify="left")
    table.add_column("weights of")
    for name in ("bits", "dtype", "plain autograd", "effkern", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        sizes = [size(row.plain_bytes), size(row.own_bytes), f"{row.ratio:,.0f}x"]
        table.add_row(f"{row.what}, {row.weights:,}", str(row.bits), row.dtype, *sizes)
    return table


def decoder_step_table(step: DecoderStep) -> Table:
    title = f"a training step of a {step.what}, {step.dtype}"
    table = Table(box=None, header_style="bold", pad_edge=False, title=title, title_justify="left")
    table.add_column(f"{step.weights:,} weights, {step.tokens} tokens, {step.optimizer}", no_wrap=True)
    for name in ("peak memory", "beyond the weights", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, extra, seconds in (
        ("dense", step.dense_peak_extra_bytes, step.dense_seconds),
        (f"clustered, {step.bits} bits", step.peak_extra_bytes, step.seconds),
    ):
        peak = "" if extra is None else size(step.weight_bytes + extra)
        table.add_row(name, peak, size(extra), f"{seconds:.1f}")
    return table


def comparison_table(comparison: Comparison) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("what moved")
    for name in ("before ms", "now ms", "change", "ratio before", "ratio now"):
        table.add_column(name, justify="right", no_wrap=True)
    for move in comparison.moved:
        style = "green" if move.change < 0 else "red"
        change = Text(move.label or f"{move.change:+.0%}", style=style)
        before, after = (number(v) for v in (move.before_ms, move.after_ms))
        table.add_row(move.what, before, after, change, number(move.before_ratio), number(move.after_ratio))
    return table


class Screen(Listener):
    """A listener that draws. Everything it prints goes to `console`, which is stderr under --json."""

    def __init__(self, console: Console) -> None:
        self.console = console
        # Drawn by hand, and seldom: a thread that refreshes would run beside what is being timed.
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TimeElapsedColumn(),
            TextColumn("gone,"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            transient=True,
            auto_refresh=False,
            disable=not console.is_terminal,
            speed_estimate_period=120,
        )
        self.drawn = 0.0
        self.task: TaskID | None = None
        self.weights: list[float] = []
        self.started = 0  # units begun

    def machine(self, results: Results) -> None:
        width = max(len(name) for name, _ in machine_lines(results))
        lines = [f"[bold]{name:<{width}}[/]  {text}" for name, text in machine_lines(results)]
        self.console.print(
            Panel("\n".join(lines), title=f"effkern bench on {results.machine.name}", title_align="left")
        )

    def begin(self, units: Sequence[tuple[str, float]]) -> None:
        self.weights = [weight for _, weight in units]
        self.task = self.progress.add_task("", total=sum(self.weights))
        self.progress.start()

    def unit(self, name: str) -> None:
        self.started += 1
        self._show(name, 0.0)

    def step(self, fraction: float, what: str) -> None:
        self._show(f"end to end, {what}", fraction)

    def done(self, rows: Sequence[Row]) -> None:
        for row in rows[:1]:
            if not self.console.is_terminal:
                took = "FAILED" if row.median_ms is None else f"{row.median_ms:.3g} ms"
                ratio = "" if row.ratio is None else f", {row.ratio:.2f}x {row.baseline}"
                self.console.print(f"{row.case} {row.pass_}: {took}{ratio}")
        self._show("", 1.0)

    def note(self, text: str) -> None:
        self.console.print(text, style="yellow", markup=False)

    def close(self) -> None:
        self.progress.stop()

    def _show(self, name: str, fraction: float) -> None:
        if self.task is not None and self.started:
            finished = sum(self.weights[: self.started - 1]) + fraction * self.weights[self.started - 1]
            self.progress.update(self.task, completed=finished, description=name)
            if fraction in (0.0, 1.0) or time.monotonic() - self.drawn > SECONDS_BETWEEN_DRAWINGS:
                self.progress.refresh()
                self.drawn = time.monotonic()
