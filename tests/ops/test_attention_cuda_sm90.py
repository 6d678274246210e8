"""The CUDA C++ forward of sm_90a against the reference in float64."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch
from cuda_masks import masks_of
from cuda_model import Case, Runner, check, compile_model, require_gpu, run_model, to_gpu
from torch import Tensor

from effkern.masks import BlockSparse, Document, Lambda, Lowered, Mask, ShiftedGroups, SlidingWindow
from effkern.ops import _attention_cuda as cuda_kernels
from effkern.ops._attention_options import Options

# Padded head dimension -> (queries, keys) of a tile, full and masked (csrc/attention/forward_sm90_launch.h).
TILES = {64: (192, 128, 128), 96: (128, 128, 128), 128: (128, 176, 128), 256: (128, 80, 80)}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compile_model(tmp_path_factory.mktemp("sm90"), "attention_forward_sm90.cpp")


def _run_model(model: ctypes.CDLL, case: Case, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    padded = next(width for width in TILES if max(case.d, case.dv) <= width)
    queries, unmasked, masked = TILES[padded]
    keys = masked if case.causal or case.mask is not None else unmasked
    masks, _memory = masks_of(case, padded, queries, keys)
    return run_model(model.model_attention_forward_sm90, case, q, k, v, masks)


def _run_gpu(case: Case, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    import effkern

    with effkern.backends.force("cuda"):
        out, lse = effkern.attention(
            *map(to_gpu, (q, k, v)),
            causal=case.causal,
            align="top_left" if case.top_left else "bottom_right",
            scale=case.scale,
            mask=case.mask,
            return_lse=True,
            **{
                name: None if cu is None else cu.cuda()
                for name, cu in (("cu_seqlens_q", case.offsets(0)), ("cu_seqlens_k", case.offsets(1)))
            },
        )
    assert effkern.backends.last() == "attention:cuda/sm90"
    return out.cpu(), lse.cpu()


@pytest.fixture(params=["model", pytest.param("gpu", marks=pytest.mark.sanitize)])
def runner(request: pytest.FixtureRequest) -> Iterator[Runner]:
    if request.param == "model":
        model = request.getfixturevalue("model")
        yield lambda case, *tensors: _run_model(model, case, *tensors)
        return
    require_gpu((9, 0), (9, 0))
    yield _run_gpu


LENGTHS = [(1, 1), (1, 300), (65, 64), (191, 129), (192, 128), (193, 1), (400, 330)]
PACKED = ((5, 7), (0, 3), (130, 200), (3, 0), (192, 128), (1, 1))
WINDOW, LAMBDA, GROUPS = SlidingWindow(70, 30), Lambda(sink=9, window=150), ShiftedGroups(96)


def layout(*shape: int, density: float = 0.4) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))) < density


GRID = [
    *(Case(sq=sq, sk=sk, causal=causal) for sq, sk in LENGTHS for causal in (False, True)),
    *(Case(sq=sq, sk=sk, causal=True, top_left=True) for sq, sk in [(129, 70), (70, 200), (200, 330)]),
    *(
        Case(hq=2, sq=140, sk=400, d=d, dv=dv)
        for d, dv in [(8, 8), (16, 72), (96, 96), (88, 40), (128, 128), (120, 64), (256, 200)]
    ),
    *(Case(sq=150, sk=300, d=d, dv=d, causal=True, dtype=torch.float16) for d in (64, 96, 128, 256)),
    *(Case(b=2, hq=4, hkv=h, sq=200, sk=300, causal=True, l2_bytes=l2) for h in (1, 2) for l2 in (0, 1 << 20)),
    *(Case(b=2, hq=2, hkv=1, sq=67, sk=331, layout=layout) for layout in ("heads last", "cut out")),
    *(Case(sq=70, sk=200, causal=True, scale=scale) for scale in (0.0, -0.3, 1e-30, 8.0)),
    Case(sq=140, sk=0),
    Case(b=3, hq=2, sq=1, sk=200, causal=True),
    Case(hq=3, sq=600, sk=600, causal=True, blocks=4),
    Case(hq=2, lengths=PACKED, causal=True),
    Case(hq=4, hkv=2, lengths=((0, 0), (257, 60), (0, 9), (64, 64)), d=128, dv=128),
    Case(lengths=((100, 100),), layout="cut out", causal=True, top_left=True, dtype=torch.float16),
    *(Case(hq=2, sq=330, sk=500, mask=mask, causal=causal) for mask in (WINDOW, LAMBDA, GROUPS)
      for causal in (False, True)),
    *(Case(hq=2, sq=500, sk=330, mask=mask, top_left=left) for mask in (WINDOW, LAMBDA, GROUPS)
      for left in (False, True)),
    *(Case(hq=2, lengths=PACKED, mask=mask, d=128, dv=128) for mask in (WINDOW, LAMBDA, GROUPS)),
    Case(sq=300, sk=900, mask=SlidingWindow(300, 0) & ShiftedGroups(200), d=128, dv=128),
    *(Case(b=2, hq=2, sq=300, sk=400, mask=BlockSparse(layout(b, h, -(-300 // block), -(-400 // block)), block),
           causal=causal)
      for b, h, block, causal in ((1, 1, 16, False), (2, 1, 48, True), (1, 2, 128, False), (2, 2, 64, True))),
    Case(hq=2, sq=300, sk=400, d=256, dv=256, mask=BlockSparse(layout(1, 2, 5, 7), 64)),
]  # fmt: skip


@pytest.mark.parametrize("case", GRID, ids=str)
def test_matches_the_oracle(case: Case, runner: Runner) -> None:
    check(case, runner)


def test_same_bits_whatever_the_order_of_threads(model: ctypes.CDLL) -> None:
    case = Case(hq=2, hkv=1, sq=250, sk=500, causal=True, d=128, dv=128)
    tensors = case.tensors()
    first, second = (_run_model(model, case, *tensors) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dim", [64, 256])
def test_keys_beyond_the_sequence_do_not_leak(dim: int, runner: Runner) -> None:
    """NaN in a neighbouring packed sequence stays there."""
    case = Case(lengths=((70, 70), (200, 200)), d=dim, dv=dim)
    q, k, v = case.tensors()
    clean = runner(case, q, k, v)
    q[:, 70:] = k[:, 70:] = v[:, 70:] = torch.nan
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


# ---- which kernel serves what -----------------------------------------------------------------------------


def _request(mask: Mask | None = None, causal: bool = False, **terms: object) -> dict[str, int]:
    lowered = Lowered() if mask is None else mask.lower()
    q = torch.zeros(1, 2, 256, 64, dtype=torch.bfloat16)
    return cuda_kernels.sizes_of(q, q, Options(causal=causal, **(lowered._asdict() | terms)))


@pytest.mark.parametrize(
    ("capability", "request_", "chosen"),
    [
        ((9, 0), _request(causal=True), "sm90"),
        ((9, 0), _request(Lambda(4, 64), causal=True), "sm90"),
        ((9, 0), _request(BlockSparse(layout(1, 1, 4, 4), 64) & SlidingWindow(64, 0)), "sm90"),
        ((8, 0), _request(causal=True), "sm80"),
        ((12, 0), _request(), "sm80"),
        ((8, 0), _request(SlidingWindow(64, 0)), "sm80: it takes no bands"),
        ((7, 5), _request(), "this GPU has 7.5"),
        ((9, 0), _request(softcap=30.0), "it takes no softcap"),
        ((9, 0), _request(Lambda(4, 64) & SlidingWindow(9, 9)), "its masks are one window"),
        ((9, 0), _request(Document(torch.zeros(256, dtype=torch.int64))), "it takes no ids"),
        ((9, 0), _request() | {"head_dim": 36}, "multiples of 8 up to 256 as head_dim, not 36"),
    ],
)
def test_kernels_say_what_they_can_do(
    capability: tuple[int, int], request_: dict[str, int], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    found = cuda_kernels.choose(None, torch.bfloat16, request_)
    if isinstance(found, str):
        assert chosen in found
    else:
        assert found.name == chosen


def test_tile_shapes_of_stored_lists_are_the_kernels() -> None:
    assert {width: cuda_kernels.forward_tile(width) for width in TILES} == {
        width: (queries, masked) for width, (queries, _, masked) in TILES.items()
    }
