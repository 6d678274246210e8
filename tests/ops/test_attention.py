"""Attention against the reference in float64: outputs, lse and every gradient, on every path of the machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_oracle import DTYPES, LAYOUTS, Case, Results, check, differentiate, make, with_lse
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from effkern.reference import attention as reference
from effkern.testing import assert_close_to_oracle, errors, floor

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
    inputs = make(case, torch.bfloat16, route.device)
    inputs = replace(inputs, grad_lse=torch.zeros_like(inputs.grad_lse))

    def sdpa(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return out, q.new_zeros(q.shape[:-1]) + 0.0 * q.sum(-1)

    options = case.options(route.device)
    ours = differentiate(with_lse, inputs, **options)
    theirs = differentiate(sdpa, inputs, **options)
    oracle = differentiate(reference.attention, inputs.double(), **options)
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
    inputs = make(case, dtype, route.device)
    first: Results | None = None
    for count in (1, 2, 2, 2, 2, 2, 1):
        threads(count)
        results = differentiate(with_lse, inputs, **case.options(route.device))
        first = first or results
        for name, result in results.items():
            assert torch.equal(result, first[name]), f"{name} differs with {count} threads"


@pytest.mark.parametrize("align", ["bottom_right", "top_left"])
@pytest.mark.parametrize("sizes", [(2, 3), (3, 2), (3, 0)])
@pytest.mark.parametrize("causal", [False, True])
def test_reference_gradients(sizes: tuple[int, int], align: str, causal: bool) -> None:
    """First and second derivatives by finite differences, then the closed form against autograd."""
    case = Case(b=1, hq=2, hkv=1, sq=sizes[0], sk=sizes[1], d=3, dv=2, causal=causal, align=align)
    leaves = [t.requires_grad_() for t in make(case, torch.float64, "cpu").leaves.values()]

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
    inputs = make(case, torch.float64, "cpu")
    options = case.options("cpu")
    expected = differentiate(reference.attention, inputs, **options)
    out, lse = expected["out"], expected["lse"]
    grads = reference.attention_backward(
        inputs.grad_out, inputs.grad_lse, inputs.q, inputs.k, inputs.v, out, lse, **options
    )
    for name, grad in zip(("grad_q", "grad_k", "grad_v"), grads, strict=False):
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
