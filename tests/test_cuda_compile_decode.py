"""What nvcc made of the CUDA decode kernels, read from the built library; no GPU is needed.

That no kernel spills or uses local memory is tested for the whole library in test_cuda_compile.py.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from cuda_code import ARCHITECTURES, LIBRARY, instructions, name_of, resources

SHAPES = ((64, 1), (64, 2), (96, 1), (96, 2), (128, 1), (128, 2), (256, 1))  # head dim, blocks of 16 rows
KEYS = 16  # of a tile
ATOMICS = ("ATOM", "ATOMG", "ATOMS", "RED", "REDG")

every_arch = pytest.mark.parametrize("arch", ARCHITECTURES)
every_element = pytest.mark.parametrize("element", ["Bf16", "Fp16"])


def _split_name(element: str, dim: int, row_blocks: int) -> str:
    return name_of("attention_decode_split_sm80_kernel", f"4cuda4{element}ELi{dim}ELi{row_blocks}EEE")


@every_arch
@every_element
@pytest.mark.parametrize(("dim", "row_blocks"), SHAPES)
def test_split_instructions(arch: str, element: str, dim: int, row_blocks: int) -> None:
    """A tile is multiplied once, by tensor cores fed by ldmatrix; the cache arrives by asynchronous copies alone; the
    loop has no barrier of the block: two come after it."""
    count = instructions()[arch, _split_name(element, dim, row_blocks)]
    assert count["HMMA"] == row_blocks * (KEYS // 8 * dim // 16 + dim // 8)
    assert count["LDSM"] == (2 + row_blocks) * dim // 16  # keys, values, queries
    stages, steps = (4 if dim <= 96 else 3), KEYS * dim // 8 // 32
    # Keys and values of the loop and of the stages before it, by whole tiles and by single keys; the queries.
    assert count["LDGSTS"] >= (4 * stages + row_blocks) * steps
    assert count["LDG"] <= 16  # lengths, page numbers, sinks
    assert count["BAR"] == 2
    assert not any(count[name] for name in ATOMICS)


@every_arch
@every_element
def test_merge_instructions(arch: str, element: str) -> None:
    count = instructions()[arch, name_of("attention_decode_merge_kernel", f"4cuda4{element}E")]
    assert count["LDG"] > 0 and count["BAR"] == 1 and count["HMMA"] == 0
    assert not any(count[name] for name in ATOMICS)


@every_arch
@every_element
@pytest.mark.parametrize(("dim", "row_blocks"), SHAPES)
def test_blocks_per_multiprocessor(arch: str, element: str, dim: int, row_blocks: int) -> None:
    """Registers let two blocks share a multiprocessor, which the planned split counts on."""
    usage = resources()[arch, _split_name(element, dim, row_blocks)]
    threads = 64 if dim > 128 else 128
    assert 65536 // (-(-usage["REG"] // 8) * 8 * threads) >= 2, usage


def test_registered_in_a_torch_without_cuda() -> None:
    code = """
import json, sys, torch
torch.ops.load_library(sys.argv[1] + "/libeffkern_cpu.so")
torch.ops.load_library(sys.argv[1] + "/libeffkern_cuda.so")
q, n = torch.zeros(1, 1, 8, 64, dtype=torch.bfloat16), torch.ones(1, dtype=torch.int32)
try:
    torch.ops.effkern.attention_decode_cuda(q, q, q, n)
    message = ""
except NotImplementedError as error:
    message = str(error)
registered = torch._C._dispatch_has_kernel_for_dispatch_key("effkern::attention_decode_cuda", "CUDA")
print(json.dumps([message, registered]))
"""
    command = [sys.executable, "-c", code, str(LIBRARY.parent)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    message, registered = json.loads(result.stdout)
    assert registered
    assert "effkern::attention_decode_cuda" in message and "CPU" in message
