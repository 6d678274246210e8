"""Trains a reversible stack on two gloo ranks and in one process, and exits with an error where they differ.

    python reversible_ranks.py ddp|nested|fsdp|late

`nested` is ddp with an engine that calls .backward() inside a block; `late` is fsdp with one that leaves the gathering
of a block's parameters to the block's own node.
"""

from __future__ import annotations

import copy
import datetime
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from reversible_nets import WIDTH, assert_same, blocks
from torch import Tensor, nn

from effkern.nn import ReversibleSequence, _reversible_step

RANKS, STEPS = 2, 2


class Model(nn.Module):
    def __init__(self, overlap: bool) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.body = ReversibleSequence(blocks(5), overlap=overlap)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        y1, y2 = self.body(self.stem(x), condition=condition)
        return self.head(y1 + y2)


def loss(model: nn.Module, x: Tensor, condition: Tensor) -> Tensor:
    return model(x, condition).square().mean()


def nested(self: _reversible_step.Replay, slot: int, grad: Tensor) -> Tensor:
    leaf, out = self._graphs.pop(slot)
    out.backward(grad)
    return leaf.grad


def rank(index: int, mode: str, meeting: str) -> None:
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", f"file://{meeting}", rank=index, world_size=RANKS, timeout=limit)
    if mode == "late":
        _reversible_step.Source.prepare = lambda self: None
    if mode == "nested":
        _reversible_step.Replay.pull = nested
    for overlap in (False, True) if mode in ("ddp", "fsdp") else (True,):
        torch.manual_seed(0)
        whole = Model(overlap).double()
        model = copy.deepcopy(whole)
        x = torch.randn(STEPS, 4 * RANKS, WIDTH, dtype=torch.float64)
        condition = torch.rand(WIDTH, dtype=torch.float64)
        if mode in ("ddp", "nested"):
            trained: nn.Module = nn.parallel.DistributedDataParallel(model)
        else:
            from torch.distributed.fsdp import fully_shard

            mesh = dist.init_device_mesh("cpu", (RANKS,))
            for block in model.body.blocks:
                fully_shard(block, mesh=mesh)
            trained = fully_shard(model, mesh=mesh)
        for batch in x:  # accumulates
            loss(trained, batch.chunk(RANKS)[index], condition).backward()
            loss(whole, batch, condition).backward()
        found = [
            p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in trained.parameters()
        ]
        assert_same(found, [p.grad for p in whole.parameters()])
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank, (sys.argv[1], str(Path(folder) / "meeting")), nprocs=RANKS)
