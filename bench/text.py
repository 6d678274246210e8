"""Real text that every Python has: its standard library's source, in a fixed order, with a held-out part."""

from __future__ import annotations

import os
import platform
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# Not the library's own text: other people's packages, and tests, which are mostly tables of literals.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
HELD_OUT_EVERY = 10  # every tenth file is validation text
MOST_BYTES = 12 << 20


@dataclass(frozen=True)
class Corpus:
    """Bytes as uint8 tensors. Files are whole: no file is in both parts."""

    name: str
    train: Tensor
    validation: Tensor

    def windows(self, part: Tensor, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Inputs (B, length) and the bytes that follow them (B, length), int64."""
        index = starts[:, None] + torch.arange(length + 1)
        rows = part[index].long()
        return rows[:, :-1], rows[:, 1:]


def standard_library() -> Corpus:
    root = Path(sysconfig.get_path("stdlib"))
    files = _sources(root)
    train, validation = bytearray(), bytearray()
    for i, path in enumerate(files):
        if len(train) + len(validation) > MOST_BYTES:
            break
        part = validation if i % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 else train
        part += path.read_bytes() + b"\n"
    if len(validation) < 1 << 16:
        raise RuntimeError(
            f"end-to-end: {root} holds no source text to train on; use a Python installed with its sources"
        )
    name = f"standard library of Python {platform.python_version()}"
    return Corpus(name, _tensor(train), _tensor(validation))


def _sources(root: Path) -> list[Path]:
    """The library's Python files in an order that is the same on every machine."""
    found = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in SKIPPED_FOLDERS]
        found += [Path(folder) / name for name in names if name.endswith(".py")]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _tensor(data: bytearray) -> Tensor:
    return torch.frombuffer(data, dtype=torch.uint8)
