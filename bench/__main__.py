"""`python -m effkern.bench`: what `effkern bench` does, for machines that have no typer."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .command import execute
from .runner import Options


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m effkern.bench", description="The same as `effkern bench`."
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true")
    size.add_argument("--full", action="store_true")
    parser.add_argument("--family", action="append", default=[])
    parser.add_argument("--case")
    parser.add_argument("--backend", action="append", default=[])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    parser.add_argument("--compare")
    parser.add_argument("--plot", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--end-to-end", action=argparse.BooleanOptionalAction)
    given = parser.parse_args()
    options = Options.of(
        full=given.full,
        families=given.family,
        pattern=given.case,
        backends=given.backend,
        threads=given.threads,
        end_to_end=given.end_to_end,
    )
    try:
        return execute(options, out=given.out, against=given.compare, plot=given.plot, as_json=given.json)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2


sys.exit(main())
