"""What nvcc made of the CUDA kernels, read from the built library; no GPU is needed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter

import pytest
from cuda_code import ARCHITECTURES, IMAGES, LIBRARY, dump, instructions, name_of, resources, sections

ELEMENTS = ("Bf16", "Fp16")
FORWARD = [(e, d, dv) for e in ELEMENTS for d in (64, 128) for dv in (64, 128)]
FORWARD_SM90 = [
    (e, *shape) for e in ELEMENTS for shape in ((64, 128), (96, 128), (128, 128), (128, 176), (256, 80))
]
# Padded head dimension -> queries a tile of the kernel that walks over queries, keys a tile of the other one.
BACKWARD_SM90 = {64: (96, 128), 96: (80, 128), 128: (64, 128), 256: (64, 64)}
MEGABYTES = 3  # an image; every unit costs disk and the start of a process


def _forward_name(element: str, head_dim: int, value_dim: int) -> str:
    return name_of("attention_forward_sm80_kernel", f"4cuda4{element}ELi{head_dim}ELi{value_dim}EEE")


def test_images_for_every_architecture() -> None:
    # Not by the file names of --list-elf, where an older cuobjdump leaves out the a of sm_90a.
    images = {arch for arch, _ in resources()}
    ptx = {image.replace("sm_", "compute_") for image in re.findall(r"\.(sm_\w+)\.ptx", dump("--list-ptx"))}
    assert {"sm_80", "sm_90a"} <= images and ptx  # newer GPUs compile the PTX
    assert images | ptx == set(IMAGES)


def test_no_kernel_uses_local_memory() -> None:
    assert {arch for arch, _ in resources()} == set(ARCHITECTURES)
    for kernel, usage in resources().items():
        assert (usage["STACK"], usage["LOCAL"]) == (0, 0), (kernel, usage)
        assert usage["REG"] <= 255
        spills = {op: instructions()[kernel][op] for op in ("LDL", "STL")}
        assert not any(spills.values()), (kernel, spills)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("element", "head_dim", "value_dim"), FORWARD)
def test_forward_instructions(arch: str, element: str, head_dim: int, value_dim: int) -> None:
    """Tensor cores fed by ldmatrix, inputs by asynchronous copies; no input passes through registers."""
    count = instructions()[arch, _forward_name(element, head_dim, value_dim)]
    products = 2 * (64 // 8) * (head_dim // 16) + 2 * (value_dim // 8) * (64 // 16)  # one tile of 64 keys
    assert count["HMMA"] == products
    assert count["LDSM"] >= products // 4
    assert count["LDGSTS"] > 0 and count["LDG"] <= 40  # the search in cu_seqlens
    assert count["BAR"] > 0 and count["MUFU"] >= 2 * 2 * 16


def _sm90_counts(kernel: str, template: str) -> tuple[Counter[str], int]:
    """Operations of an sm_90a kernel, and its waits for products."""
    name = name_of(kernel, template)
    assert [arch for arch, other in resources() if other == name] == ["sm_90a"]
    text = sections(dump("-sass"), r"Function : (\S+)")["sm_90a", name]
    return instructions()["sm_90a", name], text.count("WARPGROUP.DEPBAR")


@pytest.mark.parametrize(("element", "head_dim", "keys"), FORWARD_SM90)
def test_forward_instructions_sm90(element: str, head_dim: int, keys: int) -> None:
    """Warpgroup products fed by the copy engine. Only the waits that the source has: where the compiler does not follow
    the asynchronous use of registers it serialises products, and waits for each of them."""
    count, waits = _sm90_counts(
        "attention_forward_sm90_kernel", f"4cuda4{element}ENS0_16ForwardSm90ShapeILi{head_dim}ELi{keys}E"
    )
    with_keys, with_values = head_dim // 16, keys // 16
    # The first step with and without a mask, the loop with, without and with, and the last values.
    assert count["HGMMA"] == 2 * with_keys + 3 * (with_keys + with_values) + with_values
    assert waits == 2 + 3 * 2 + 1
    assert count["UTMALDG"] >= 3 * (head_dim // 64) and count["UTMASTG"] >= 1
    assert count["USETMAXREG"] == 2
    assert count["HMMA"] == count["LDSM"] == count["LDGSTS"] == 0


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("head_dim", BACKWARD_SM90)
@pytest.mark.parametrize("adds", [False, True], ids=["", "adds dQ"])
def test_backward_instructions_sm90(element: str, head_dim: int, adds: bool) -> None:
    """As in the forward; each loop is there three times, with a mask, without and with."""
    queries, keys = BACKWARD_SM90[head_dim]
    if adds and head_dim not in (64, 128):
        pytest.skip("there is no kernel that adds dQ up for this head dimension")
    queries = 64 if adds else queries
    count, waits = _sm90_counts(
        "attention_backward_keys_sm90_kernel",
        f"4cuda4{element}ENS0_20BackwardSm90KeyShapeILi{head_dim}ELi{queries}ELb{adds:d}E",
    )
    adding = 8 if adds else 0
    assert count["HGMMA"] == 3 * (2 * head_dim // 16 + 2 * queries // 16 + adding)
    assert waits == (13 if adds else 10) and count["USETMAXREG"] == 2
    assert count["UTMALDG"] > 0 and count["UBLKRED"] == (3 if adds else 0)
    if adds:
        return
    count, waits = _sm90_counts(
        "attention_backward_queries_sm90_kernel",
        f"4cuda4{element}ENS0_22BackwardSm90QueryShapeILi{head_dim}ELi{keys}E",
    )
    assert count["HGMMA"] == 3 * (2 * head_dim // 16 + keys // 16)
    assert waits == 10 and count["USETMAXREG"] == 2 and count["UTMALDG"] > 0


def test_size_of_the_library() -> None:
    assert LIBRARY.stat().st_size <= len(IMAGES) * MEGABYTES << 20


def test_blocks_per_multiprocessor() -> None:
    """Registers let two blocks of 128 threads share a multiprocessor."""
    for kernel, usage in resources().items():
        if "attention_forward_sm80_kernel" in kernel[1]:
            allocated = -(-usage["REG"] // 8) * 8
            assert 65536 // (allocated * 128) >= 2, (kernel, usage)


def test_loads_into_a_torch_without_cuda() -> None:
    """Every symbol resolves, the op is registered for CUDA, and CPU tensors get a plain answer."""
    code = """
import json, sys, torch
torch.ops.load_library(sys.argv[1] + "/libeffkern_cpu.so")
torch.ops.load_library(sys.argv[1] + "/libeffkern_cuda.so")
q = torch.zeros(1, 1, 8, 64, dtype=torch.bfloat16)
try:
    torch.ops.effkern.attention_cuda_sm80(q, q, q, None, None, None, False, False)
    message = ""
except NotImplementedError as error:
    message = str(error)
registered = torch._C._dispatch_has_kernel_for_dispatch_key("effkern::attention_cuda_sm80", "CUDA")
print(json.dumps([message, registered]))
"""
    command = [sys.executable, "-c", code, str(LIBRARY.parent)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    message, registered = json.loads(result.stdout)
    assert registered
    assert "effkern::attention_cuda_sm80" in message and "CPU" in message
