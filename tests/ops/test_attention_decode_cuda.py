"""The CUDA C++ decode kernels against the reference in float64.

On a GPU where there is one, and everywhere on a software model of a thread block that runs the very same
device code on the CPU (tests/cuda_host).
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import effkern
from effkern import _lib, backends
from effkern.masks import Lambda, Lowered, Mask, SlidingWindow
from effkern.ops import registry
from effkern.reference.attention_decode import attention_decode as reference
from effkern.testing import assert_close_to_oracle

HOST = Path(__file__).parents[1] / "cuda_host"
SOURCES = Path(__file__).parents[2] / "csrc"
GARBAGE = (-7, 1 << 30, -(1 << 31), (1 << 31) - 1)


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...] = (200,)
    hq: int = 4
    hkv: int = 1
    sq: int = 1
    capacity: int = 0  # at least the longest length
    d: int = 64
    dv: int = 64
    page: int | None = None
    mask: Mask | None = None
    softcap: float = 0.0
    sinks: torch.dtype | None = None
    scale: float | None = None
    layout: str = "plain"
    dtype: torch.dtype = torch.bfloat16
    splits: int = 0  # of the model only; 0: as planned for a device with `multiprocessors`
    multiprocessors: int = 4

    @property
    def bands(self) -> list[int]:
        return list((Lowered() if self.mask is None else self.mask.lower()).bands)

    @property
    def room(self) -> int:
        return max(self.capacity, *self.lengths)

    def read(self) -> Tensor:
        """(B, capacity): the keys that some query sees."""
        keys, lengths = torch.arange(self.room), torch.tensor(self.lengths)[:, None, None]
        position = lengths - self.sq + torch.arange(self.sq)[:, None]
        seen = keys <= position
        bands = self.bands
        for left, right, sink in zip(bands[::3], bands[1::3], bands[2::3], strict=True):
            seen = seen & (keys <= position + right) & ((keys >= position - left) | (keys < sink))
        return seen.any(1)

    def __str__(self) -> str:
        default = Case()
        changed = {name: value for name, value in vars(self).items() if value != getattr(default, name)}
        return " ".join(f"{name}={value}" for name, value in changed.items()) or "default"


@dataclass(frozen=True)
class Inputs:
    q: Tensor
    k: Tensor  # as the kernel gets it, with NaN in all that it must not read
    v: Tensor
    lengths: Tensor
    table: Tensor | None
    sinks: Tensor | None
    exact_k: Tensor  # contiguous and without NaN
    exact_v: Tensor


def _lay_out(t: Tensor, layout: str) -> Tensor:
    if layout == "heads last":  # (B, S, H, D) in memory
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "cut out":  # rows inside a wider, longer tensor of NaN
        wide = t.new_full((*t.shape[:-2], t.shape[-2] + 3, t.shape[-1] + 16), torch.nan)
        wide[..., 1:-2, 8:-8] = t
        return wide[..., 1:-2, 8:-8]
    return t


def _scatter(cache: Tensor, page: int, order: Tensor) -> Tensor:
    """The cache in pages that lie where `order` (B, pages of a sequence) says, NaN elsewhere."""
    b, heads, capacity, dim = cache.shape
    count = order.shape[1]
    room = cache.new_full((b, heads, count * page, dim), torch.nan)
    room[:, :, :capacity] = cache
    pages = cache.new_full((b * count + 3, heads, page, dim), torch.nan)
    pages[order.flatten()] = room.unflatten(2, (count, page)).transpose(1, 2).flatten(0, 1)
    return pages


def make(case: Case) -> Inputs:
    b = len(case.lengths)
    q = torch.randn(b, case.hq, case.sq, case.d).to(case.dtype)
    k = torch.randn(b, case.hkv, case.room, case.d).to(case.dtype)
    v = torch.randn(b, case.hkv, case.room, case.dv).to(case.dtype)
    hidden = ~case.read()[:, None, :, None]
    caches = [t.masked_fill(hidden, torch.nan) for t in (k, v)]
    table = None
    if case.page is not None:
        count = -(-case.room // case.page)
        order = torch.randperm(b * count + 3)[: b * count].reshape(b, count)
        caches = [_scatter(t, case.page, order) for t in caches]
        table = order.to(torch.int32)
        for entry, length in enumerate(case.lengths):
            table[entry, -(-length // case.page) :] = GARBAGE[entry % len(GARBAGE)]
    sinks = None if case.sinks is None else torch.randn(case.hq).to(case.sinks)
    lengths = torch.tensor(case.lengths, dtype=torch.int32)
    laid_out = (_lay_out(t, case.layout) for t in (q, *caches))
    return Inputs(*laid_out, lengths, table, sinks, k, v)


# ---- the two ways to run the kernels ----------------------------------------------------------------------


Runner = Callable[[Case, Inputs], tuple[Tensor, Tensor]]


class _Operand(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
        ("strides", ctypes.c_int64 * 3),
    ]

    @classmethod
    def of(cls, t: Tensor) -> _Operand:
        storage = t.untyped_storage()
        strides = [n * t.element_size() for n in (*t.stride(), 0, 0)[:3]]
        return cls(
            t.data_ptr(), storage.data_ptr() + storage.nbytes() - t.data_ptr(), (ctypes.c_int64 * 3)(*strides)
        )


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, _Operand) for name in ("q", "k", "v", "out", "lse", "values", "tops")),
        *((name, ctypes.c_void_p) for name in ("lengths", "page_table", "sinks")),
        ("bands", ctypes.POINTER(ctypes.c_int64)),
        *((name, ctypes.c_int) for name in ("band_numbers", "sinks_fp32", "bf16")),
        *((name, ctypes.c_int) for name in ("batch", "kv_heads", "group", "queries", "capacity", "pages")),
        *((name, ctypes.c_int) for name in ("page_size", "table_stride", "head_dim", "value_dim")),
        *((name, ctypes.c_int) for name in ("multiprocessors", "splits")),
        *((name, ctypes.c_double) for name in ("scale", "softcap")),
        ("seed", ctypes.c_uint),
        ("planned", ctypes.c_int),
    ]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels compiled for the CPU with the software model in place of the instructions."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler for the software model of a thread block")
    library = tmp_path_factory.mktemp("cuda_host") / "decode.so"
    command = [compiler, "-std=c++20", "-O2", "-Wall", "-Wno-unknown-pragmas", "-Werror", "-shared", "-fPIC"]
    command += [f"-I{HOST}", f"-I{SOURCES}", "-o", str(library), str(HOST / "attention_decode.cpp")]
    subprocess.run(command, check=True)
    loaded = ctypes.CDLL(str(library))
    for name in (
        "model_attention_decode",
        "check_decode_schedule",
        "check_decode_divisor",
        "check_decode_plan",
    ):
        getattr(loaded, name).restype = ctypes.c_char_p
    return loaded


def run_model(
    loaded: ctypes.CDLL, case: Case, given: Inputs, planned: list[int] | None = None
) -> tuple[Tensor, Tensor]:
    out = torch.full((*given.q.shape[:-1], case.dv), torch.nan, dtype=case.dtype)
    lse = torch.full(given.q.shape[:-1], torch.nan)
    most, spare = lse.numel() * max(case.splits, 64), 5
    values = torch.full((most, case.dv), torch.nan)
    tops = torch.full((most + spare, 2), torch.nan)
    bands = case.bands
    paged = given.table is not None
    call = _Call(
        *(_Operand.of(t) for t in (given.q, given.k, given.v, out, lse, values, tops)),
        given.lengths.data_ptr(),
        given.table.data_ptr() if given.table is not None else None,
        None if given.sinks is None else given.sinks.data_ptr(),
        (ctypes.c_int64 * len(bands))(*bands),
        *(len(bands), case.sinks == torch.float32, case.dtype == torch.bfloat16),
        *(len(case.lengths), case.hkv, case.hq // case.hkv, case.sq),
        case.page * given.table.shape[1] if case.page and given.table is not None else given.k.shape[2],
        *(given.k.shape[0], given.k.shape[2], given.table.shape[1] if given.table is not None else 0),
        *(case.d, case.dv, case.multiprocessors, case.splits),
        case.d**-0.5 if case.scale is None else case.scale,
        case.softcap,
        torch.randint(1 << 31, ()).item(),
    )
    error = loaded.model_attention_decode(ctypes.byref(call))
    assert error is None, error.decode()
    assert paged == (call.page_table is not None)
    assert tops[lse.numel() * call.planned :].isnan().all()
    if planned is not None:
        planned.append(call.planned)
    return out, lse


def _run_gpu(case: Case, given: Inputs) -> tuple[Tensor, Tensor]:
    def moved(
        t: Tensor,
    ) -> Tensor:  # the strides go with the tensor: a copy of the storage, viewed in the same way
        storage = t.untyped_storage().cuda()
        return torch.empty(0, dtype=t.dtype, device="cuda").set_(
            storage, t.storage_offset(), t.shape, t.stride()
        )

    q, k, v = (moved(t) for t in (given.q, given.k, given.v))
    others = [None if t is None else t.cuda() for t in (given.lengths, given.table, given.sinks)]
    out, lse = torch.ops.effkern.attention_decode_cuda(
        q, k, v, others[0], others[1], case.scale, case.bands or None, case.softcap, others[2]
    )
    assert backends.last() == "attention_decode:cuda/sm80"
    return out.cpu(), lse.cpu()


@pytest.fixture(params=["model", pytest.param("gpu", marks=pytest.mark.sanitize)])
def runner(request: pytest.FixtureRequest) -> Iterator[Runner]:
    if request.param == "model":
        loaded = request.getfixturevalue("model")
        yield lambda case, given: run_model(loaded, case, given)
        return
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if not _lib.status().cuda.loaded:
        pytest.skip(f"CUDA library not loaded: {_lib.status().cuda.reason}")
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("the GPU is older than compute capability 8.0")
    yield _run_gpu


# ---- what they are compared with --------------------------------------------------------------------------


def _composition(case: Case, given: Inputs) -> tuple[Tensor, Tensor]:
    """Attention as a user writes it, in the dtype of the inputs; lse in float32."""
    group = case.hq // case.hkv
    k, v = (t.repeat_interleave(group, 1) for t in (given.exact_k, given.exact_v))
    scale = case.d**-0.5 if case.scale is None else case.scale
    j, p = (
        torch.arange(case.room),
        given.lengths[:, None, None, None] - case.sq + torch.arange(case.sq)[:, None],
    )
    seen = j <= p
    bands = case.bands
    for left, right, sink in zip(bands[::3], bands[1::3], bands[2::3], strict=True):
        seen = seen & (j <= p + right) & ((j >= p - left) | (j < sink))

    def logits(q: Tensor, k: Tensor) -> Tensor:
        z = q @ k.mT * scale
        z = case.softcap * torch.tanh(z / case.softcap) if case.softcap else z
        z = z.masked_fill(~seen, -torch.inf)
        if given.sinks is None:
            return z
        return torch.cat([z, given.sinks.to(z.dtype)[:, None, None].expand(*z.shape[:-1], 1)], -1)

    weights = logits(given.q, k).softmax(-1).nan_to_num(0.0)[..., : case.room]
    return weights @ v, torch.logsumexp(logits(given.q.float(), k.float()), -1)


def check(case: Case, runner: Runner, given: Inputs | None = None) -> tuple[Tensor, Tensor]:
    given = make(case) if given is None else given
    out, lse = runner(case, given)
    oracle = reference(
        *(t.double() for t in (given.q, given.exact_k, given.exact_v)),
        given.lengths,
        mask=case.mask,
        scale=case.scale,
        softcap=case.softcap,
        sink_logits=None if given.sinks is None else given.sinks.double(),
    )
    baseline = _composition(case, given)
    assert_close_to_oracle(out, baseline[0], oracle[0], "out")
    assert_close_to_oracle(lse, baseline[1], oracle[1], "lse")
    return out, lse


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
MASKS = [
    SlidingWindow(40, 0),
    Lambda(5, 20),
    Lambda(60, 33),
    SlidingWindow(70, 3) & Lambda(9, 100),
    SlidingWindow(None, 0) & Lambda(17, 18) & SlidingWindow(150, None) & Lambda(30, 8) & Lambda(1, 190),
]
RAGGED = (300, 0, 1, 33)
GRID = [
    *(Case(lengths=(n,)) for n in (0, 1, 15, 16, 17, 63, 64, 65, 300)),
    *(Case(lengths=RAGGED, page=page) for page in (1, 7, 16, 64, 100)),
    *(Case(lengths=RAGGED, page=page, capacity=1000, splits=splits) for page in (None, 48, 50) for splits in (1, 3, 9)),
    *(Case(lengths=(90, 5), sq=sq, hq=2 * group, hkv=2) for sq, group in [(2, 1), (3, 5), (8, 1), (5, 16), (8, 16)]),
    *(Case(lengths=(130, 40), sq=sq, hq=8, page=16, mask=mask) for sq in (1, 6) for mask in MASKS),
    *(Case(lengths=(230, 7), hq=8, sq=3, page=11, mask=mask, d=128, dv=128, splits=4) for mask in MASKS),
    *(
        Case(lengths=(110, 20), d=d, dv=dv, dtype=dtype, hq=hq, sq=sq)
        for d, dv in [(64, 64), (96, 96), (128, 128), (256, 256), (8, 8), (40, 88), (192, 128), (120, 64), (72, 200)]
        for dtype, hq, sq in [(BF16, 5, 1), (FP16, 8, 4)]
    ),
    *(Case(lengths=(77, 150), hkv=2, d=128, dv=72, layout=layout, page=page)
      for layout in ("heads last", "cut out") for page in (None, 16, 9)),
    *(Case(lengths=(100,), scale=scale) for scale in (0.0, -0.3, 1e-30, 8.0)),
    *(Case(lengths=(100, 0), hq=6, hkv=2, sq=2, sinks=sinks, dtype=dtype, splits=splits)
      for sinks, dtype in [(FP32, BF16), (BF16, BF16), (FP16, FP16)] for splits in (1, 2)),
    *(Case(lengths=(100, 60), softcap=cap, scale=scale, dtype=FP16)
      for cap, scale in [(5.0, None), (50.0, 2.0), (1e-3, 0.5)]),
    Case(lengths=(120,), softcap=7.0, sinks=FP32, mask=Lambda(3, 50), page=5, sq=4, hq=8, hkv=2, d=96, dv=96),
]  # fmt: skip


@pytest.mark.parametrize("case", GRID, ids=str)
def test_matches_the_oracle(case: Case, runner: Runner) -> None:
    check(case, runner)


@settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_cache(data: st.DataObject, runner: Runner) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))
    capacity, hkv = draw(st.integers(1, 260)), draw(st.integers(1, 2))
    dims = st.sampled_from([8, 24, 64, 96, 104, 128, 136, 256])
    check(
        Case(
            lengths=tuple(draw(st.lists(st.integers(0, capacity), min_size=1, max_size=2))),
            hq=hkv * draw(st.sampled_from([1, 2, 3, 7, 16])),
            hkv=hkv,
            sq=draw(st.integers(1, 8)),
            capacity=capacity,
            d=draw(dims),
            dv=draw(dims),
            page=draw(st.one_of(st.none(), st.sampled_from([1, 16, 32, 100]), st.integers(1, 70))),
            mask=draw(st.sampled_from([None, *MASKS])),
            softcap=draw(st.sampled_from([0.0, 3.0])),
            sinks=draw(st.sampled_from([None, FP32])),
            dtype=draw(st.sampled_from([BF16, FP16])),
            splits=draw(st.integers(0, 6)),
        ),
        runner,
    )


@pytest.mark.parametrize("name", ["schedule", "divisor", "plan"])
def test_host_side(name: str, model: ctypes.CDLL) -> None:
    """Walks and parts equal the mask written out, divisions are exact, the split is the best of all by trial."""
    wrong = getattr(model, f"check_decode_{name}")()
    assert wrong is None, wrong.decode()


def test_split_follows_the_device(model: ctypes.CDLL) -> None:
    planned: list[int] = []
    for multiprocessors, batch in ((1, 1), (8, 1), (8, 2), (8, 16)):
        case = Case(lengths=(16,) * batch, capacity=2000, multiprocessors=multiprocessors)
        run_model(model, case, make(case), planned)
    assert planned[0] < planned[1] and planned[1] > planned[2] > planned[3] == 1


def test_same_bits_whatever_the_order_of_threads(model: ctypes.CDLL) -> None:
    case = Case(lengths=(333, 90), hq=8, sq=3, page=10, splits=5)
    given = make(case)
    first, second = (run_model(model, case, given) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_row_of_nothing_is_zero(runner: Runner) -> None:
    """More queries than keys: the first see nothing, or only the sink."""
    case = Case(lengths=(2, 0), sq=5, hq=2, splits=2, capacity=200)
    out, lse = runner(case, make(case))
    assert (out[0, :, :3] == 0).all() and (lse[0, :, :3] == -torch.inf).all() and (out[1] == 0).all()
    assert lse[0, :, 3:].isfinite().all()
    with_sinks = make(replace(case, sinks=FP32))
    out, lse = runner(replace(case, sinks=FP32), with_sinks)
    assert (out[0, :, :3] == 0).all()
    assert with_sinks.sinks is not None
    torch.testing.assert_close(lse[0, :, :3], with_sinks.sinks[:, None].expand(2, 3))


@pytest.mark.parametrize("splits", [1, 3])
def test_nan_in_a_visible_key_shows(splits: int, runner: Runner) -> None:
    case = Case(lengths=(100, 100), hkv=2, splits=splits)
    given = make(case)
    clean = runner(case, given)
    given.k[0, 1, 50, 3] = torch.nan
    out, lse = runner(case, given)
    assert out[0, 2:].isnan().all() and lse[0, 2:].isnan().all()
    assert torch.equal(out[0, :2], clean[0][0, :2]) and torch.equal(out[1], clean[0][1])


@pytest.mark.parametrize("page", [None, 16, 5])
@pytest.mark.parametrize("lengths", [(-5, 1 << 30), (-(1 << 31), (1 << 31) - 1), (61, 200)])
def test_wrong_lengths_and_pages_read_nothing_outside(
    lengths: tuple[int, int], page: int | None, model: ctypes.CDLL
) -> None:
    """They are on the device and not checked before the launch; the kernels stay inside their tensors all the same."""
    case = Case(lengths=(60, 60), page=page, mask=Lambda(20, 30), splits=2)
    given = make(case)
    given.lengths.copy_(torch.tensor(lengths))
    if given.table is not None:
        given.table[:, ::2] = torch.tensor(GARBAGE[:2], dtype=torch.int32)[:, None]
    run_model(model, case, given)  # the model refuses accesses outside


# ---- how the dispatcher chooses ---------------------------------------------------------------------------


def test_is_never_the_automatic_choice() -> None:
    spec = registry.get("attention_decode")
    (backend,) = (b for b in spec.backends if b.name == "cuda")
    assert not backend.automatic and "unverified" in backend.note


def test_says_why_it_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from effkern.ops import attention_decode as op

    def why(dtype: torch.dtype = BF16, d: int = 128, dv: int = 128, bands: int = 0) -> str | None:
        return op._cuda_refusal("cuda", dtype, {"head_dim": d, "value_dim": dv, "bands": bands})

    monkeypatch.setattr(op, "_CUDA_MISSING", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert why() is None and why(FP16, 256, 8, 4) is None
    assert "bfloat16 and float16, not float32" in str(why(FP32))
    assert "multiples of 8 up to 256, got 100 and 128" in str(why(d=100)) and "got 128 and 264" in str(
        why(dv=264)
    )
    assert "up to 4 windows, got 5" in str(why(bands=5))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "compute capability 8.0 or later, not 7.5" in str(why())
    monkeypatch.setattr(op, "_CUDA_MISSING", True)
    assert "the CUDA library is not loaded" in str(why())


def test_asked_for_on_the_cpu() -> None:
    q, cache = torch.zeros(1, 2, 1, 64, dtype=BF16), torch.zeros(1, 1, 8, 64, dtype=BF16)
    with pytest.raises(backends.Unavailable, match="it runs on cuda; would work: cpu"):
        effkern.attention_decode(q, cache, cache, torch.tensor([8], dtype=torch.int32), backend="cuda")
