"""The CUDA C++ forward against the reference in float64.

On a GPU where there is one, and everywhere on a software model of a thread block that runs the very same
device code on the CPU (tests/cuda_host).
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from effkern import _lib
from effkern.reference import attention as reference
from effkern.testing import assert_close_to_oracle

HOST = Path(__file__).parents[1] / "cuda_host"
SOURCES = Path(__file__).parents[2] / "csrc"
L2_BYTES = 40 << 20

Runner = Callable[["Case", Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


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

    def __str__(self) -> str:
        default = Case()
        changed = {name: value for name, value in vars(self).items() if value != getattr(default, name)}
        return " ".join(f"{name}={value}" for name, value in changed.items()) or "default"


# ---- the two ways to run the kernel -----------------------------------------------------------------------


class _Operand(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("bytes", "batch", "head", "token")),
    ]

    @classmethod
    def of(cls, t: Tensor) -> _Operand:
        storage = t.untyped_storage()
        extent = storage.data_ptr() + storage.nbytes() - t.data_ptr()
        strides = (0, *t.stride()) if t.dim() == 3 else t.stride()
        return cls(t.data_ptr(), extent, *strides[:3])


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, _Operand) for name in ("q", "k", "v", "out", "lse")),
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


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernel compiled for the CPU with the software model in place of the instructions."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler for the software model of a thread block")
    library = tmp_path_factory.mktemp("cuda_host") / "model.so"
    command = [compiler, "-std=c++20", "-O2", "-Wall", "-Wno-unknown-pragmas", "-Werror", "-shared", "-fPIC"]
    command += [f"-I{HOST}", f"-I{SOURCES}", "-o", str(library), *map(str, sorted(HOST.glob("*.cpp")))]
    subprocess.run(command, check=True)
    loaded = ctypes.CDLL(str(library))
    for function in (loaded.model_attention_forward, loaded.check_tile_maps, loaded.check_schedule):
        function.restype = ctypes.c_char_p
    return loaded


def _run_model(loaded: ctypes.CDLL, case: Case, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.full((*q.shape[:-1], case.dv), torch.nan, dtype=case.dtype)
    lse = torch.full(q.shape[:-1], torch.nan)
    cu_q, cu_k = case.offsets(0), case.offsets(1)
    lse_operand = _Operand.of(lse[..., None])
    call = _Call(
        *(_Operand.of(t) for t in (q, k, v, out)),
        lse_operand,
        *(None if cu is None else cu.data_ptr() for cu in (cu_q, cu_k)),
        case.b if case.lengths is None else len(case.lengths),
        *(case.hq, case.hq // case.hkv, q.shape[-2], k.shape[-2], case.d, case.dv),
        *(case.dtype == torch.bfloat16, case.causal, case.top_left),
        case.d**-0.5 if case.scale is None else case.scale,
        case.l2_bytes,
        torch.randint(1 << 31, ()).item(),
    )
    error = loaded.model_attention_forward(ctypes.byref(call))
    assert error is None, error.decode()
    return out, lse


def _run_gpu(case: Case, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    # The strides go with the tensors: a copy of the storage, viewed in the same way.
    q, k, v = (
        torch.empty(0, dtype=t.dtype, device="cuda").set_(
            t.untyped_storage().cuda(), t.storage_offset(), t.shape, t.stride()
        )
        for t in (q, k, v)
    )
    offsets = [None if cu is None else cu.cuda() for cu in (case.offsets(0), case.offsets(1))]
    out, lse = torch.ops.effkern.attention_cuda(q, k, v, *offsets, case.scale, case.causal, case.top_left)
    return out.cpu(), lse.cpu()


@pytest.fixture(params=["model", pytest.param("gpu", marks=pytest.mark.sanitize)])
def runner(request: pytest.FixtureRequest) -> Iterator[Runner]:
    if request.param == "model":
        loaded = request.getfixturevalue("model")
        yield lambda case, q, k, v: _run_model(loaded, case, q, k, v)
        return
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if not _lib.status().cuda.loaded:
        pytest.skip(f"CUDA library not loaded: {_lib.status().cuda.reason}")
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("the GPU is older than compute capability 8.0")
    yield _run_gpu


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
    hidden = torch.zeros(sq, sk, dtype=torch.bool)
    if case.causal:
        shift = 0 if case.top_left else sk - sq
        hidden = torch.arange(sk) > torch.arange(sq)[:, None] + shift
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(hidden, -torch.inf)
    weights = torch.softmax(scores, -1).nan_to_num(0.0) if sk else scores
    exact = (q.float() @ k.float().transpose(-1, -2) * scale).masked_fill(hidden, -torch.inf)
    return weights @ v, torch.logsumexp(exact, -1)


def _check(case: Case, runner: Runner) -> None:
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
        ),
        *(t.double() for t in tensors),
    )
    baseline = _by_sequence(case, partial(_composition, case), *tensors)
    assert_close_to_oracle(out, baseline[0], oracle[0], "out")
    assert_close_to_oracle(lse, baseline[1], oracle[1], "lse")


HEAD_DIMS = [(8, 8), (16, 72), (128, 128), (120, 64), (64, 128), (128, 40)]
LENGTHS = [(1, 1), (1, 300), (65, 64), (127, 129), (128, 128), (129, 1), (200, 330)]
GRID = [
    *(Case(sq=sq, sk=sk, causal=causal) for sq, sk in LENGTHS for causal in (False, True)),
    *(Case(sq=sq, sk=sk, causal=True, top_left=True) for sq, sk in [(129, 70), (70, 200), (200, 330)]),
    *(
        Case(hq=2, sq=65, sk=130, d=d, dv=dv)
        for d, dv in [(8, 8), (16, 72), (128, 128), (120, 64), (64, 128), (128, 40)]
    ),
    *(Case(sq=150, sk=140, d=d, dv=d, causal=True, dtype=torch.float16) for d in (64, 96, 128)),
    *(
        Case(b=2, hq=4, hkv=h, sq=130, sk=70, causal=True, l2_bytes=l2)
        for h in (1, 2)
        for l2 in (0, L2_BYTES)
    ),
    *(Case(b=2, hq=2, hkv=1, sq=67, sk=131, layout=layout) for layout in ("heads last", "cut out")),
    *(Case(sq=70, sk=130, causal=True, scale=scale) for scale in (0.0, -0.3, 1e-30, 8.0)),
    Case(sq=140, sk=0),
    Case(b=3, hq=2, sq=1, sk=200, causal=True),
    Case(hq=2, lengths=((5, 7), (0, 3), (130, 200), (3, 0), (128, 128), (1, 1)), causal=True),
    Case(hq=4, hkv=2, lengths=((0, 0), (257, 60), (0, 9), (64, 64)), d=128, dv=128),
    Case(lengths=((100, 100),), layout="cut out", causal=True, top_left=True, dtype=torch.float16),
]


@pytest.mark.parametrize("case", GRID, ids=str)
def test_matches_the_oracle(case: Case, runner: Runner) -> None:
    _check(case, runner)


@pytest.mark.parametrize("check", ["check_tile_maps", "check_schedule"])
def test_index_maps(check: str, model: ctypes.CDLL) -> None:
    """Swizzle, copy slices and fragments cover a tile once; grid and key tiles equal the mask written out."""
    wrong = getattr(model, check)()
    assert wrong is None, wrong.decode()


def test_same_bits_whatever_the_order_of_threads(model: ctypes.CDLL) -> None:
    case = Case(hq=2, hkv=1, sq=140, sk=200, causal=True)
    tensors = case.tensors()
    first, second = (_run_model(model, case, *tensors) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_keys_beyond_the_sequence_do_not_leak(runner: Runner) -> None:
    """NaN in a neighbouring packed sequence stays there."""
    case = Case(lengths=((70, 70), (70, 70)))
    q, k, v = case.tensors()
    clean = runner(case, q, k, v)
    k[:, 70:] = v[:, 70:] = torch.nan
    out, lse = runner(case, q, k, v)
    assert torch.equal(out[:, :70], clean[0][:, :70]) and torch.equal(lse[:, :70], clean[1][:, :70])
    assert out[:, 70:].isnan().all()


@pytest.mark.parametrize("offsets", [[0, 500, 140], [-5, 70, 140], [0, 100, 60], [0, 70, 100000]])
def test_broken_offsets_read_nothing_outside(offsets: list[int], model: ctypes.CDLL) -> None:
    """Offsets on a GPU are not read before the launch; the kernel stays inside its tensors all the same."""

    class Broken(Case):
        def offsets(self, side: int) -> Tensor | None:
            return torch.tensor(offsets, dtype=torch.int32)

    case = Broken(lengths=((70, 70), (70, 70)))
    _run_model(model, case, *case.tensors())  # the model refuses accesses outside
