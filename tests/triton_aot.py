"""Triton kernels compiled without a GPU: what launchers would launch, recorded and compiled, and the code measured.

Launchers run on small CPU tensors with the kernel calls recorded instead of made, for an architecture they are told.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

MISSING = (
    "triton is not installed"
    if importlib.util.find_spec("triton") is None
    else "kernels are built for the interpreter (TRITON_INTERPRET=1)"
    if os.environ.get("TRITON_INTERPRET") == "1"
    else None
)
VERSION = importlib.metadata.version("triton") if MISSING is None else ""
JUDGED = "3.7"  # the version that the Makefile installs
needs_compiler = [
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
    # Every version has to compile the kernels; how well it does is another compiler's business.
    pytest.mark.xfail(
        not VERSION.startswith(f"{JUDGED}."),
        reason=f"budgets of machine code are for Triton {JUDGED}, this is {VERSION}",
        raises=AssertionError,
    ),
]

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_CORE = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
ASYNC_LOAD = {80: "LDGSTS", 90: "UTMALDG", 100: "UTMALDG"}
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.float64: "fp64",
}


@dataclass
class Compiled:
    opcodes: Counter[str]
    registers: int
    stack: int
    local: int
    shared: int


def atomics(code: Compiled) -> list[str]:
    """Instructions that add in no fixed order."""
    return [o for o in code.opcodes if o.startswith(("RED", "ATOMG")) and o != "REDUX"]


class Recorder:
    """Stands in for a kernel and keeps what it is launched with."""

    def __init__(self, calls: dict[str, Any], kernel: Any) -> None:
        self.calls, self.kernel = calls, kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            self.calls[self.kernel.__name__] = (self.kernel, args, options)

        return launch


class Each(Recorder):
    """Keeps every different launch, where one kernel serves several steps."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            self.calls[f"{self.kernel.__name__} {sorted(options.items())}"] = (self.kernel, args, options)

        return launch


def record_kernels(
    module: ModuleType,
    calls: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    recorder: type[Recorder] = Recorder,
) -> None:
    """Replaces every kernel of a module for the length of a test."""
    for name, kernel in list(vars(module).items()):
        if name.endswith("_kernel"):
            monkeypatch.setattr(module, name, recorder(calls, kernel))


def compile_call(call: tuple[Any, tuple[Any, ...], dict[str, Any]], arch: int) -> Any:
    """What the just-in-time compiler would build for these arguments, ahead of time."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.tools.tensor_descriptor import TensorDescriptor

    kernel, args, given = call
    options = {key: given[key] for key in ("num_warps", "num_stages", "enable_fp_fusion") if key in given}
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
