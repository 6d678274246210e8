"""What the robustness tests have tried and what came of it: counted while they run, written at the end."""

from __future__ import annotations

import json
import platform
from collections import defaultdict
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import effkern


@dataclass
class Row:
    """One kind of fault in one area. `survived` calls were refused with a clear error or gave the right result."""

    tried: int = 0
    refused: int = 0
    right: int = 0
    note: str = ""

    @property
    def survived(self) -> int:
        return self.refused + self.right


_rows: dict[tuple[str, str], Row] = defaultdict(Row)


def attempt(area: str, fault: str) -> None:
    """Before the call, so that one that ends the test, or the process, stays counted as tried only."""
    _rows[area, fault].tried += 1


def survived(area: str, fault: str, *, refused: bool = False) -> None:
    row = _rows[area, fault]
    row.refused += refused
    row.right += not refused


def count(area: str, fault: str, right: int = 0, refused: int = 0, note: str = "") -> None:
    """Many at once, all of which survived."""
    row = _rows[area, fault]
    row.tried += right + refused
    row.right, row.refused, row.note = row.right + right, row.refused + refused, note


def rows() -> list[tuple[str, str, Row]]:
    return [(area, fault, row) for (area, fault), row in sorted(_rows.items())]


def show(console: Console) -> None:
    table = Table(title="Faults tried and survived")
    for column in ("area", "fault"):
        table.add_column(column)
    for column in ("tried", "refused", "right"):
        table.add_column(column, justify="right")
    table.add_column("note")
    for area, fault, row in rows():
        lost = "" if row.survived == row.tried else "[red]not survived[/red] "
        table.add_row(area, fault, f"{row.tried:,}", f"{row.refused:,}", f"{row.right:,}", lost + row.note)
    total = Row(
        *(sum(getattr(row, name) for row in _rows.values()) for name in ("tried", "refused", "right"))
    )
    table.add_section()
    table.add_row("all", "", f"{total.tried:,}", f"{total.refused:,}", f"{total.right:,}", "")
    console.print(table)


def write(path: Path, mode: str, seed: int, failed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {
        "mode": mode,
        "seed": seed,
        "failed_tests": failed,
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "effkern": effkern.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu_level": effkern._host.isa_active(),
        "rows": [{"area": area, "fault": fault, **asdict(row)} for area, fault, row in rows()],
    }
    path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
