"""Products with palettised weights against the float64 oracle: bits, groups, vectors, tokens, gradients, CPU levels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import effkern
from effkern.ops._palettized_linear_dispatch import _composed_backward
from effkern.ops.palettize import Palette
from effkern.reference import palettized_linear as reference
from effkern.testing import assert_close_to_oracle

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FUZZ = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def make_palette(
    rows: int, columns: int, clusters: int, groups: int = 1, dim: int = 1, dtype: torch.dtype = torch.float32
) -> Palette:
    shape = [*([groups] if groups > 1 else []), clusters, *([dim] if dim > 1 else [])]
    weight = torch.randn(rows, columns, dtype=dtype)
    return effkern.palettize(weight, torch.randn(shape), groups=groups, dim=dim)


def results(
    product: Callable[..., Tensor],
    x: Tensor,
    palette: Palette,
    bias: Tensor | None,
    low_rank: tuple[Tensor, Tensor] | None,
) -> dict[str, Tensor]:
    """The output and the gradient of everything that has one."""
    named = {"x": x, "lut": palette.lut, "bias": bias}
    if low_rank is not None:
        named |= {"A": low_rank[0], "B": low_rank[1]}
    leaves = {name: t.detach().requires_grad_() for name, t in named.items() if t is not None}
    held = Palette(palette.indices, leaves["lut"], palette.shape, palette.bits, palette.groups, palette.dim)
    factors = None if low_rank is None else (leaves["A"], leaves["B"])
    out = product(leaves["x"], held, leaves.get("bias"), low_rank=factors)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    grads = torch.autograd.grad(out, list(leaves.values()), grad)
    return {"out": out.detach(), **dict(zip(leaves, grads))}


def wide(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(wide, value))
    if isinstance(value, Palette):
        return Palette(value.indices, value.lut.double(), value.shape, value.bits, value.groups, value.dim)
    return None if value is None else value.double()


def check(isa: str, x: Tensor, palette: Palette, bias: Any = None, low_rank: Any = None) -> None:
    level = "avx512" if isa in ("avx512_bf16", "amx") else isa
    judge(f"cpu/{level}", effkern.palettized_linear, x, palette, bias, low_rank)


def judge(
    path: str,
    product: Callable[..., Tensor],
    x: Tensor,
    palette: Palette,
    bias: Any = None,
    low_rank: Any = None,
) -> dict[str, Tensor]:
    ours = results(product, x, palette, bias, low_rank)
    assert effkern.backends.last() == f"palettized_linear_backward:{path}"
    plain = results(reference.palettized_linear, x, palette, bias, low_rank)
    exact = results(reference.palettized_linear, wide(x), wide(palette), wide(bias), wide(low_rank))
    tokens = max(1, x.numel() // x.shape[-1])
    for name in ours:
        rows = palette.shape[0]
        # How large a sum is before what cancels has cancelled.
        terms = {"out": x.shape[-1], "x": rows, "lut": tokens * rows * x.shape[-1]}.get(name, tokens * rows)
        assert_close_to_oracle(ours[name], plain[name], exact[name], name, unit=4.0 * max(1, terms) ** 0.5)
    return ours


@pytest.mark.sanitize
@FUZZ
@given(data=st.data())
def test_against_oracle(data: st.DataObject, isa: str) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))
    groups, dim = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4]))
    clusters = draw(st.sampled_from([1, 2, 4, 7, 8, 13, 16, 40, 64, 256]))
    rows, columns = groups * draw(st.integers(1, 40)), dim * draw(st.integers(1, 280))
    palette = make_palette(rows, columns, clusters, groups, dim, draw(st.sampled_from(DTYPES)))
    dtype = draw(st.sampled_from(DTYPES))
    tokens = draw(st.one_of(st.integers(0, 9), st.integers(0, 70)))
    x = torch.randn(tokens, columns).to(dtype)
    bias = torch.randn(rows).to(dtype) if draw(st.booleans()) else None
    rank = draw(st.integers(1, 4))
    low_rank = (torch.randn(rank, columns), torch.randn(rows, rank)) if draw(st.booleans()) else None
    check(isa, x, palette, bias, low_rank)


@pytest.mark.sanitize
@pytest.mark.parametrize("clusters", [2, 4, 8, 16, 64, 256])
@pytest.mark.parametrize("tokens", [1, 2, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_blocks(clusters: int, tokens: int, dtype: torch.dtype, isa: str) -> None:
    """Several blocks of every number of bits, and what is left of a block, in rows that no tile divides; tables of
    numbers with four bytes and with two."""
    palette = make_palette(101, 2 * 512 + 75, clusters, dtype=dtype)
    check(isa, torch.randn(tokens, 1099).bfloat16(), palette, torch.randn(101).bfloat16())


@pytest.mark.parametrize(("dim", "clusters"), [(1, 2), (1, 8), (1, 16), (1, 256), (4, 64)])
@pytest.mark.parametrize("tokens", [7, 40, 300])
def test_products_of_pairs(dim: int, clusters: int, tokens: int, isa: str) -> None:
    """Tokens and tables in bf16, several pieces of both, where the machine multiplies them in pairs."""
    palette = make_palette(101, 1100, clusters, 1, dim, torch.bfloat16)
    x, bias = torch.randn(tokens, 1100).bfloat16(), torch.randn(101)
    check(isa, x, palette, bias)
    check(isa, x, palette, bias, (torch.randn(2, 1100), torch.randn(101, 2)))
    effkern.palettized_linear(x, palette, bias)
    assert effkern.backends.last() == f"palettized_linear:cpu/{isa}"
    effkern.palettized_linear(x.float(), palette, bias)
    level = "avx512" if isa in ("avx512_bf16", "amx") else isa
    assert effkern.backends.last() == f"palettized_linear:cpu/{level}"


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_same_bits_on_any_number_of_threads(tokens: int, threads: Callable[[int], None]) -> None:
    palette = make_palette(300, 700, 8, groups=3)
    x = torch.randn(tokens, 700)
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(results(effkern.palettized_linear, x, palette, torch.randn(300) * 0, None))
    for other in found[1:]:
        assert all(torch.equal(other[name], found[0][name]) for name in other)


def test_low_rank_stays_in_float32() -> None:
    """A x is not rounded to x's dtype, nor the product before the correction is added."""
    palette = make_palette(16, 64, 8)
    x = torch.randn(3, 64).bfloat16()
    first, second = 100 * torch.randn(2, 64), torch.randn(16, 2)
    found = effkern.palettized_linear(x, palette, low_rank=(first, second))
    exact = x.double() @ (palette.to_dense().double() + second.double() @ first.double()).mT
    assert (found.double() - exact).abs().max() <= 2**-8 * exact.abs().max()
    assert torch.equal(found, exact.bfloat16())


def test_eora_factors() -> None:
    """Full rank undoes the palette; at low rank the error that inputs see is that of the leading singular pairs."""
    weight, palette = torch.randn(12, 20), make_palette(12, 20, 4)
    palette = effkern.palettize(weight, torch.linspace(-2, 2, 4))
    inputs = torch.randn(200, 20) * torch.linspace(0.1, 3, 20)
    covariance = inputs.mT @ inputs / 200
    exact = inputs @ weight.mT
    full = effkern.eora_factors(weight, palette, covariance, 12)
    torch.testing.assert_close(
        effkern.palettized_linear(inputs, palette, low_rank=full), exact, rtol=1e-4, atol=1e-4
    )
    first, second = effkern.eora_factors(weight, palette, covariance, 3)
    assert first.shape == (3, 20) and second.shape == (12, 3)
    error = (effkern.palettized_linear(inputs, palette, low_rank=(first, second)) - exact).norm()
    seen = inputs.double() @ (weight - palette.to_dense()).double().mT
    least = torch.linalg.svdvals(seen)[3:].square().sum().sqrt()
    torch.testing.assert_close(error.double(), least, rtol=1e-4, atol=0)
    # Inputs that never leave a plane: nothing is divided by what they do not have.
    flat = effkern.eora_factors(weight, palette, torch.diag(torch.tensor([1.0, 1.0] + [0.0] * 18)), 2)
    assert all(t.isfinite().all() for t in flat)
    with pytest.raises(ValueError, match="rank must be between 1 and 12, got 13"):
        effkern.eora_factors(weight, palette, covariance, 13)
    with pytest.raises(ValueError, match="covariance must be finite"):
        effkern.eora_factors(weight, palette, covariance * torch.nan, 3)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_bias_of_one_token_and_of_any_dtype(dtype: torch.dtype, backend: str) -> None:
    palette = make_palette(10, 48, 8)
    x, bias = torch.randn(48, requires_grad=True), torch.randn(10).to(dtype).requires_grad_()
    out = effkern.palettized_linear(x, palette, bias, backend=backend)
    expected = palette.to_dense() @ x + bias.float()
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected)
    sent = torch.randn(10)
    found = torch.autograd.grad(out, (x, bias), sent)
    assert found[1].dtype == dtype
    torch.testing.assert_close(found, torch.autograd.grad(expected, (x, bias), sent))


def test_composed_backward_ignores_autocast() -> None:
    """What a GPU runs without Triton: products in float32 also where `backward` is called under autocast."""
    palette = make_palette(10, 48, 8)
    args = (torch.randn(3, 10), torch.randn(3, 48), palette.indices, palette.lut, palette.bits)
    expected = _composed_backward(*args)
    with torch.autocast("cpu", torch.bfloat16):
        found = _composed_backward(*args)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


def test_strides_and_frozen_parts() -> None:
    palette = make_palette(10, 48, 8)
    x = torch.randn(48, 6, requires_grad=True)
    out = effkern.palettized_linear(x.mT, palette)
    torch.testing.assert_close(out, x.mT @ palette.to_dense().mT)
    out.sum().backward()
    torch.testing.assert_close(x.grad, palette.to_dense().sum(0)[:, None].expand(48, 6))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"bits": 5}, "bits must be 1, 2, 3, 4, 6 or 8, got 5"),
        ({"groups": 3}, "groups 3 does not divide the 10 rows"),
        ({"dim": 3}, "dim must be 1, 2 or 4, got 3"),
        ({"indices": torch.zeros(10, 5, dtype=torch.uint8)}, "does not fit indices of shape"),
        ({"lut": torch.zeros(9)}, "lut has shape"),
        ({"lut": torch.zeros(8, dtype=torch.float64)}, "lut must be float32"),
    ],
)
def test_dispatcher_checks(change: dict[str, Any], match: str) -> None:
    palette = make_palette(10, 48, 8)
    args = {"indices": palette.indices, "lut": palette.lut, "bits": 3, "groups": 1, "dim": 1, **change}
    with pytest.raises(RuntimeError, match=match):
        torch.ops.effkern.palettized_linear(torch.randn(2, 48), **args)
