"""Weights whose parts lie on gloo ranks: centroids and gradients of one process, and the same bits everywhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
        reason="this torch has no gloo",
    ),
]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("mode", ["fsdp", "shards", "tensor"])
def test_ranks_equal_one_process(mode: str, ranks: int) -> None:
    script = Path(__file__).with_name("dkm_ranks.py")
    command = [sys.executable, str(script), mode, str(ranks)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
