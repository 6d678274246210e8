"""Every Triton attention kernel compiled without a GPU, and what the compiled code must look like.

The launchers run on small CPU tensors with the kernel call recorded instead of made, for an architecture they are
told; what they would have launched is then compiled for it. Checked in the machine code: no spills and no local
memory, shared memory within the architecture's limit, the tensor-core instruction, and pipelined loads.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

_MISSING = (
    "triton is not installed"
    if importlib.util.find_spec("triton") is None
    else "kernels are built for the interpreter (TRITON_INTERPRET=1)"
    if os.environ.get("TRITON_INTERPRET") == "1"
    else None
)
pytestmark = pytest.mark.skipif(_MISSING is not None, reason=str(_MISSING))

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_CORE = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
ASYNC_LOAD = {80: "LDGSTS", 90: "UTMALDG", 100: "UTMALDG"}
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32"}
PASSES = ["attention_forward_kernel", "attention_backward_kv_kernel", "attention_backward_q_kernel"]


@dataclass(frozen=True)
class Case:
    arch: int
    dim: int
    dtype: torch.dtype = torch.bfloat16
    causal: bool = True
    packed: bool = False

    def __str__(self) -> str:
        kind = "causal" if self.causal else "full"
        return f"sm{self.arch}-{TYPES[self.dtype]}-D{self.dim}-{kind}{'-packed' if self.packed else ''}"


CASES = [
    *(Case(arch, dim) for arch in SHARED_LIMIT for dim in (64, 128)),
    *(Case(arch, 128, causal=False) for arch in (80, 90)),
    Case(90, 64, causal=False),
    Case(90, 128, packed=True),
    Case(90, 64, torch.float32),
]


@dataclass
class Compiled:
    opcodes: Counter[str]
    registers: int
    stack: int
    local: int
    shared: int


class Recorder:
    """Stands in for a kernel and keeps what it is launched with."""

    def __init__(self, calls: dict[str, Any], kernel: Any) -> None:
        self.calls, self.kernel = calls, kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            self.calls[self.kernel.__name__] = (self.kernel, args, options)

        return launch


def record(case: Case, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Kernel name -> what the launchers launch on a machine of the case's architecture."""
    from effkern._triton import attention as launcher

    calls: dict[str, Any] = {}
    monkeypatch.setattr(launcher, "_architecture", lambda device: case.arch)
    monkeypatch.setattr(launcher, "_cache_bytes", lambda device: 50 << 20)
    for name in [*PASSES, "attention_delta_kernel"]:
        monkeypatch.setattr(launcher.kernels, name, Recorder(calls, getattr(launcher.kernels, name)))
    lead = () if case.packed else (2,)
    q, k, v = (torch.zeros(*lead, h, 512, case.dim, dtype=case.dtype) for h in (8, 2, 2))
    ends = torch.tensor([0, 200, 512], dtype=torch.int32) if case.packed else None
    out, lse = launcher.forward(q, k, v, ends, ends, None, case.causal, False)
    launcher.backward(out, None, q, k, v, out, lse, ends, ends, None, case.causal, False)
    return calls


def compile_call(call: tuple[Any, tuple[Any, ...], dict[str, Any]], arch: int) -> Any:
    """What the just-in-time compiler would build for these arguments, ahead of time."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.tools.tensor_descriptor import TensorDescriptor

    kernel, args, given = call
    options = {key: given[key] for key in ("num_warps", "num_stages") if key in given}
    values = dict(zip(kernel.arg_names, args)) | {key: v for key, v in given.items() if key not in options}
    assert set(values) == set(kernel.arg_names)
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, values[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            shape = ", ".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}[{shape}]>"
        elif isinstance(value, torch.Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def inspect(built: Any, folder: Path) -> Compiled:
    """Resource usage and opcodes of the machine code, by the tools that come with triton."""
    from triton import knobs

    cubin = folder / "kernel.cubin"
    cubin.write_bytes(built.asm["cubin"])

    def tool(command: Any, *flags: str) -> str:
        return subprocess.run(
            [command.path, *flags, cubin], capture_output=True, text=True, check=True
        ).stdout

    usage = dict(
        re.findall(r"(REG|STACK|LOCAL):(\d+)", tool(knobs.nvidia.cuobjdump, "--dump-resource-usage"))
    )
    code = tool(knobs.nvidia.nvdisasm, "-c")
    opcodes = Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", code))
    return Compiled(
        opcodes, int(usage["REG"]), int(usage["STACK"]), int(usage["LOCAL"]), built.metadata.shared
    )


def report(label: str, code: Compiled, arch: int) -> None:
    kept = [TENSOR_CORE[arch], "HMMA", ASYNC_LOAD[arch], "WARPGROUP"]
    counts = ", ".join(f"{code.opcodes[name]} {name}" for name in dict.fromkeys(kept) if code.opcodes[name])
    print(f"{label}: {code.registers} registers, {code.stack} B stack, {code.shared} B shared, {counts}")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_machine_code(case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = record(case, monkeypatch)
    for name in PASSES:
        code = inspect(compile_call(calls[name], case.arch), tmp_path)
        label = f"{name} {case}"
        report(label, code, case.arch)
        assert code.stack == 0 and code.local == 0, (
            f"{label} spills: {code.stack} B of stack, {code.local} B local"
        )
        assert not code.opcodes["STL"] and not code.opcodes["LDL"], f"{label} touches local memory"
        atomics = [
            opcode for opcode in code.opcodes if opcode.startswith(("RED", "ATOMG")) and opcode != "REDUX"
        ]
        assert not atomics, f"{label} adds in no fixed order: {atomics}"
        assert code.shared <= SHARED_LIMIT[case.arch], f"{label} takes {code.shared} B of shared memory"
        # Split fp32 operands go through registers, where tiles too small for warpgroup products use the older ones.
        wanted = [TENSOR_CORE[case.arch]] if case.dtype != torch.float32 else [TENSOR_CORE[case.arch], "HMMA"]
        assert any(code.opcodes[opcode] for opcode in wanted), f"{label} has none of {wanted}"
        assert code.opcodes[ASYNC_LOAD[case.arch]], f"{label} has no {ASYNC_LOAD[case.arch]}"
        if case.arch == 90 and case.dtype != torch.float32:
            # ptxas waits after every single product when it cannot prove the accumulators untouched meanwhile.
            assert code.opcodes["WARPGROUP"] < code.opcodes["HGMMA"], f"{label}: wgmma is serialised"


def test_delta_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = record(Case(90, 128), monkeypatch)
    code = inspect(compile_call(calls["attention_delta_kernel"], 90), tmp_path)
    assert code.stack == 0 and code.local == 0
