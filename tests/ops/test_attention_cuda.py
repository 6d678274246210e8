"""The CUDA C++ forward of sm_80 against the reference in float64."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from cuda_model import L2_BYTES, Case, Runner, check, compile_model, require_gpu, run_model, to_gpu
from torch import Tensor


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compile_model(tmp_path_factory.mktemp("sm80"), "attention_forward.cpp", "index_maps.cpp")


def _run_gpu(case: Case, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    offsets = [None if cu is None else cu.cuda() for cu in (case.offsets(0), case.offsets(1))]
    out, lse = torch.ops.effkern.attention_cuda_sm80(
        *map(to_gpu, (q, k, v)), *offsets, case.scale, case.causal, case.top_left
    )
    return out.cpu(), lse.cpu()


@pytest.fixture(params=["model", pytest.param("gpu", marks=pytest.mark.sanitize)])
def runner(request: pytest.FixtureRequest) -> Iterator[Runner]:
    if request.param == "model":
        yield partial(run_model, request.getfixturevalue("model").model_attention_forward)
        return
    require_gpu((8, 0))
    yield _run_gpu


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
    check(case, runner)


@pytest.mark.parametrize("check", ["check_tile_maps", "check_schedule", "check_key_steps"])
def test_index_maps(check: str, model: ctypes.CDLL) -> None:
    """Swizzle, copy slices and fragments cover a tile once; grid and key tiles equal the mask written out."""
    function = getattr(model, check)
    function.restype = ctypes.c_char_p
    wrong = function()
    assert wrong is None, wrong.decode()


def test_same_bits_whatever_the_order_of_threads(model: ctypes.CDLL) -> None:
    case = Case(hq=2, hkv=1, sq=140, sk=200, causal=True)
    tensors = case.tensors()
    first, second = (run_model(model.model_attention_forward, case, *tensors) for _ in range(2))
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
    run_model(model.model_attention_forward, case, *case.tensors())  # the model refuses accesses outside
