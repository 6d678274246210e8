"""What moved between two runs, beyond the noise of either."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from .results import Results, Row

# Closer medians are the same, however quiet the runs were: code placement alone moves a few percent.
SMALLEST_CHANGE = 0.05
COMMITTED = "bench/results"


@dataclass(frozen=True)
class Move:
    what: str
    before_ms: float | None
    after_ms: float | None
    before_ratio: float | None
    after_ratio: float | None
    change: float  # relative, negative: faster
    label: str = ""  # instead of the change, where there is no number


@dataclass(frozen=True)
class Comparison:
    moved: list[Move]
    same: int
    only_before: int
    only_after: int
    notes: list[str]


def compare(before: Results, after: Results) -> Comparison:
    """Rows of both runs whose 10-90 % bands do not touch and whose medians differ by 5 % at least.

    Where a baseline was timed in both runs, the ratio has to have moved too: it was interleaved, so a machine
    that is simply slower today does not count.
    """
    old = {row.key(): row for row in before.rows}
    new = {row.key(): row for row in after.rows}
    shared = [key for key in new if key in old]
    moves = [move for key in shared if (move := _move(old[key], new[key])) is not None]
    notes = []
    for name in ("name", "threads", "torch"):
        was, now = getattr(before.machine, name), getattr(after.machine, name)
        if was != now:
            notes.append(f"machine.{name} differs: {was} before, {now} now")
    moves.sort(key=lambda move: move.change)
    return Comparison(moves, len(shared) - len(moves), len(old) - len(shared), len(new) - len(shared), notes)


def load(where: str, machine: str) -> Results:
    """Results from a file or a git ref: REF:path, or REF alone for this machine's latest committed run."""
    path = Path(where)
    if path.is_file():
        return Results.load(path)
    ref, _, inside = where.partition(":")
    root = Path(__file__).resolve().parent.parent
    if not inside:
        listed = _git(root, "ls-tree", "--name-only", ref, f"{COMMITTED}/", what=where)
        names = [name for name in listed.split("\n") if name.endswith(".json")]
        names = [name for name in names if Path(name).name.startswith(f"{machine}-")]
        if not names:
            raise ValueError(f"bench: {ref} has no committed run of {machine} in {COMMITTED}")
        inside = max(names)  # the date ends the name
    return Results.from_json(_git(root, "show", f"{ref}:{inside}", what=where))


def _git(root: Path, *arguments: str, what: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().partition("\n")[0]
        raise ValueError(f"bench: {what!r} is neither a file nor a git ref with results ({reason})")
    return done.stdout


def _move(old: Row, new: Row) -> Move | None:
    against = f" against {new.baseline}" if new.baseline else ""
    what = f"{new.case} {new.pass_}, {new.backend}{against}"
    if old.verdict != new.verdict:
        change = 1.0 if new.verdict == "fail" else -1.0
        label = f"{old.verdict} -> {new.verdict}"
        return Move(what, old.median_ms, new.median_ms, old.ratio, new.ratio, change, label)
    if old.median_ms is None or new.median_ms is None:
        return None
    change = new.median_ms / old.median_ms - 1
    if abs(change) < SMALLEST_CHANGE or _bands_touch(old, new):
        return None
    if old.ratio is not None and new.ratio is not None:
        relative = (
            old.ratio / new.ratio - 1
        )  # what is left of the change once the baseline's own is taken out
        if abs(relative) < SMALLEST_CHANGE or (relative > 0) != (change > 0):
            return None
    return Move(what, old.median_ms, new.median_ms, old.ratio, new.ratio, change)


def _bands_touch(old: Row, new: Row) -> bool:
    bands = (old.p10_ms, old.p90_ms, new.p10_ms, new.p90_ms)
    if any(value is None for value in bands):
        return False
    low_old, high_old, low_new, high_new = (value or 0.0 for value in bands)
    return low_new <= high_old and low_old <= high_new
