"""The body of `effkern bench`: run, write the files, print the tables."""

from __future__ import annotations

from pathlib import Path

from . import compare as comparing
from .console import (
    Screen,
    comparison_table,
    decoder_step_table,
    end_to_end_table,
    make_console,
    results_table,
    saved_table,
)
from .results import Results
from .runner import Options, run


def execute(options: Options, *, out: Path, against: str | None, plot: bool, as_json: bool) -> int:
    """Returns the exit code: 1 if a case failed its verification."""
    console = make_console(stderr=as_json)
    screen = Screen(console)
    out.mkdir(parents=True, exist_ok=True)
    try:
        results = run(options, screen)
    finally:
        screen.close()
    results.save(out / "results.json")
    console.print(results_table(results.rows))
    if results.end_to_end:
        console.print()
        console.print(end_to_end_table(results.end_to_end))
    if results.saved:
        console.print()
        console.print(saved_table(results.saved))
    if results.decoder_step:
        console.print()
        console.print(decoder_step_table(results.decoder_step))
    written = [out / "results.json", *(_report(results, out, screen) if plot else [])]
    if against:
        _compare(results, against, screen)
    if as_json:
        print(results.to_json(), end="")
    failed = [row for row in results.rows if row.verdict == "fail"]
    console.print(f"\nwritten: {', '.join(map(str, written))}", soft_wrap=True)
    if failed:
        names = sorted({f"{row.case} {row.pass_}" for row in failed})
        console.print(
            f"{len(names)} failed verification: {', '.join(names)}", style="bold red", soft_wrap=True
        )
    return 1 if failed else 0


def _report(results: Results, out: Path, screen: Screen) -> list[Path]:
    try:
        from . import report
    except ImportError as error:
        screen.note(f"no report: {error.name} is missing; pip install 'effkern[bench]'")
        return []
    return report.write(results, out)


def _compare(results: Results, against: str, screen: Screen) -> None:
    comparison = comparing.compare(comparing.load(against, results.machine.name), results)
    for note in comparison.notes:
        screen.note(note)
    if comparison.moved:
        screen.console.print(comparison_table(comparison))
    counts = f"{len(comparison.moved)} moved beyond the noise, {comparison.same} did not"
    screen.console.print(
        f"{counts}; only before: {comparison.only_before}, only now: {comparison.only_after}"
    )
