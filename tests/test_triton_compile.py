"""Every Triton attention kernel compiled without a GPU, and what the compiled code must look like.

The launchers run on small CPU tensors with the kernel call recorded instead of made, for an architecture they are
told; what they would have launched is then compiled for it. Checked in the machine code: no spills and no local
memory, shared memory within the architecture's limit, the tensor-core instruction, and pipelined loads.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from triton_aot import (
    ASYNC_LOAD,
    SHARED_LIMIT,
    TENSOR_CORE,
    TYPES,
    Each,
    Recorder,
    atomics,
    compile_call,
    inspect,
    needs_compiler,
    record_kernels,
    report,
)

pytestmark = needs_compiler

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


def record(case: Case, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Kernel name -> what the launchers launch on a machine of the case's architecture."""
    from effkern._triton import attention as launcher

    calls: dict[str, Any] = {}
    monkeypatch.setattr(launcher, "architecture", lambda device: case.arch)
    monkeypatch.setattr(launcher, "_cache_bytes", lambda device: 50 << 20)
    for name in [*PASSES, "attention_delta_kernel"]:
        monkeypatch.setattr(launcher.kernels, name, Recorder(calls, getattr(launcher.kernels, name)))
    lead = () if case.packed else (2,)
    q, k, v = (torch.zeros(*lead, h, 512, case.dim, dtype=case.dtype) for h in (8, 2, 2))
    ends = torch.tensor([0, 200, 512], dtype=torch.int32) if case.packed else None
    out, lse = launcher.forward(q, k, v, ends, ends, None, case.causal, False)
    launcher.backward(out, None, q, k, v, out, lse, ends, ends, None, case.causal, False)
    return calls


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
        assert not atomics(code), f"{label} adds in no fixed order: {atomics(code)}"
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


GENERAL = {
    "window": dict(bands=(100, 0, 0)),
    "blocks": dict(layout=torch.ones(1, 1, 8, 8, dtype=torch.bool), block=64),
    "bias": dict(bias=torch.zeros(1, 8, 512, 512, dtype=torch.bfloat16)),
    "softcap, ALiBi, sinks": dict(softcap=5.0, alibi_slopes=torch.ones(8), sink_logits=torch.ones(8)),
    "dropout": dict(dropout_p=0.1, dropout_seed=torch.zeros(1, dtype=torch.int64)),
}


@pytest.mark.parametrize("name", GENERAL)
@pytest.mark.parametrize(("arch", "dim"), [(80, 64), (80, 128), (90, 128), (100, 64)])
def test_general_machine_code(
    arch: int, dim: int, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Masks, terms and dropout: nothing spills but a few registers, most of them of the backward pass."""
    from effkern._triton import attention as launcher

    calls: dict[str, Any] = {}
    monkeypatch.setattr(launcher, "architecture", lambda device: arch)
    monkeypatch.setattr(
        launcher.kernels, "attention_delta_kernel", Recorder(calls, launcher.kernels.attention_delta_kernel)
    )
    record_kernels(launcher.general.kernels, calls, monkeypatch)
    q, k, v = (torch.zeros(2, h, 512, dim, dtype=torch.bfloat16) for h in (8, 2, 2))
    options = GENERAL[name]
    out, lse = launcher.forward(q, k, v, None, None, None, True, False, **options)
    launcher.backward(
        out, None, q, k, v, out, lse, None, None, None, True, False, **options, bias_grad="bias" in options
    )
    del calls["attention_delta_kernel"]
    assert len(calls) == (4 if "bias" in options else 3)
    for kernel, call in calls.items():
        code = inspect(compile_call(call, arch), tmp_path)
        label = f"{kernel} sm{arch} D{dim} {name}"
        report(label, code, arch)
        assert code.stack <= (64 if "backward" in kernel else 8) and code.local == 0, (
            f"{label} spills: {code.stack} B"
        )
        assert code.shared <= SHARED_LIMIT[arch], f"{label} takes {code.shared} B of shared memory"
        assert code.opcodes[TENSOR_CORE[arch]] or code.opcodes["HMMA"], f"{label} has no tensor core product"
        assert not atomics(code), f"{label} has atomics"


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_decode_machine_code(arch: int, paged: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from effkern._triton import attention_decode as launcher

    calls: dict[str, Any] = {}
    monkeypatch.setattr(launcher, "architecture", lambda device: arch)
    names = ("attention_decode_chunk_kernel", "attention_decode_merge_kernel")
    for name in names:
        monkeypatch.setattr(launcher.kernels, name, Recorder(calls, getattr(launcher.kernels, name)))
    q = torch.zeros(2, 32, 1, 128, dtype=torch.bfloat16)
    cache = torch.zeros(*((64, 8, 16) if paged else (2, 8, 512)), 128, dtype=torch.bfloat16)
    table = torch.zeros(2, 32, dtype=torch.int32) if paged else None
    lengths = torch.tensor([512, 7], dtype=torch.int32)
    launcher.decode(q, cache, cache, lengths, table, None, (100, 0, 4), 3.0, torch.zeros(32))
    for name in names:
        code = inspect(compile_call(calls[name], arch), tmp_path)
        report(f"{name} sm{arch}", code, arch)
        assert code.stack == 0 and code.local == 0 and code.shared <= SHARED_LIMIT[arch]


@dataclass(frozen=True)
class Monarch:
    """A call of the Monarch launchers; `way` is fused, staged, l_major (staged, output by l blocks) or backward."""

    arch: int
    sizes: tuple[int, int, int, int, int, int]  # k, q, p, l, s, r
    way: str
    tokens: int = 8192
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        k, _, p, *_ = self.sizes
        return f"sm{self.arch}-{TYPES[self.dtype]}-{k * p}-by-{k}-{self.way}-{self.tokens}"


D2048 = (8, 256, 256, 8, 256, 256)
D4096 = (16, 256, 256, 16, 256, 256)
PUBLISHED = (8, 192, 96, 24, 16, 64)
UNEVEN = (6, 105, 72, 9, 50, 70)
MONARCH = [
    *(
        Monarch(arch, D2048, way)
        for arch in SHARED_LIMIT
        for way in ("fused", "staged", "l_major", "backward")
    ),
    *(Monarch(arch, D4096, way) for arch in SHARED_LIMIT for way in ("fused", "staged")),
    Monarch(90, D4096, "backward"),
    *(Monarch(90, D2048, way, dtype=torch.float16) for way in ("fused", "staged")),
]
# Tiles too small, split or ragged for warpgroup products: any tensor-core product will do.
MONARCH_SMALL = [
    *(Monarch(arch, D4096, "fused", 16) for arch in SHARED_LIMIT),
    *(
        Monarch(arch, D2048, way, dtype=torch.float32)
        for arch in SHARED_LIMIT
        for way in ("fused", "staged", "backward")
    ),
    *(Monarch(90, sizes, way) for sizes in (PUBLISHED, UNEVEN) for way in ("fused", "staged", "backward")),
    *(Monarch(100, UNEVEN, way, dtype=torch.float32) for way in ("fused", "staged")),
]


def record_monarch(case: Monarch, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every different kernel of a call: one kernel serves several of its products."""
    from effkern._triton import monarch as launcher

    calls: dict[str, Any] = {}

    monkeypatch.setattr(launcher, "architecture", lambda device: case.arch)
    record_kernels(launcher.kernels, calls, monkeypatch, Each)
    k, q, p, l, s, r = case.sizes
    x = torch.empty(case.tokens, k * p, dtype=case.dtype)
    w1, w2 = torch.empty(k, q, p, dtype=case.dtype), torch.empty(l, s, r, dtype=case.dtype)
    if case.way == "backward":
        launcher.monarch_matmul_backward(torch.empty(case.tokens, l * s, dtype=case.dtype), x, w1, w2)
    else:
        bias = torch.empty(l * s, dtype=case.dtype)
        launcher.monarch_matmul(x, w1, w2, bias, case.way == "l_major", fused=case.way == "fused")
    return list(calls.values())


@pytest.mark.plain_empty
@pytest.mark.parametrize("case", [*MONARCH, *MONARCH_SMALL], ids=str)
def test_monarch_machine_code(case: Monarch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Forward and backward: nothing spills, no atomics, shared memory fits, tensor cores, pipelined loads."""
    calls = record_monarch(case, monkeypatch)
    assert len(calls) == {"fused": 1, "staged": 2, "l_major": 2, "backward": 6}[case.way]
    for call in calls:
        code = inspect(compile_call(call, case.arch), tmp_path)
        label = f"{call[0].__name__} {case}"
        report(label, code, case.arch)
        assert code.stack == 0 and code.local == 0, f"{label} spills: {code.stack} B"
        assert code.shared <= SHARED_LIMIT[case.arch], f"{label} takes {code.shared} B of shared memory"
        assert not atomics(code), f"{label} has atomics"
        if "unshuffle" in call[0].__name__:
            continue
        wanted = [TENSOR_CORE[case.arch]] if case in MONARCH else [TENSOR_CORE[case.arch], "HMMA"]
        assert any(code.opcodes[opcode] for opcode in wanted), f"{label} has none of {wanted}"
        if case in MONARCH:
            assert code.opcodes["LDGSTS"], f"{label} does not load ahead"
        if case in MONARCH and case.arch == 90:
            assert code.opcodes["WARPGROUP"] < code.opcodes["HGMMA"], f"{label}: wgmma is serialised"


@dataclass(frozen=True)
class LongConv:
    """Calls of the long convolution's launchers, gated, with a skip or plain."""

    arch: int
    length: int
    dtype: torch.dtype = torch.bfloat16
    causal: bool = True
    gated: bool = True

    def __str__(self) -> str:
        kind = f"{'causal' if self.causal else 'both'}-{'gated' if self.gated else 'plain'}"
        return f"sm{self.arch}-{TYPES[self.dtype]}-{self.length}-{kind}"


LONG_CONV = [
    *(LongConv(arch, length) for arch in SHARED_LIMIT for length in (256, 1024, 4096)),
    *(LongConv(90, length, torch.float32, causal=False) for length in (256, 512, 2048, 4096)),
    LongConv(90, 4096, gated=False),
    LongConv(90, 4001, torch.float16),
]


@pytest.mark.parametrize("case", LONG_CONV, ids=str)
def test_long_conv_machine_code(case: LongConv, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing spills but a few registers of the largest backward, no atomics, several programs fit on a
    multiprocessor, tensor cores. Tiles of 16 rows take the older products everywhere."""
    from effkern._triton import long_conv as launcher

    calls: dict[str, Any] = {}
    monkeypatch.setattr(launcher, "architecture", lambda device: case.arch)
    record_kernels(launcher.kernels, calls, monkeypatch)
    u = torch.zeros(2, 16, case.length, dtype=case.dtype)
    k = torch.zeros(*((16,) if case.causal else (16, 2)), case.length)
    extra = (torch.zeros(16), u, u) if case.gated else (None, None, None)
    launcher.long_conv(u, k, *extra, causal=case.causal)
    launcher.long_conv_backward(u, u, k, *extra, causal=case.causal)
    assert len(calls) == 3
    for name, call in calls.items():
        code = inspect(compile_call(call, case.arch), tmp_path)
        label = f"{name} {case}"
        report(label, code, case.arch)
        # 16 warps spill more (208 B). 144 B of 256 threads are one more tile moved, beside some 40 exchanges of tiles.
        spilled = 144 if "backward" in name and case.length > 2048 else 0
        assert code.stack <= spilled and code.local == 0, f"{label} spills: {code.stack} B"
        assert code.shared <= SHARED_LIMIT[case.arch] // 4, f"{label} takes {code.shared} B of shared memory"
        assert code.opcodes["HMMA"], f"{label} has no tensor core product"
        assert not atomics(code), f"{label} has atomics"


LONG_CONV_PASSES = [
    *(LongConv(arch, length) for arch in SHARED_LIMIT for length in (8192, 1 << 20)),
    LongConv(90, 1 << 17, torch.float32, causal=False),
    LongConv(90, 30_001, torch.float32, causal=False, gated=False),
]


@pytest.mark.plain_empty
@pytest.mark.parametrize("case", LONG_CONV_PASSES, ids=str)
def test_long_conv_passes_machine_code(
    case: LongConv, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As the kernels of a single ring; of the backward along rows of 4096 some registers spill, most on 10.0, and
    one on 8.0 in the taps' last pass, which runs once a channel."""
    from effkern._triton import long_conv as launcher
    from effkern._triton import long_conv_passes as passes

    calls: dict[str, Any] = {}
    monkeypatch.setattr(launcher, "architecture", lambda device: case.arch)
    record_kernels(passes.kernels, calls, monkeypatch, Each)
    u = torch.zeros(2, 1, case.length, dtype=case.dtype)
    k = torch.zeros(*((1,) if case.causal else (1, 2)), case.length)
    extra = (torch.zeros(1), u, u) if case.gated else (None, None, None)
    launcher.long_conv(u, k, *extra, causal=case.causal)
    launcher.long_conv_backward(u, u, k, *extra, causal=case.causal)
    assert len({call[0] for call in calls.values()}) == 7
    for name, call in calls.items():
        code = inspect(compile_call(call, case.arch), tmp_path)
        label = f"{name} {case}"
        report(label, code, case.arch)
        large = case.length > 1 << 19
        spilled = 80 if "rows_backward" in name and large else 8 if "taps_up" in name and large else 0
        assert code.stack <= spilled and code.local == 0, f"{label} spills: {code.stack} B"
        assert code.shared <= SHARED_LIMIT[case.arch] // 4, f"{label} takes {code.shared} B of shared memory"
        assert code.opcodes["HMMA"], f"{label} has no tensor core product"
        assert not atomics(code), f"{label} has atomics"


@dataclass(frozen=True)
class ShortConv:
    """Calls of the short convolution's launchers, with everything that can be left out or without."""

    arch: int
    shape: tuple[int, int, int, int] = (2, 64, 2048, 4)  # (B, H, L, W)
    dtype: torch.dtype = torch.bfloat16
    full: bool = True

    def __str__(self) -> str:
        batch, channels, length, taps = self.shape
        kind = "full" if self.full else "plain"
        return f"sm{self.arch}-{TYPES[self.dtype]}-{batch}x{channels}x{length}-{taps}-{kind}"


SHORT_CONV = [
    *(ShortConv(arch) for arch in SHARED_LIMIT),
    ShortConv(90, full=False),
    ShortConv(90, dtype=torch.float32),
    ShortConv(90, (3, 700, 1, 4)),
    ShortConv(90, (2, 5, 3001, 256), torch.float16),
]


@pytest.mark.parametrize("case", SHORT_CONV, ids=str)
def test_short_conv_machine_code(case: ShortConv, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing spills, no atomics, hardly any shared memory."""
    from effkern._triton import short_conv as launcher

    calls: dict[str, Any] = {}

    record_kernels(launcher.kernels, calls, monkeypatch, Each)
    batch, channels, length, taps = case.shape
    x = torch.zeros(batch, channels, length, dtype=case.dtype)
    weight = torch.zeros(channels, taps)
    extra = (torch.zeros(channels), torch.zeros(batch, channels, taps - 1)) if case.full else (None, None)
    launcher.short_conv(x, weight, *extra, silu=case.full)
    launcher.short_conv_backward(x, x, weight, *extra, silu=case.full)
    assert len(calls) == (4 if case.full else 3)
    for name, call in calls.items():
        code = inspect(compile_call(call, case.arch), tmp_path)
        label = f"{name} {case}"
        report(label, code, case.arch)
        assert code.stack == 0 and code.local == 0, f"{label} spills: {code.stack} B"
        assert code.shared <= 4096, f"{label} takes {code.shared} B of shared memory"
        assert not atomics(code), f"{label} has atomics"


@dataclass(frozen=True)
class Coupling:
    """A call of the coupling's launcher: streams of a dtype, a sub-block's output of another, and what is asked for."""

    arch: int
    dtype: torch.dtype = torch.bfloat16
    streams: torch.dtype = torch.float32
    q: int | None = None
    keep: float | None = None
    subtract: bool = False
    terms: int = 3  # f, y, x

    def __str__(self) -> str:
        kind = f"{'grid' if self.q else 'plain'}{'-kept' if self.keep else ''}{'-undone' if self.subtract else ''}"
        return f"sm{self.arch}-{TYPES[self.dtype]}-{TYPES[self.streams]}-{self.terms}-{kind}"


COUPLING = [
    *(Coupling(arch, q=14) for arch in SHARED_LIMIT),
    *(Coupling(arch, keep=0.7) for arch in SHARED_LIMIT),
    Coupling(90, q=14, subtract=True, terms=2),
    Coupling(90, q=14, terms=1),
    Coupling(90, torch.float32),
    Coupling(90, torch.float16, torch.float16, subtract=True),
]


@pytest.mark.parametrize("case", COUPLING, ids=str)
def test_coupling_machine_code(case: Coupling, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing spills, no atomics, whole vectors of numbers at a time, and no product fused with a sum, whose bits would
    not be those of the CPU."""
    from effkern._triton import coupling as launcher

    calls: dict[str, Any] = {}
    kernel = launcher.kernels.coupling_kernel
    monkeypatch.setattr(launcher.kernels, "coupling_kernel", Recorder(calls, kernel))
    f = torch.zeros(4, 1024, dtype=case.dtype)
    y, x = (torch.zeros(4, 1024, dtype=case.streams) if there < case.terms else None for there in (1, 2))
    dtype = torch.float32 if case.q or case.dtype != case.streams else case.dtype
    launcher.couple(f, y, x, 0.3, 1.0, case.subtract, case.q, case.keep, dtype)
    built = compile_call(calls["coupling_kernel"], case.arch)
    code = inspect(built, tmp_path)
    report(f"coupling_kernel {case}", code, case.arch)
    assert code.stack == 0 and code.local == 0 and code.shared <= 4096
    assert not atomics(code)
    assert not code.opcodes["FFMA"], "fused products"
    assert ".v4." in built.asm["ptx"], "loads numbers one by one"
