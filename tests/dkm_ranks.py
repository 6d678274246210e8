"""Clusters weights whose parts lie on gloo ranks, and in one process, and exits with an error where they differ.

    python dkm_ranks.py fsdp|shards|tensor RANKS

`fsdp` trains layers that FSDP2 shards and gathers, `shards` gives every rank its rows and nothing else, `tensor` trains
a sharded parameter that is gathered after it has been clustered.
"""

from __future__ import annotations

import copy
import datetime
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

import effkern
from effkern.nn import ClusteredLinear, TemperatureSchedule

STEPS, WIDTH = 3, 24


def assert_same_bits(mine: Tensor, ranks: int) -> None:
    held = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(held, mine)
    assert all(torch.equal(entry, mine) for entry in held), "centroids differ between ranks"


def model() -> nn.Module:
    return nn.Sequential(
        ClusteredLinear(WIDTH, 32, 3), nn.Tanh(), ClusteredLinear(32, 16, 2, groups=4, tolerance=1e-6)
    )


def train(trained: nn.Module, x: Tensor, wanted: Tensor) -> None:
    optimizer = torch.optim.SGD(trained.parameters(), 0.1)
    schedule = TemperatureSchedule(trained, STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.mse_loss(trained(x), wanted).backward()
        optimizer.step()
        schedule.step()


def fsdp(index: int, ranks: int) -> None:
    from torch.distributed.fsdp import fully_shard

    whole = model()
    sharded = copy.deepcopy(whole)
    x, wanted = torch.randn(8 * ranks, WIDTH), torch.randn(8 * ranks, 16)
    mesh = dist.init_device_mesh("cpu", (ranks,))
    for layer in (sharded[0], sharded[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    train(whole, x, wanted)
    train(sharded, x.chunk(ranks)[index], wanted.chunk(ranks)[index])
    for mine, other in ((sharded[0], whole[0]), (sharded[2], whole[2])):
        assert_same_bits(mine.centroids, ranks)
        torch.testing.assert_close(mine.centroids, other.centroids, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mine.weight.full_tensor(), other.weight, rtol=1e-4, atol=1e-5)
        mine.unshard()
        torch.testing.assert_close(mine.palette().lut, other.palette().lut, rtol=1e-4, atol=1e-5)


def shards(index: int, ranks: int) -> None:
    group = dist.group.WORLD
    kinds = [
        (torch.float32, 1, 37, 3, 0.0),
        (torch.float32, 1, 37, 9, 0.03),
        (torch.bfloat16, 4, 64, 3, 0.0),
        (torch.float64, 2, 3, 3, 0.0),  # of four ranks one has nothing
    ]
    for dtype, dim, rows, iterations, tolerance in kinds:
        weight = torch.randn(rows, 20).to(dtype)
        start = torch.randn((8,) if dim == 1 else (8, dim)).to(dtype)
        start[-1] = 40.0  # a cluster that stays empty
        options: dict[str, Any] = {"iterations": iterations, "tolerance": tolerance, "dim": dim}
        parts = [*weight.chunk(ranks), *[weight[:0]] * ranks]
        own = parts[index].clone().requires_grad_()
        out, found = effkern.dkm(own, start, temperature=0.1, **options, process_group=group)
        assert effkern.backends.last() == "dkm:reference"
        leaf = weight.clone().requires_grad_()
        expected, centroids = effkern.dkm(leaf, start, temperature=0.1, **options, backend="reference")
        assert_same_bits(found, ranks)
        torch.testing.assert_close(found, centroids)
        before = sum(len(part) for part in parts[:index])
        here = slice(before, before + len(own))
        torch.testing.assert_close(out, expected[here])
        sent = torch.randn_like(weight)
        out.backward(sent[here])
        expected.backward(sent)
        relative = 2e-2 if dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(own.grad, leaf.grad[here], rtol=relative, atol=1e-4)
    broken = torch.full((2, 4), torch.nan if index == ranks - 1 else 1.0)
    wrong: list[tuple[Tensor, dict[str, Any], str]] = [
        (broken, {}, "weight has entries that are not finite"),  # on every rank, not only where it is
        (torch.ones(2, 4), {"groups": 2}, "groups must be 1 with a process_group"),
        (torch.ones(2, 4), {"backend": "cpu"}, "served by PyTorch's own operations"),
    ]
    for weight, options, error in wrong:
        start = torch.ones(2, 3) if "groups" in options else torch.ones(3)
        try:
            effkern.dkm(weight, start, temperature=0.1, process_group=group, **options)
        except (RuntimeError, ValueError) as raised:
            assert error in str(raised), raised
        else:
            raise AssertionError(f"no error: {error}")


def tensor(index: int, ranks: int) -> None:
    from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

    mesh = dist.init_device_mesh("cpu", (ranks,))
    whole, start = nn.Parameter(torch.randn(8 * ranks, 12)), torch.linspace(-2, 2, 8)
    x = torch.randn(5 * ranks, 12)
    weight = nn.Parameter(distribute_tensor(whole.detach(), mesh, [Shard(0)]))
    for _ in range(STEPS):
        expected, centroids = effkern.dkm(whole, start, temperature=0.05)
        F.linear(x, expected).square().mean().backward()
        group = mesh.get_group()
        part, found = effkern.dkm(weight.to_local(), start, temperature=0.05, process_group=group)
        full = DTensor.from_local(part, mesh, [Shard(0)]).full_tensor(grad_placements=[Partial()])
        (F.linear(x.chunk(ranks)[index], full).square().mean() / ranks).backward()
        assert_same_bits(found, ranks)
        torch.testing.assert_close(found, centroids, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(weight.grad.full_tensor(), whole.grad, rtol=1e-3, atol=1e-4)
        with torch.no_grad():
            for parameter in (weight, whole):
                parameter.sub_(parameter.grad, alpha=0.1)
                parameter.grad = None


def rank(index: int, mode: str, ranks: int, meeting: str) -> None:
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", f"file://{meeting}", rank=index, world_size=ranks, timeout=limit)
    torch.manual_seed(0)
    {"fsdp": fsdp, "shards": shards, "tensor": tensor}[mode](index, ranks)
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        count = int(sys.argv[2])
        mp.spawn(rank, (sys.argv[1], count, str(Path(folder) / "meeting")), nprocs=count)
