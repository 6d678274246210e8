"""The plan of a run, and the table at its end."""

from __future__ import annotations

from pathlib import Path

import pytest
import robust_tally
from rich.console import Console
from robust_fuzz import Plan


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config
) -> None:
    path = config.getoption("--robustness-report")
    if path is None:
        return
    if config.getoption("numprocesses", None):
        raise pytest.UsageError("--robustness-report counts in one process: leave -n out")
    failed = sum(len(terminalreporter.stats.get(kind, ())) for kind in ("failed", "error"))
    robust_tally.show(Console(width=140))
    robust_tally.write(
        Path(path), config.getoption("--robustness"), config.getoption("--robustness-seed"), failed
    )


@pytest.fixture
def plan(request: pytest.FixtureRequest) -> Plan:
    option = request.config.getoption
    scale = option("--robustness-minutes") / 10
    return Plan(option("--robustness") == "nightly", option("--robustness-seed"), scale)
