"""The CUDA C++ backward of sm_90a against the reference in float64."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import pytest
import torch
from cuda_masks import Lists, masks_of, stored_lists
from cuda_model import Call, Case, Operand, compile_model
from torch import Tensor

from effkern.masks import BlockSparse, Lambda, ShiftedGroups, SlidingWindow
from effkern.ops import _attention_cuda as cuda_kernels
from effkern.reference import attention as reference
from effkern.testing import assert_close_to_oracle

# Padded head dimension -> tiles of the two kernels (csrc/attention/backward_sm90_launch.h): keys kept and queries
# walked over, queries kept and keys walked over.
TILES = {64: (128, 96, 128, 128), 96: (128, 80, 128, 128), 128: (128, 64, 128, 128), 256: (64, 64, 128, 64)}


class Gradients(ctypes.Structure):
    _fields_ = [(name, Operand) for name in ("out", "lse", "delta", "q", "k", "v")]


class Kernels(ctypes.Structure):
    _fields_ = [
        ("by_key", Lists),
        *((name, ctypes.c_int) for name in ("head_dim", "queries", "keys", "adds")),
    ]


class Given(NamedTuple):
    """A forward's inputs and results, and the gradients of the results."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    grad_out: Tensor
    grad_lse: Tensor | None


class Gradient(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    delta: Tensor


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compile_model(tmp_path_factory.mktemp("sm90_backward"), "attention_backward_sm90.cpp")


def _options(case: Case) -> dict:
    return dict(
        causal=case.causal,
        align="top_left" if case.top_left else "bottom_right",
        scale=case.scale,
        mask=case.lowered(),
        cu_seqlens_q=case.offsets(0),
        cu_seqlens_k=case.offsets(1),
    )


def given(case: Case, with_lse: bool = False) -> Given:
    """Results rounded as a forward's; gradients laid out as the inputs are."""
    q, k, v = case.tensors()
    out, lse = reference.attention(*(t.double() for t in (q, k, v)), **_options(case))
    grad_out = case.lay_out(tuple(out.shape))
    grad_lse = torch.randn(lse.shape) if with_lse else None
    return Given(q, k, v, out.to(case.dtype), lse.float(), grad_out, grad_lse)


def _rows(t: Tensor | None) -> Operand:
    return Operand() if t is None else Operand.of(t[..., None])


def run_model(model: ctypes.CDLL, case: Case, g: Given, adds: bool = False) -> Gradient:
    """With `adds` the variant whose first kernel adds up the gradient of q."""
    padded = next(width for width in TILES if max(case.d, case.dv) <= width)
    kept_keys, queries, kept_queries, keys = TILES[padded]
    if adds:
        queries = 64
    masks, memory = masks_of(case, padded, kept_queries, keys)
    kernels = Kernels(head_dim=padded, queries=queries, keys=keys, adds=adds)
    if case.lowered().layout is not None:
        kernels.by_key, more = stored_lists(case, queries, kept_keys, by_key=True)
        memory += more
    cu_q, cu_k = case.offsets(0), case.offsets(1)
    call = Call(
        *(Operand.of(t) for t in (g.q, g.k, g.v, g.out)),
        _rows(g.lse),
        *(None if cu is None else cu.data_ptr() for cu in (cu_q, cu_k)),
        case.b if case.lengths is None else len(case.lengths),
        *(case.hq, case.hq // case.hkv, g.q.shape[-2], g.k.shape[-2], case.d, case.dv),
        *(case.dtype == torch.bfloat16, case.causal, case.top_left),
        case.d**-0.5 if case.scale is None else case.scale,
        case.l2_bytes,
        torch.randint(1 << 31, ()).item(),
    )
    # Gradients of what no sequence holds stay NaN.
    result = Gradient(
        *(torch.full_like(t, torch.nan) for t in (g.q, g.k, g.v)), torch.full_like(g.lse, torch.nan)
    )
    grads = Gradients(
        Operand.of(g.grad_out), _rows(g.grad_lse), _rows(result.delta), *(Operand.of(t) for t in result[:3])
    )
    function = model.model_attention_backward_sm90
    function.restype = ctypes.c_char_p
    error = function(*(ctypes.byref(part) for part in (call, grads, masks, kernels)))
    assert error is None, error.decode()
    return result


def _closed_form(case: Case, g: Given, dtype: torch.dtype) -> Gradient:
    """The reference's backward. In the kernels' dtype it rounds where a composition of PyTorch operations would."""
    *grads, _, delta = reference.attention_backward(
        *(None if t is None else t.to(dtype) for t in (g.grad_out, g.grad_lse, *g[:5])), **_options(case)
    )
    return Gradient(*grads, delta)


def _composition(case: Case, g: Given) -> Gradient:
    """Autograd through attention as a user writes it, in the dtype of the inputs."""
    group = case.hq // case.hkv
    q, k, v = (t.detach().clone().requires_grad_() for t in g[:3])
    sizes = [(g.q.shape[-2], g.k.shape[-2])] if case.lengths is None else list(case.lengths)
    scale = case.d**-0.5 if case.scale is None else case.scale
    outs, lses = [], []
    at_q = at_k = 0
    for sq, sk in sizes:
        parts = q[..., at_q : at_q + sq, :], k[..., at_k : at_k + sk, :], v[..., at_k : at_k + sk, :]
        at_q, at_k = at_q + sq, at_k + sk
        part_k, part_v = (t.repeat_interleave(group, -3) for t in parts[1:])
        seen = torch.ones(sq, sk, dtype=torch.bool)
        if case.causal:
            seen = torch.arange(sk) <= torch.arange(sq)[:, None] + (0 if case.top_left else sk - sq)
        if case.mask is not None:
            align = "top_left" if case.top_left else "bottom_right"
            dense = case.mask.to_dense(sq, sk, heads=case.hq, align=align)
            seen = seen & (dense if case.lengths is None or dense.dim() < 4 else dense[0])
        scores = (parts[0] @ part_k.mT * scale).masked_fill(~seen, torch.finfo(case.dtype).min)
        weights = torch.softmax(scores, -1).masked_fill(~seen, 0.0) if sk else scores
        outs.append(weights @ part_v)
        if g.grad_lse is not None:
            lses.append(torch.logsumexp(scores.float(), -1) * seen.any(-1))
    results, gradients = [torch.cat(outs, -2)], [g.grad_out]
    if g.grad_lse is not None:
        results.append(torch.cat(lses, -1))
        gradients.append(g.grad_lse)
    torch.autograd.backward(results, gradients)
    found = [t.grad if t.grad is not None else torch.zeros_like(t) for t in (q, k, v)]
    delta = (g.grad_out * results[0].detach()).sum(-1).float()
    return Gradient(*found, delta if g.grad_lse is None else delta - g.grad_lse)


def check(model: ctypes.CDLL, case: Case, with_lse: bool = False, adds: bool = False) -> None:
    g = given(case, with_lse)
    mine, baseline = run_model(model, case, g, adds), _composition(case, g)
    oracle = _closed_form(case, g, torch.float64)
    terms = max(1.0, float(oracle.delta.abs().amax())) if oracle.delta.numel() else 1.0
    for name in Gradient._fields:
        # dS is a difference of sums of this size.
        unit = 1.0 if name == "v" else terms
        assert_close_to_oracle(
            *(getattr(gradient, name) for gradient in (mine, baseline, oracle)), name, unit=unit
        )


LENGTHS = [(1, 1), (1, 300), (300, 1), (65, 64), (127, 129), (128, 128), (129, 127), (300, 230)]
PACKED = ((5, 7), (0, 3), (130, 200), (3, 0), (192, 128), (1, 1))
WINDOW, LAMBDA, GROUPS = SlidingWindow(70, 30), Lambda(sink=9, window=150), ShiftedGroups(96)


def layout(*shape: int, density: float = 0.4) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))) < density


GRID = [
    *(Case(sq=sq, sk=sk, causal=causal) for sq, sk in LENGTHS for causal in (False, True)),
    *(Case(sq=sq, sk=sk, causal=True, top_left=True) for sq, sk in [(129, 70), (70, 200)]),
    *(
        Case(hq=2, sq=140, sk=200, d=d, dv=dv)
        for d, dv in [(8, 8), (16, 72), (96, 96), (88, 40), (128, 128), (120, 64), (256, 200), (64, 136)]
    ),
    *(Case(sq=150, sk=210, d=d, dv=d, causal=True, dtype=torch.float16) for d in (64, 96, 128, 256)),
    *(Case(b=2, hq=4, hkv=h, sq=200, sk=150, causal=True, l2_bytes=l2) for h in (1, 2) for l2 in (0, 1 << 20)),
    *(Case(b=2, hq=2, hkv=1, sq=67, sk=331, layout=layout) for layout in ("heads last", "cut out")),
    *(Case(sq=70, sk=200, causal=True, scale=scale) for scale in (0.0, -0.3, 1e-30, 4.0)),
    Case(sq=140, sk=0),
    Case(b=3, hq=2, sq=1, sk=200, causal=True),
    Case(hq=3, sq=400, sk=400, causal=True, blocks=4),
    Case(hq=2, lengths=PACKED, causal=True),
    Case(hq=4, hkv=2, lengths=((0, 0), (257, 60), (0, 9), (64, 64)), d=128, dv=128),
    Case(hq=2, hkv=1, lengths=((70, 90), (64, 64)), d=256, dv=256),
    Case(lengths=((100, 100),), layout="cut out", causal=True, top_left=True, dtype=torch.float16),
    *(Case(hq=2, sq=330, sk=400, mask=mask, causal=causal) for mask in (WINDOW, LAMBDA, GROUPS)
      for causal in (False, True)),
    *(Case(hq=2, hkv=1, sq=400, sk=330, mask=mask, top_left=left, d=128, dv=128) for mask in (WINDOW, LAMBDA, GROUPS)
      for left in (False, True)),
    *(Case(hq=2, lengths=PACKED, mask=mask, d=128, dv=128) for mask in (WINDOW, LAMBDA, GROUPS)),
    Case(sq=300, sk=500, mask=SlidingWindow(300, 0) & ShiftedGroups(200), d=128, dv=128),
    *(Case(b=2, hq=2, sq=300, sk=400, mask=BlockSparse(layout(b, h, -(-300 // block), -(-400 // block)), block),
           causal=causal)
      for b, h, block, causal in ((1, 1, 16, False), (2, 1, 48, True), (1, 2, 128, False), (2, 2, 64, True))),
    Case(hq=2, hkv=1, sq=200, sk=300, d=128, dv=128, mask=BlockSparse(layout(1, 2, 7, 10), 32)),
    Case(sq=130, sk=200, d=256, dv=256, mask=BlockSparse(layout(1, 1, 3, 4), 64)),
]  # fmt: skip


@pytest.mark.parametrize("case", GRID, ids=str)
def test_matches_the_oracle(case: Case, model: ctypes.CDLL) -> None:
    check(model, case)


# Those whose padded head dimension has a variant that adds up the gradient of q.
ADDED = [case for case in GRID if not 64 < max(case.d, case.dv) <= 96 and max(case.d, case.dv) <= 128]


@pytest.mark.parametrize("case", ADDED, ids=str)
def test_added_up_gradient_matches_the_oracle(case: Case, model: ctypes.CDLL) -> None:
    check(model, case, adds=True)


@pytest.mark.parametrize(
    "case",
    [Case(hq=2, sq=150, sk=100, causal=True), Case(lengths=PACKED, d=128, dv=128, mask=WINDOW)],
    ids=str,
)
def test_gradient_of_lse(case: Case, model: ctypes.CDLL) -> None:
    check(model, case, with_lse=True)


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_same_bits_whatever_the_order_of_threads(dim: int, model: ctypes.CDLL) -> None:
    case = Case(hq=2, hkv=1, sq=250, sk=300, causal=True, d=dim, dv=dim)
    g = given(case)
    first, second = (run_model(model, case, g) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("dim", "adds"), [(64, False), (96, False), (256, False), (64, True), (128, True)])
def test_neighbouring_sequences_do_not_leak(dim: int, adds: bool, model: ctypes.CDLL) -> None:
    """NaN in a neighbouring packed sequence stays there, whether it comes before or after."""
    case = Case(lengths=((40, 50), (70, 70), (90, 100)), d=dim, dv=dim)
    g = given(case)
    clean = run_model(model, case, g, adds)
    for own in (slice(0, 40), slice(110, 200)):
        for t in (g.q, g.out, g.grad_out):
            t[:, own] = torch.nan
        g.lse[:, own] = torch.nan
    for own in (slice(0, 50), slice(120, 220)):
        for t in (g.k, g.v):
            t[:, own] = torch.nan
    found = run_model(model, case, g, adds)
    for name, own in (
        ("q", slice(40, 110)),
        ("k", slice(50, 120)),
        ("v", slice(50, 120)),
        ("delta", slice(40, 110)),
    ):
        assert torch.equal(getattr(found, name)[:, own], getattr(clean, name)[:, own]), name
        assert getattr(found, name)[:, own.stop :].isnan().all()


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("offsets", [[0, 500, 140], [-5, 70, 140], [0, 100, 60], [0, 70, 100000]])
def test_broken_offsets_touch_nothing_outside(offsets: list[int], adds: bool, model: ctypes.CDLL) -> None:
    """Offsets on a GPU are not read before the launch; the kernels stay inside their tensors all the same."""

    class Broken(Case):
        def offsets(self, side: int) -> Tensor | None:
            return torch.tensor(offsets, dtype=torch.int32)

    g = given(Case(lengths=((70, 70), (70, 70))))
    run_model(model, Broken(lengths=((70, 70), (70, 70))), g, adds)  # the model refuses accesses outside


def test_walk_over_queries_is_the_definition(model: ctypes.CDLL) -> None:
    model.check_query_steps.restype = ctypes.c_char_p
    error = model.check_query_steps(14)
    assert error is None, error.decode()


@pytest.mark.parametrize("deterministic", [True, False])
def test_tiles_of_stored_lists_are_the_kernels(deterministic: bool) -> None:
    for width, (kept_keys, queries, kept_queries, keys) in TILES.items():
        tiles = cuda_kernels.backward_tiles(width, deterministic)
        adds = not deterministic and width in (64, 128)
        assert tiles.by_query == (kept_queries, keys)
        assert tiles.by_key == (64 if adds else queries, kept_keys)
