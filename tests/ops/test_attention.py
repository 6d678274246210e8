"""Attention against the reference in float64: outputs, lse and every gradient, on every path of the machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import effkern
from effkern.reference import attention as reference
from effkern.testing import assert_close_to_oracle, errors, floor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Case:
    b: int = 1
    hq: int = 2
    hkv: int = 1
    sq: int = 16
    sk: int = 16
    d: int = 16
    dv: int = 16
    causal: bool = False
    align: str = "bottom_right"
    scale: float | None = None
    lengths: tuple[tuple[int, int], ...] | None = None  # packed: (queries, keys) of each sequence
    layout: tuple[str, str, str, str] = ("plain",) * 4  # of q, k, v and the gradient of out

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        b = () if self.lengths is not None else (self.b,)
        sq, sk = self.sq, self.sk
        if self.lengths is not None:
            sq, sk = (sum(pair[side] for pair in self.lengths) for side in (0, 1))
        return (*b, self.hq, sq, self.d), (*b, self.hkv, sk, self.d), (*b, self.hkv, sk, self.dv)

    def options(self, device: str) -> dict[str, Any]:
        options: dict[str, Any] = {"causal": self.causal, "align": self.align, "scale": self.scale}
        if self.lengths is not None:
            for side, name in enumerate(("cu_seqlens_q", "cu_seqlens_k")):
                ends = torch.tensor([0, *(pair[side] for pair in self.lengths)]).cumsum(0)
                options[name] = ends.to(device, torch.int32)
        return options


def lay_out(shape: tuple[int, ...], layout: str) -> Tensor:
    """Random numbers in float64 with strides that users have."""
    if layout == "heads last":  # (..., S, H, D) in memory
        return torch.randn(*shape[:-3], shape[-2], shape[-3], shape[-1], dtype=torch.float64).transpose(
            -3, -2
        )
    if layout == "strided":  # every second number of the last dimension
        return torch.randn(*shape[:-1], 2 * shape[-1], dtype=torch.float64)[..., ::2]
    if layout == "cut out":  # unaligned rows inside a larger tensor
        return torch.randn(*shape[:-2], shape[-2] + 3, shape[-1] + 5, dtype=torch.float64)[..., 2:-1, 3:-2]
    if layout == "broadcast":  # one head for all
        return torch.randn(*shape[:-3], 1, *shape[-2:], dtype=torch.float64).expand(shape)
    if layout == "dims first":  # (..., D, S) in memory
        return torch.randn(*shape[:-2], shape[-1], shape[-2], dtype=torch.float64).transpose(-1, -2)
    return torch.randn(shape, dtype=torch.float64)


LAYOUTS = ["plain", "heads last", "strided", "cut out", "broadcast", "dims first"]


def composition(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, align: str, scale: float | None, **packed: Tensor
) -> tuple[Tensor, Tensor]:
    """What a user writes without effkern, in the dtype of the inputs; only the value of lse is that of float32."""
    if packed:
        ends = [packed[name].tolist() for name in ("cu_seqlens_q", "cu_seqlens_k")]
        parts = [
            composition(q[None, :, a:b], k[None, :, c:d], v[None, :, c:d], causal, align, scale)
            for a, b, c, d in zip(ends[0][:-1], ends[0][1:], ends[1][:-1], ends[1][1:], strict=True)
        ]
        return torch.cat([p[0] for p in parts], 2)[0], torch.cat([p[1] for p in parts], 2)[0]
    (b, hq, sq, d), (_, hkv, sk, dv) = q.shape, v.shape
    scale = d**-0.5 if scale is None else scale
    hidden = torch.zeros(sq, sk, dtype=torch.bool, device=q.device)
    if causal:
        position = torch.arange(sq, device=q.device)[:, None] + (sk - sq if align == "bottom_right" else 0)
        hidden = torch.arange(sk, device=q.device) > position

    def scores(q: Tensor, k: Tensor) -> Tensor:
        rows = q.reshape(b, hkv, hq // hkv * sq, d)
        return (rows @ k.transpose(-1, -2) * scale).reshape(b, hq, sq, sk).masked_fill(hidden, -torch.inf)

    # A row that sees no key is filled with finite scores and cut off afterwards, to keep NaN out of the gradients.
    empty = hidden.all(-1, keepdim=True)
    s = scores(q, k).masked_fill(empty, 0.0)
    weights = torch.softmax(s, -1).masked_fill(empty, 0.0)
    out = (weights.reshape(b, hkv, hq // hkv * sq, sk) @ v).reshape(b, hq, sq, dv)
    lse = torch.logsumexp(s, -1).float()
    exact = torch.logsumexp(scores(q.float(), k.float()).masked_fill(empty, 0.0), -1)
    lse = lse + (exact - lse).detach()
    return out, lse.masked_fill(empty.squeeze(-1), -torch.inf)


Results = dict[str, Tensor]


def differentiate(
    attention: Callable[..., tuple[Tensor, Tensor]],
    tensors: list[Tensor],
    weights: tuple[Tensor, Tensor],
    **options: Any,
) -> Results:
    """out, lse and the gradients of <weights, (out, lse)>; rows with lse -inf carry no weight."""
    q, k, v = (t.detach().requires_grad_() for t in tensors)
    out, lse = attention(q, k, v, **options)
    finite = lse.isfinite()
    grads = torch.autograd.grad(
        (out, torch.where(finite, lse, 0.0)),
        (q, k, v),
        (weights[0].to(out.dtype), weights[1].to(lse.dtype)),
        materialize_grads=True,
    )
    return {"out": out, "lse": lse, "grad_q": grads[0], "grad_k": grads[1], "grad_v": grads[2]}


def with_lse(*args: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return effkern.attention(*args, return_lse=True, **options)


def make(case: Case, dtype: torch.dtype, device: str) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    shapes = case.shapes
    tensors = [
        lay_out(s, layout).to(dtype).to(device) for s, layout in zip(shapes, case.layout, strict=False)
    ]
    out_shape = (*shapes[0][:-1], case.dv)
    return tensors, (
        lay_out(out_shape, case.layout[3]).to(dtype).to(device),
        torch.randn(shapes[0][:-1]).to(device),
    )


def summed_sizes(
    case: Case,
    tensors: list[Tensor],
    weights: tuple[Tensor, Tensor],
    options: dict[str, Any],
    dtype: torch.dtype,
) -> dict[str, float]:
    """Size of the float32 numbers behind each result, whose rounding stays when they cancel.

    dQ = scale P (dO V^T - delta) K, where a row of P sums to 1, and a column to what dV is for dO = 1.
    """
    if min(t.numel() for t in tensors) == 0:
        return dict.fromkeys(("out", "lse", "grad_q", "grad_k", "grad_v"), 1.0)
    q, k, v = (t.double() for t in tensors)
    scale = case.d**-0.5 if case.scale is None else abs(case.scale)
    score = max(1.0, scale * case.d**0.5)  # a weight carries the rounding of its score
    # Eight: the roundings of a sum partly cancel. The half dtypes take a shorter polynomial for the exponential.
    products = (weights[0].double().norm(dim=-1).max() * v.norm(dim=-1).max()).item()
    difference = scale * (1.0 + products / 8)  # 1 for the gradient of lse
    ones = torch.ones_like(weights[0]), torch.zeros_like(weights[1])
    column = differentiate(reference.attention, [q, k, v], ones, **options)["grad_v"].max().item()
    return {
        "out": score,
        "lse": score * (1 if dtype == torch.float32 else 4),
        "grad_q": score * difference * k.abs().max().item(),
        "grad_k": score * difference * q.abs().max().item() * column,
        "grad_v": score * max(1.0, column),
    }


def check(case: Case, dtype: torch.dtype, route: Any) -> None:
    tensors, weights = make(case, dtype, route.device)
    options = case.options(route.device)
    ours = differentiate(with_lse, tensors, weights, **options)
    if min(t.numel() for t in tensors) > 0:
        route.check("attention_backward" if route.unit != "cuda" else "attention", dtype)
    baseline = differentiate(composition, tensors, weights, **options)
    oracle = differentiate(reference.attention, [t.double() for t in tensors], weights, **options)
    unit = summed_sizes(case, tensors, weights, options, dtype)
    for name, result in ours.items():
        assert result.dtype == (torch.float32 if name == "lse" else dtype)
        assert result.is_contiguous() or name.startswith("grad")
        what = f"{name} of {case} in {dtype}"
        assert_close_to_oracle(result, baseline[name], oracle[name], what, unit=unit[name])


CASES = {
    "one of everything": Case(sq=1, sk=1, d=1, dv=1, hq=1),
    "one key": Case(sq=5, sk=1, d=3, dv=2),
    "tile edges": Case(sq=64, sk=128, d=64, dv=64),
    "beyond tile edges": Case(b=2, hq=4, hkv=2, sq=65, sk=257, d=64, dv=64),
    "odd": Case(hq=3, hkv=3, sq=37, sk=53, d=33, dv=17),
    "wide": Case(sq=70, sk=90, d=256, dv=255),
    "narrow value": Case(sq=40, sk=50, d=128, dv=1),
    "narrow head": Case(sq=40, sk=50, d=2, dv=128),
    "decode": Case(b=2, hq=8, hkv=2, sq=1, sk=300, d=64, dv=64),
    "many queries, few keys": Case(sq=300, sk=7, d=40, dv=24),
    "multi query": Case(hq=6, hkv=1, sq=50, sk=50, d=32, dv=48),
}


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", ["full", "bottom_right", "top_left"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_against_oracle(case: Case, causal: str, dtype: torch.dtype, route: Any) -> None:
    if causal != "full":
        case = replace(case, causal=True, align=causal)
    check(case, dtype, route)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_packed(causal: bool, dtype: torch.dtype, route: Any, threads: Callable[[int], None]) -> None:
    threads(2)
    lengths = ((33, 40), (0, 5), (1, 1), (70, 64), (4, 0), (0, 0), (17, 129))
    check(Case(hq=4, hkv=2, d=24, dv=40, lengths=lengths, causal=causal), dtype, route)


@pytest.mark.sanitize
@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("packed", [False, True])
def test_strides(layout: str, packed: bool, route: Any, threads: Callable[[int], None]) -> None:
    threads(2)
    lengths = ((20, 30), (23, 40)) if packed else None
    case = Case(b=2, hq=4, hkv=2, sq=43, sk=70, d=24, dv=16, layout=(layout,) * 4, lengths=lengths)
    check(case, torch.float32, route)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    def dim(most: int) -> int:
        usual = st.sampled_from([n for n in (8, 16, 32, 64, 128, 256) if n <= most])
        return draw(st.one_of(st.integers(1, most), usual))

    hkv = draw(st.integers(1, 3))
    length = st.integers(0, 70)
    packed = draw(st.booleans())
    lengths = tuple(draw(st.lists(st.tuples(length, length), min_size=1, max_size=4))) if packed else None
    return Case(
        b=draw(st.integers(1, 2)),
        hq=hkv * draw(st.integers(1, 3)),
        hkv=hkv,
        sq=dim(150),
        sk=dim(300),
        d=dim(256),
        dv=dim(256),
        causal=draw(st.booleans()),
        align=draw(st.sampled_from(["bottom_right", "top_left"])),
        scale=draw(st.sampled_from([None, None, 0.3, -0.2, 0.0])),
        lengths=lengths,
        layout=tuple(draw(st.sampled_from(LAYOUTS)) for _ in range(4)),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(case=cases(), seed=st.integers(0, 2**31), count=st.sampled_from([1, 1, 2]))
def test_any_shape(
    case: Case, seed: int, count: int, dtype: torch.dtype, route: Any, threads: Callable[[int], None]
) -> None:
    torch.manual_seed(seed)
    threads(count)
    check(case, dtype, route)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [512, 1024])
def test_gradients_of_long_bfloat16_are_nearly_rounded_once(size: int, causal: bool, route: Any) -> None:
    """dK and dV sum over many queries: at most half of SDPA's error, or 1.6 times that of rounding the exact result."""
    case = Case(sq=size, sk=size, d=64, dv=64, hq=2, hkv=2, causal=causal)
    tensors, weights = make(case, torch.bfloat16, route.device)
    weights = weights[0], torch.zeros_like(weights[1])

    def sdpa(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return out, q.new_zeros(q.shape[:-1]) + 0.0 * q.sum(-1)

    options = case.options(route.device)
    ours = differentiate(with_lse, tensors, weights, **options)
    theirs = differentiate(sdpa, tensors, weights, **options)
    oracle = differentiate(reference.attention, [t.double() for t in tensors], weights, **options)
    for name in ("grad_k", "grad_v"):
        rounded = errors(oracle[name].to(torch.bfloat16), oracle[name]).relative_l2
        allowed = max(0.5 * errors(theirs[name], oracle[name]).relative_l2, 1.6 * rounded)
        assert errors(ours[name], oracle[name], name).relative_l2 <= allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_same_bits_every_time(
    causal: bool, dtype: torch.dtype, route: Any, threads: Callable[[int], None]
) -> None:
    case = Case(b=2, hq=4, hkv=2, sq=200, sk=333, d=48, dv=40, causal=causal)
    tensors, weights = make(case, dtype, route.device)
    first: Results | None = None
    for count in (1, 2, 2, 2, 2, 2, 1):
        threads(count)
        results = differentiate(with_lse, tensors, weights, **case.options(route.device))
        first = first or results
        for name, result in results.items():
            assert torch.equal(result, first[name]), f"{name} differs with {count} threads"


@pytest.mark.parametrize("align", ["bottom_right", "top_left"])
@pytest.mark.parametrize("sizes", [(2, 3), (3, 2), (3, 0)])
@pytest.mark.parametrize("causal", [False, True])
def test_reference_gradients(sizes: tuple[int, int], align: str, causal: bool) -> None:
    """First and second derivatives by finite differences, then the closed form against autograd."""
    case = Case(b=1, hq=2, hkv=1, sq=sizes[0], sk=sizes[1], d=3, dv=2, causal=causal, align=align)
    tensors, _ = make(case, torch.float64, "cpu")
    leaves = [t.requires_grad_() for t in tensors]

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = reference.attention(q, k, v, **case.options("cpu"))
        return out, torch.where(lse.isfinite(), lse, 0.0)

    assert torch.autograd.gradcheck(function, leaves)
    if sizes == (2, 3):
        assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("lengths", [None, ((5, 9), (0, 3), (6, 0), (7, 4))])
@pytest.mark.parametrize("causal", [False, True])
def test_reference_closed_form(lengths: Any, causal: bool) -> None:
    case = Case(b=2, hq=4, hkv=2, sq=9, sk=6, d=5, dv=3, causal=causal, lengths=lengths)
    tensors, weights = make(case, torch.float64, "cpu")
    options = case.options("cpu")
    expected = differentiate(reference.attention, tensors, weights, **options)
    out, lse = expected["out"], expected["lse"]
    grads = reference.attention_backward(weights[0], weights[1], *tensors, out, lse, **options)
    for name, grad in zip(("grad_q", "grad_k", "grad_v"), grads, strict=True):
        torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-6)


def test_measures_notice_errors() -> None:
    """The rule itself: a wrong entry, a missing NaN and a rounding step."""
    oracle = torch.linspace(1, 2, 50, dtype=torch.float64)
    exact = oracle.float()
    assert errors(exact, oracle).max_ulp <= 0.5
    assert floor(oracle, torch.float32) == pytest.approx(10 * 2**-23)
    assert_close_to_oracle(exact, exact, oracle)
    for wrong in (exact + 1e-5, exact.clone().index_fill(0, torch.tensor(3), torch.nan)):
        with pytest.raises(AssertionError):
            assert_close_to_oracle(wrong, exact, oracle)
    assert errors(exact + 0.25, oracle).max_abs == pytest.approx(0.25)
