"""Calls of every op in worker processes, the results compared with those of the parent, bit for bit.

Run as `python robust_workers.py METHOD`: fork makes workers of a DataLoader, spawn those of a process pool. Prints how
many calls were compared.
"""

from __future__ import annotations

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor

import torch
from robust_calls import calls, digest, digests
from torch.utils.data import DataLoader, Dataset


class Calls(Dataset[tuple[str, str]]):
    def __init__(self) -> None:
        self.calls = calls()[::2]

    def __len__(self) -> int:
        return len(self.calls)

    def __getitem__(self, index: int) -> tuple[str, str]:
        return str(self.calls[index]), digest(self.calls[index].results())


def all_digests(threads: int) -> list[tuple[str, str]]:
    torch.set_num_threads(threads)
    return [(str(call), digest(call.results())) for call in calls()[::3]]


def main(method: str) -> None:
    torch.set_num_threads(2)
    expected = dict(digests())  # on two threads: the parent has used its pool before any worker exists
    compared = 0
    if method == "spawn":
        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
            found = [pair for pairs in pool.map(all_digests, (1, 3)) for pair in pairs]
    else:
        loader = DataLoader(
            Calls(), batch_size=None, num_workers=2, multiprocessing_context=method, timeout=120
        )
        found = [(name, value) for name, value in loader]
    for name, value in found:
        assert expected[name] == value, f"{name}: other bits in a worker"
        compared += 1
    assert compared >= len(expected) // 2
    print(compared)


if __name__ == "__main__":
    main(sys.argv[1])
