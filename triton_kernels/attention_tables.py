"""Tile shapes of the plain attention kernels by architecture, padded head dimension and element size."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

MAX_DIM = 256


class Tiles(NamedTuple):
    """Queries and keys in a tile, warps of a program, stages of the load pipeline."""

    m: int
    n: int
    warps: int
    stages: int


# (pass, architecture) -> {(element bytes, padded head dimension): tiles}. Chosen so that the compiled kernels fit the
# architecture's shared memory and spill nothing (tests/test_triton_compile.py); the exceptions, a few registers each,
# are fp32 beyond D = 64, whose split operands fill the registers, and dK/dV at D = 256 on 9.0. Timings on hardware are
# still due. The entries of 8.0 stay below 99 KB, so that consumer parts (8.6, 8.9, 12.0) take them too.
_TABLE: dict[tuple[str, int], dict[tuple[int, int], Tiles]] = {
    ("forward", 80): {
        (2, 64): Tiles(128, 64, 4, 3), (2, 128): Tiles(128, 64, 8, 3), (2, 256): Tiles(64, 32, 8, 2),
        (4, 64): Tiles(32, 32, 4, 2), (4, 128): Tiles(32, 16, 4, 1), (4, 256): Tiles(16, 16, 4, 1),
    },
    ("forward", 90): {
        (2, 64): Tiles(128, 64, 4, 3), (2, 128): Tiles(128, 128, 8, 2), (2, 256): Tiles(128, 64, 8, 2),
        (4, 64): Tiles(64, 32, 4, 2), (4, 128): Tiles(16, 16, 4, 1), (4, 256): Tiles(16, 16, 4, 1),
    },
    ("forward", 100): {
        (2, 64): Tiles(128, 64, 4, 3), (2, 128): Tiles(128, 64, 8, 3), (2, 256): Tiles(128, 32, 8, 2),
        (4, 64): Tiles(64, 32, 4, 2), (4, 128): Tiles(16, 16, 4, 1), (4, 256): Tiles(16, 16, 4, 1),
    },
    ("backward_kv", 80): {
        (2, 64): Tiles(64, 128, 8, 2), (2, 128): Tiles(64, 64, 8, 2), (2, 256): Tiles(16, 64, 8, 1),
        (4, 64): Tiles(32, 16, 4, 1), (4, 128): Tiles(16, 16, 4, 1), (4, 256): Tiles(16, 16, 8, 1),
    },
    ("backward_kv", 90): {
        (2, 64): Tiles(64, 128, 8, 2), (2, 128): Tiles(64, 128, 8, 2), (2, 256): Tiles(32, 64, 8, 2),
        (4, 64): Tiles(16, 16, 4, 1), (4, 128): Tiles(16, 16, 8, 1), (4, 256): Tiles(16, 16, 8, 1),
    },
    ("backward_kv", 100): {
        (2, 64): Tiles(64, 128, 8, 2), (2, 128): Tiles(64, 128, 8, 2), (2, 256): Tiles(64, 64, 8, 1),
        (4, 64): Tiles(16, 16, 4, 1), (4, 128): Tiles(16, 16, 8, 1), (4, 256): Tiles(16, 16, 8, 1),
    },
    ("backward_q", 80): {
        (2, 64): Tiles(128, 64, 8, 2), (2, 128): Tiles(64, 64, 8, 2), (2, 256): Tiles(64, 32, 8, 1),
        (4, 64): Tiles(32, 16, 4, 1), (4, 128): Tiles(16, 16, 4, 1), (4, 256): Tiles(16, 16, 8, 1),
    },
    ("backward_q", 90): {
        (2, 64): Tiles(128, 64, 8, 2), (2, 128): Tiles(128, 64, 8, 2), (2, 256): Tiles(64, 64, 8, 2),
        (4, 64): Tiles(64, 16, 4, 1), (4, 128): Tiles(16, 16, 8, 1), (4, 256): Tiles(16, 16, 8, 1),
    },
    ("backward_q", 100): {
        (2, 64): Tiles(128, 64, 8, 2), (2, 128): Tiles(128, 64, 8, 2), (2, 256): Tiles(128, 32, 8, 1),
        (4, 64): Tiles(64, 16, 4, 1), (4, 128): Tiles(16, 16, 8, 1), (4, 256): Tiles(16, 16, 8, 1),
    },
}

# Where the masked loop needs more registers than a tile leaves.
_CAUSAL: dict[tuple[str, int, int, int], Tiles] = {("forward", 80, 2, 128): Tiles(128, 32, 8, 3)}


def padded(dim: int) -> int:
    """Head dimension as a tile sees it: the next power of two, 16 at least (the depth of a tensor-core product)."""
    return max(16, triton.next_power_of_2(dim))


def tiles(name: str, arch: int, dtype: torch.dtype, head_dim: int, value_dim: int, causal: bool) -> Tiles:
    """Tile shapes of pass `name`; `arch` is 10 x compute capability, 0 for the interpreter."""
    if arch == 0:
        return Tiles(16, 16, 4, 1)
    known = 100 if 100 <= arch < 120 else 90 if arch == 90 else 80
    width = max(64, padded(head_dim), padded(value_dim))
    found = _TABLE[name, known][dtype.itemsize, width]
    return _CAUSAL.get((name, known, dtype.itemsize, width), found) if causal else found


def precision(arch: int, dtype: torch.dtype) -> str:
    """fp32 products run on tensor cores as six bf16 ones of operands split in three: what is dropped is below 2^-23,
    fp32's own rounding. Three TF32 products drop 2^-21 at the same cost and hold a third more registers; exact FMA
    (`ieee`) spills from D = 64 on."""
    if arch == 0:
        return "ieee"
    return "bf16x6" if dtype == torch.float32 else "tf32"
