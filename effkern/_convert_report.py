"""What every conversion reports: a table, data, and the way back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from effkern._convert_surgery import Surgery

if TYPE_CHECKING:  # rich costs more to import than the rest of effkern
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table


@dataclass
class Report:
    """What a conversion did, or would do. Prints as a table: `rich.print(report)` or `print(report)`.

    It keeps what was replaced, for `undo`: `held_bytes` says how much memory that is, `release` gives it back, and so
    does dropping the report. Copies, pickled ones too, are data alone.
    """

    operation: str = ""
    dry_run: bool = False
    skipped: list[tuple[str, str]] = field(default_factory=list)  # (name, reason)
    surgery: Surgery | None = field(default=None, repr=False, compare=False)

    def undo(self) -> None:
        """Puts back the very modules that were replaced, with their Parameters.

        They have the values, the dtype and the device that they were left with; `train()` and `eval()` since then are
        followed. Parameters that old and new modules share (of `cluster` and `reversible`: all) keep what training
        has made of them.

        Raises:
            RuntimeError: the conversion was a dry run, has been undone, or was released, the report is a copy, or what
                the conversion put in place was replaced or converted since. The model is then as it was.
        """
        if self.surgery is None:
            raise RuntimeError(f"undo of {self.operation}: a copy of a report is data alone")
        self.surgery.undo()

    def release(self) -> None:
        """Lets go of what was replaced, after which there is no undo."""
        if self.surgery is not None:
            self.surgery.release()

    @property
    def held_bytes(self) -> int:
        """Bytes of parameters and buffers that are in memory for `undo` alone."""
        return 0 if self.surgery is None else self.surgery.held_bytes()

    def to_dict(self) -> dict[str, Any]:
        """The report as dicts, lists, strings and numbers, as json takes them: operation, dry_run, replaced, skipped,
        and the totals of the conversion."""
        return {
            "operation": self.operation,
            "dry_run": self.dry_run,
            "replaced": [_plain(entry) for entry in self._entries()],
            "skipped": [{"name": name, "reason": reason} for name, reason in self.skipped],
            **self._totals(),
        }

    def _entries(self) -> Sequence[Any]:
        raise NotImplementedError

    def _totals(self) -> dict[str, Any]:
        raise NotImplementedError

    def _table(self) -> Table:
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "surgery": None}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Table

        table = self._table()
        table.title = f"{self.operation}, dry run: nothing was changed" if self.dry_run else self.operation
        yield table
        if self.skipped:
            left = Table("not replaced", "reason")
            for row in self.skipped:
                left.add_row(*row)
            yield left

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=110)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def _plain(entry: Any) -> dict[str, Any]:
    """A named tuple of numbers, strings and tuples of strings."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in entry._asdict().items()}
