"""CUDA C++ attention on a GPU where there is one, and everywhere on a software model of a thread block that runs the
very same device code on the CPU (tests/cuda_host)."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from effkern import _lib
from effkern.masks import Lowered, Mask
from effkern.reference import attention as reference
from effkern.testing import assert_close_to_oracle

HOST = Path(__file__).parent / "cuda_host"
SOURCES = Path(__file__).parents[1] / "csrc"
L2_BYTES = 40 << 20


@dataclass(frozen=True)
class Case:
    b: int = 1
    hq: int = 1
    hkv: int = 1
    sq: int = 128
    sk: int = 128
    d: int = 64
    dv: int = 64
    causal: bool = False
    top_left: bool = False
    scale: float | None = None
    lengths: tuple[tuple[int, int], ...] | None = None  # packed: (queries, keys) of each sequence
    layout: str = "plain"
    dtype: torch.dtype = torch.bfloat16
    l2_bytes: int = L2_BYTES
    mask: Mask | None = None
    blocks: int = 2  # of a persistent grid

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        sq, sk, batch = self.sq, self.sk, (self.b,)
        if self.lengths is not None:
            sq, sk = (sum(pair[side] for pair in self.lengths) for side in (0, 1))
            batch = ()
        q, k, v = (
            self.lay_out((*batch, *shape))
            for shape in ((self.hq, sq, self.d), (self.hkv, sk, self.d), (self.hkv, sk, self.dv))
        )
        return q, k, v

    def lay_out(self, shape: tuple[int, ...]) -> Tensor:
        if self.layout == "heads last":  # (..., S, H, D) in memory
            return torch.randn(*shape[:-3], shape[-2], shape[-3], shape[-1]).to(self.dtype).transpose(-3, -2)
        if self.layout == "cut out":  # rows inside a wider, longer tensor of NaN
            wide = torch.full((*shape[:-2], shape[-2] + 3, shape[-1] + 16), torch.nan, dtype=self.dtype)
            wide[..., 1:-2, 8:-8] = torch.randn(shape).to(self.dtype)
            return wide[..., 1:-2, 8:-8]
        return torch.randn(shape).to(self.dtype)

    def offsets(self, side: int) -> Tensor | None:
        if self.lengths is None:
            return None
        return torch.tensor([0, *(pair[side] for pair in self.lengths)]).cumsum(0).to(torch.int32)

    def lowered(self) -> Lowered:
        return Lowered() if self.mask is None else self.mask.lower()

    def __str__(self) -> str:
        default = Case()
        changed = {name: value for name, value in vars(self).items() if value != getattr(default, name)}
        return " ".join(f"{name}={value}" for name, value in changed.items()) or "default"


Runner = Callable[[Case, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


# ---- the software model -----------------------------------------------------------------------------------


class Operand(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("bytes", "batch", "head", "token")),
    ]

    @classmethod
    def of(cls, t: Tensor) -> Operand:
        storage = t.untyped_storage()
        extent = storage.data_ptr() + storage.nbytes() - t.data_ptr()
        strides = (0, *t.stride()) if t.dim() == 3 else t.stride()
        return cls(t.data_ptr(), extent, *strides[:3])


class Call(ctypes.Structure):
    _fields_ = [
        *((name, Operand) for name in ("q", "k", "v", "out", "lse")),
        *((name, ctypes.c_void_p) for name in ("cu_seqlens_q", "cu_seqlens_k")),
        *(
            (name, ctypes.c_int)
            for name in ("sequences", "heads", "group", "queries", "keys", "head_dim", "value_dim")
        ),
        *((name, ctypes.c_int) for name in ("bf16", "causal", "top_left")),
        ("scale", ctypes.c_double),
        ("l2_bytes", ctypes.c_int64),
        ("seed", ctypes.c_uint),
    ]


def compile_model(folder: Path, *sources: str) -> ctypes.CDLL:
    """Kernels compiled for the CPU with the software model in place of the instructions."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler for the software model of a thread block")
    library = folder / "model.so"
    command = [compiler, "-std=c++20", "-O2", "-Wall", "-Wno-unknown-pragmas", "-Werror", "-shared", "-fPIC"]
    command += [f"-I{HOST}", f"-I{SOURCES}", "-o", str(library), *(str(HOST / name) for name in sources)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def run_model(
    function: Any, case: Case, q: Tensor, k: Tensor, v: Tensor, *more: ctypes.Structure
) -> tuple[Tensor, Tensor]:
    """(out, lse) of `function(call, more...)`, which returns null or what went wrong."""
    out = torch.full((*q.shape[:-1], case.dv), torch.nan, dtype=case.dtype)
    lse = torch.full(q.shape[:-1], torch.nan)
    cu_q, cu_k = case.offsets(0), case.offsets(1)
    lse_operand = Operand.of(lse[..., None])
    call = Call(
        *(Operand.of(t) for t in (q, k, v, out)),
        lse_operand,
        *(None if cu is None else cu.data_ptr() for cu in (cu_q, cu_k)),
        case.b if case.lengths is None else len(case.lengths),
        *(case.hq, case.hq // case.hkv, q.shape[-2], k.shape[-2], case.d, case.dv),
        *(case.dtype == torch.bfloat16, case.causal, case.top_left),
        case.d**-0.5 if case.scale is None else case.scale,
        case.l2_bytes,
        torch.randint(1 << 31, ()).item(),
    )
    function.restype = ctypes.c_char_p
    error = function(ctypes.byref(call), *(ctypes.byref(part) for part in more))
    assert error is None, error.decode()
    return out, lse


# ---- a GPU ------------------------------------------------------------------------------------------------


def require_gpu(least: tuple[int, int], most: tuple[int, int] = (99, 9)) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if not _lib.status().cuda.loaded:
        pytest.skip(f"CUDA library not loaded: {_lib.status().cuda.reason}")
    capability = torch.cuda.get_device_capability()
    if not least <= capability <= most:
        pytest.skip(f"the GPU's compute capability is {capability[0]}.{capability[1]}")


def to_gpu(t: Tensor) -> Tensor:
    """The strides go with the tensor: a copy of the storage, viewed in the same way."""
    copy = torch.empty(0, dtype=t.dtype, device="cuda")
    return copy.set_(t.untyped_storage().cuda(), t.storage_offset(), t.shape, t.stride())


# ---- what it is compared with -----------------------------------------------------------------------------


Attention = Callable[..., tuple[Tensor, Tensor]]


def _by_sequence(case: Case, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Dense attention, or of each packed sequence by itself."""
    if case.lengths is None:
        return attention(q, k, v)
    sizes = [list(side) for side in zip(*case.lengths, strict=True)]
    parts = zip(q.split(sizes[0], 1), k.split(sizes[1], 1), v.split(sizes[1], 1), strict=True)
    outs, lses = zip(*(attention(*(t[None] for t in part)) for part in parts), strict=True)
    return torch.cat(outs, 2)[0], torch.cat(lses, 2)[0]


def _composition(case: Case, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention as a user writes it, in the dtype of the inputs; lse in float32."""
    group = case.hq // case.hkv
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    sq, sk = q.shape[2], k.shape[2]
    scale = case.d**-0.5 if case.scale is None else case.scale
    align = "top_left" if case.top_left else "bottom_right"
    hidden = torch.zeros(sq, sk, dtype=torch.bool)
    if case.causal:
        hidden = torch.arange(sk) > torch.arange(sq)[:, None] + (0 if case.top_left else sk - sq)
    if case.mask is not None:
        hidden = hidden | ~case.mask.to_dense(sq, sk, heads=case.hq, align=align)
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(hidden, -torch.inf)
    weights = torch.softmax(scores, -1).nan_to_num(0.0) if sk else scores
    exact = (q.float() @ k.float().transpose(-1, -2) * scale).masked_fill(hidden, -torch.inf)
    return weights @ v, torch.logsumexp(exact, -1)


def check(case: Case, runner: Runner) -> None:
    tensors = case.tensors()
    out, lse = runner(case, *tensors)
    oracle = _by_sequence(
        case,
        lambda q, k, v: reference.attention(
            q,
            k,
            v,
            causal=case.causal,
            align="top_left" if case.top_left else "bottom_right",
            scale=case.scale,
            mask=case.lowered(),
        ),
        *(t.double() for t in tensors),
    )
    baseline = _by_sequence(case, partial(_composition, case), *tensors)
    assert_close_to_oracle(out, baseline[0], oracle[0], "out")
    assert_close_to_oracle(lse, baseline[1], oracle[1], "lse")
