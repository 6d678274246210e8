"""DDP and FSDP2 on two gloo ranks give the gradients of one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reversible_nets import WIDTH, blocks

from effkern import checkpoint_sequence
from effkern.nn import ReversibleSequence

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
        reason="this torch has no gloo",
    ),
]


def _run(mode: str) -> subprocess.CompletedProcess[str]:
    script = Path(__file__).with_name("reversible_ranks.py")
    return subprocess.run([sys.executable, str(script), mode], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_ranks_equal_one_process(mode: str) -> None:
    done = _run(mode)
    assert done.returncode == 0, done.stderr


def test_recovering_a_block_whose_parameters_are_still_sharded_is_noticed() -> None:
    done = _run("late")
    assert done.returncode != 0 and "in recover" in done.stderr, done.stderr


def test_a_nested_backward_breaks_ddp() -> None:
    """DDP averages what a block's node returns; a nested .backward() has written it by then."""
    done = _run("nested")
    assert done.returncode != 0 and "mark a variable ready only once" in done.stderr, done.stderr


def test_sharding_that_cannot_work_is_refused(tmp_path: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    dist = torch.distributed
    dist.init_process_group("gloo", f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        net = ReversibleSequence(blocks(2))
        fully_shard(net.blocks[1].f, mesh=mesh)
        with pytest.raises(RuntimeError, match="block 1: fully_shard must be given the block as a whole"):
            net(torch.randn(3, WIDTH))
        block = fully_shard(torch.nn.Linear(WIDTH, WIDTH), mesh=mesh)
        with pytest.raises(RuntimeError, match="block 0 is sharded by FSDP"):
            checkpoint_sequence([block], torch.randn(3, WIDTH))
    finally:
        dist.destroy_process_group()
