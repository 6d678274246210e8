"""The programs of docs/examples run and learn."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "docs" / "examples"


def run(name: str) -> str:
    """What an example prints, in a process of its own with one thread, as all tests have."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), "--quick"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def number(text: str, label: str) -> float:
    """The number after a label that stands in one line."""
    (found,) = re.findall(rf"^{label}:? ?(?:accuracy )?([0-9.]+)", text, re.MULTILINE)
    return float(found)


def test_byte_lm() -> None:
    text = run("byte_lm")
    assert "ran on attention_backward:" in text
    assert number(text, "held-out text") < number(text, "byte frequencies alone") - 0.25


def test_three_bit() -> None:
    text = run("three_bit")
    (_, dense), (rounded, _), (tuned, size) = (
        re.search(rf"^{name}: ([0-9.]+) bits per byte, ([0-9]+) kB$", text, re.MULTILINE).groups()  # type: ignore[union-attr]
        for name in ("dense", "rounded to 3 bits", "fine-tuned at 3 bits")
    )
    assert float(tuned) < float(rounded)
    assert 7 * int(size) < int(dense)
    assert "dry run: nothing was changed" in text


def test_digits_vit() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (effkern[examples])")
    text = run("digits_vit")
    assert re.search(r"^\d+ calls ran on effkern, 0 on PyTorch$", text, re.MULTILINE)
    assert number(text, "trained") > 0.85 and number(text, "fine-tuned as a reversible network") > 0.85


def test_dna_long_conv() -> None:
    text = run("dna_long_conv")
    assert number(text, "whole sequences") > 0.85
    assert number(text, "without the first quarter") < 0.65
    assert number(text, "counting C and G") < 0.65
