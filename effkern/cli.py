"""The command line: `effkern bench` and `effkern doctor`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Kernels from efficient-ML papers: measure and diagnose."
)


@app.command()
def bench(
    quick: Annotated[
        bool, typer.Option("--quick", help="The short set (the default): a few minutes on two cores.")
    ] = False,
    full: Annotated[bool, typer.Option("--full", help="Every case, pass and baseline.")] = False,
    family: Annotated[list[str] | None, typer.Option(help="Only this family; may be repeated.")] = None,
    case: Annotated[str | None, typer.Option(help="Only cases whose name matches this glob.")] = None,
    backend: Annotated[list[str] | None, typer.Option(help="Our backend to time; may be repeated.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for results.json, report.html and the plots.")] = Path(
        "bench-out"
    ),
    compare: Annotated[str | None, typer.Option(help="A results file or git ref: print what moved.")] = None,
    plot: Annotated[bool, typer.Option("--plot/--no-plot", help="Write report.html and PNG plots.")] = True,
    json_: Annotated[bool, typer.Option("--json", help="Print the results as JSON on stdout.")] = False,
    end_to_end: Annotated[
        bool | None,
        typer.Option("--end-to-end/--no-end-to-end", help="Train on real text; on unless cases are picked."),
    ] = None,
) -> None:
    """Verify every case against the float64 oracle, then time it beside its baselines."""
    from effkern.bench import command, runner

    if quick and full:
        raise typer.BadParameter("--quick and --full exclude each other")
    options = runner.Options.of(
        full=full,
        families=family or (),
        pattern=case,
        backends=backend or (),
        threads=threads,
        end_to_end=end_to_end,
    )
    try:
        code = command.execute(options, out=out, against=compare, plot=plot, as_json=json_)
    except ValueError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    raise typer.Exit(code)


@app.command()
def doctor(json_: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False) -> None:
    """Say what is installed, what runs where and why, and test every op for a second."""
    from effkern.bench import doctor as examination

    report = examination.examine()
    if json_:
        typer.echo(json.dumps(report.as_dict(), indent=1))
    else:
        examination.show(report)
    raise typer.Exit(0 if report.usable else 1)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
