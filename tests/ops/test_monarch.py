"""Monarch products against the float64 oracle: shapes, dtypes, strides, orders, gradients, every CPU level."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import effkern
from effkern.reference import monarch as reference
from effkern.testing import assert_close_to_oracle

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FUZZ = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def factors(k: int, q: int, p: int, l: int, s: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    r = k * q // l
    assert l * r == k * q
    w1 = torch.randn(k, q, p, dtype=torch.float64) / p**0.5
    w2 = torch.randn(l, s, r, dtype=torch.float64) / r**0.5
    return w1.to(dtype), w2.to(dtype)


def results(product: Callable[..., Tensor], inputs: list[Tensor | None], seed: int = 1) -> list[Tensor]:
    """The output and the gradient of every input."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    out = product(*leaves)
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(out.shape, generator=generator).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, [t for t in leaves if t is not None], grad)]


def check(isa: str, product: str, inputs: list[Tensor | None], **kwargs: str) -> None:
    ours = results(lambda *a: getattr(effkern, product)(*a, **kwargs), inputs)
    wide = inputs[0].dtype != torch.bfloat16 and isa in ("avx512_bf16", "amx")  # type: ignore[union-attr]
    assert effkern.backends.last() == f"{product}_backward:cpu/{'avx512' if wide else isa}"
    plain = results(lambda *a: getattr(reference, product)(*a, **kwargs), inputs)
    wide = [None if t is None else t.double() for t in inputs]
    exact = results(lambda *a: getattr(reference, product)(*a, **kwargs), wide)
    names = ["out", *(n for n, t in zip(("x", "w1", "w2", "bias"), inputs, strict=False) if t is not None)]
    tokens = max(1, inputs[0].numel() // inputs[0].shape[-1])  # type: ignore[union-attr]
    for name, a, b, c in zip(names, ours, plain, exact, strict=True):
        # A weight gradient is a sum over all tokens, and so large before what cancels has cancelled.
        unit = max(1.0, tokens**0.5) if name not in ("out", "x") else 4.0
        assert_close_to_oracle(a, b, c, name, unit=unit)


@pytest.mark.sanitize
@FUZZ
@given(data=st.data())
def test_against_oracle(data: st.DataObject, isa: str) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(DTYPES))
    l, r = draw(st.integers(1, 20)), draw(st.integers(1, 40))
    k = draw(st.sampled_from([n for n in range(1, 21) if l * r % n == 0]))
    w1, w2 = factors(k, l * r // k, draw(st.integers(1, 70)), l, draw(st.integers(1, 40)), dtype)
    tokens = draw(st.one_of(st.integers(0, 9), st.integers(0, 230)))
    x = torch.randn(tokens, k * w1.shape[2]).to(dtype)
    bias = torch.randn(l * w2.shape[1]).to(dtype) if draw(st.booleans()) else None
    check(
        isa, "monarch_matmul", [x, w1, w2, bias], output_order=draw(st.sampled_from(["s_major", "l_major"]))
    )


@pytest.mark.sanitize
@FUZZ
@given(data=st.data())
def test_one_factor_against_oracle(data: st.DataObject, isa: str) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(DTYPES))
    w = torch.randn([draw(st.integers(1, n)) for n in (12, 60, 60)]).to(dtype)
    tokens = draw(st.one_of(st.integers(0, 9), st.integers(0, 230)))
    x = torch.randn(tokens, w.shape[0] * w.shape[2]).to(dtype)
    check(isa, "block_diag_matmul", [x, w])


PUBLISHED = [
    (16, (4, 4, 4), (4, 4)),
    (1024, (32, 32, 32), (32, 32)),
    (4096, (64, 64, 64), (64, 64)),
    (768, (8, 192, 96), (24, 16)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize(("n", "first", "second"), PUBLISHED, ids=[str(n) for n, _, _ in PUBLISHED])
def test_published_shapes(
    n: int, first: tuple[int, int, int], second: tuple[int, int], dtype: torch.dtype
) -> None:
    """The shapes that the tests of other implementations use, at their tolerance; gradients included."""
    k, q, p = first
    l, s = second
    w1 = torch.randn(k, q, p, dtype=dtype) / p**0.5
    w2 = torch.randn(l, s, k * q // l, dtype=dtype) / (k * q // l) ** 0.5
    x, bias = torch.randn(3, n, dtype=dtype), torch.randn(l * s, dtype=dtype)
    ours = results(effkern.monarch_matmul, [x, w1, w2, bias])
    wide = torch.complex128 if dtype.is_complex else torch.float64
    exact = results(reference.monarch_matmul, [t.to(wide) for t in (x, w1, w2, bias)])
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.to(wide), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", ["s_major", "l_major"])
def test_complex(order: str) -> None:
    w1, w2 = torch.randn(3, 8, 5, dtype=torch.complex64), torch.randn(4, 7, 6, dtype=torch.complex64)
    x = torch.randn(2, 9, 15, dtype=torch.complex64).conj()
    bias = torch.randn(28, dtype=torch.complex64)
    inputs = [x, w1, w2, bias]
    ours = results(lambda *a: effkern.monarch_matmul(*a, output_order=order), inputs)
    assert effkern.backends.last().startswith("monarch_matmul_backward:cpu/")
    exact = results(
        lambda *a: reference.monarch_matmul(*a, output_order=order), [t.to(torch.complex128) for t in inputs]
    )
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.to(torch.complex128), b, rtol=1e-4, atol=1e-4)
    one = results(effkern.block_diag_matmul, inputs[:2])
    for a, b in zip(one, results(reference.block_diag_matmul, inputs[:2]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(effkern.monarch_matmul(*inputs, output_order=order), ours[0])


@pytest.mark.parametrize("sizes", [(4, 8), (16, 16), (5, 7)])
def test_the_dft_is_a_monarch_matrix(sizes: tuple[int, int]) -> None:
    """Cooley and Tukey: DFTs of length n1 on strided inputs, twiddles, DFTs of length n2, and the output in order.

    Input j = j1 n2 + j2, output o = o1 + n1 o2. Block j2 of the first factor needs inputs that are n2 apart, so the
    input is shuffled once; its DFT over j1 gives o1. Block o1 of the second sums over j2 with the twiddles.
    """
    n1, n2 = sizes
    n = n1 * n2

    def root(power: Tensor, order: int) -> Tensor:
        return torch.polar(torch.ones(power.shape).double(), -2 * torch.pi * (power % order) / order)

    a, b = torch.arange(n1).double(), torch.arange(n2).double()
    w1 = root(torch.outer(a, a), n1).expand(n2, n1, n1)  # block j2: o1 x j1
    w2 = root(torch.outer(b, b), n2) * root(torch.outer(a, b), n)[:, None]  # block o1: o2 x j2
    x = torch.randn(6, n, dtype=torch.complex64)
    shuffled = x.unflatten(-1, (n1, n2)).transpose(-1, -2).flatten(-2)
    out = effkern.monarch_matmul(shuffled, w1.to(torch.complex64), w2.to(torch.complex64))
    torch.testing.assert_close(out, torch.fft.fft(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 3, 16, 47, 100, 700])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_any_number_of_threads(
    tokens: int, dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    w1, w2 = factors(8, 24, 20, 12, 9, dtype)
    x = torch.randn(tokens, 160).to(dtype)
    found = []
    for count in (1, 2, 3, 2):
        threads(count)
        found.append(results(effkern.monarch_matmul, [x, w1, w2, torch.randn(108).to(dtype) * 0]))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_weight_gradients_over_many_tokens_are_summed_in_float32() -> None:
    """A bfloat16 sum would stop growing at 256 times its terms."""
    x = torch.ones(20_000, 4, dtype=torch.bfloat16)
    w = torch.ones(2, 2, 2, dtype=torch.bfloat16)
    w1, w2, bias = (
        w.clone().requires_grad_(),
        w.clone().requires_grad_(),
        torch.zeros(4).bfloat16().requires_grad_(),
    )
    effkern.monarch_matmul(x, w1, w2, bias).sum().backward()
    assert torch.equal(bias.grad, torch.full((4,), 20_000.0).bfloat16())  # type: ignore[arg-type]
    for grad in (w1.grad, w2.grad):
        assert torch.equal(grad, torch.full((2, 2, 2), 40_000.0).bfloat16())  # type: ignore[arg-type]


def test_few_large_blocks_train_through_two_products() -> None:
    w1, w2 = factors(2, 512, 512, 2, 520, torch.float32)
    x = torch.randn(64, 1024)
    inputs: list[Tensor | None] = [x, w1, w2, torch.randn(1040)]
    plain = results(lambda *a: effkern.monarch_matmul(*a, backend="cpu"), inputs)
    assert effkern.backends.last().startswith("monarch_matmul_backward:cpu/")
    ours = results(effkern.monarch_matmul, inputs)
    assert effkern.backends.last() == "monarch_matmul:cpu/bmm"
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    effkern.monarch_matmul(*inputs)  # inference, and few tokens, take one pass
    assert not effkern.backends.last().endswith("bmm")
    results(effkern.monarch_matmul, [x[:8], w1, w2])
    assert not effkern.backends.last().endswith("bmm")


def test_weights_changed_in_place_count() -> None:
    w1, w2 = factors(4, 6, 6, 4, 6, torch.bfloat16)
    x = torch.randn(300, 24).bfloat16()
    before = effkern.monarch_matmul(x, w1, w2)
    w1.mul_(2)
    assert torch.equal(effkern.monarch_matmul(x, w1, w2), 2 * before)


@pytest.mark.parametrize("width", [1024, 4096])
def test_peak_memory_is_the_output_and_little_more(width: int, threads: Callable[[int], None]) -> None:
    from effkern.bench.memory import peak_extra_bytes, peak_tensor_bytes

    threads(2)
    block = width // 16
    w1, w2 = factors(16, block, block, 16, block, torch.float32)
    x = torch.randn(1024, width)
    call = lambda: effkern.monarch_matmul(x, w1, w2)  # noqa: E731
    peak, resident = (
        measured(call, torch.device("cpu")) for measured in (peak_tensor_bytes, peak_extra_bytes)
    )
    assert peak is not None and x.nbytes <= peak <= x.nbytes + (4 << 20)
    # Nothing hidden from torch's allocator either; what the system adds, huge pages and threads' stacks, varies.
    assert resident is None or resident <= peak + (8 << 20)


def test_nan_and_infinity_stay_in_their_token(isa: str) -> None:
    w1, w2 = factors(4, 6, 6, 4, 6, torch.float32)
    x = torch.randn(60, 24)
    expected = effkern.monarch_matmul(x, w1, w2)
    x[7, 3], x[50, 0] = torch.nan, torch.inf
    out = effkern.monarch_matmul(x, w1, w2)
    touched = torch.zeros(60, dtype=torch.bool)
    touched[[7, 50]] = True
    assert torch.equal(out[~touched], expected[~touched])
    assert out[7].isnan().all()
    assert not out[50].isfinite().any()


def test_strides() -> None:
    """Weights transposed or expanded, tokens expanded, gradients expanded."""
    w1, w2 = factors(4, 6, 6, 4, 6, torch.float32)
    x = torch.randn(1, 24).expand(50, 24)
    out = effkern.monarch_matmul(x, w1.mT, w2[:1].expand(4, 6, 6))
    same = effkern.monarch_matmul(x.contiguous(), w1.mT.contiguous(), w2[:1].repeat(4, 1, 1))
    assert torch.equal(out, same)
    leaf = x.contiguous().requires_grad_()
    effkern.monarch_matmul(leaf, w1, w2).sum().backward()  # the gradient of a sum is expanded
    torch.testing.assert_close(
        leaf.grad, torch.ones(50, 24) @ reference.monarch_matmul(torch.eye(24), w1, w2).mT
    )


def test_errors_of_the_backward_op() -> None:
    x, w = torch.randn(5, 8), torch.randn(2, 4, 4)
    with pytest.raises(RuntimeError, match="grad_out has shape"):
        torch.ops.effkern.monarch_matmul_backward(torch.randn(5, 9), x, w, w)
    with pytest.raises(RuntimeError, match="grad_out has shape"):
        torch.ops.effkern.block_diag_matmul_backward(torch.randn(4, 8), x, w)


@pytest.mark.plain_empty
def test_a_huge_number_of_tokens_is_indexed_in_64_bits() -> None:
    """2^31 outputs and more, of which only few are looked at; the input is one row, expanded."""
    tokens = (1 << 31) // 64 + 1000
    x = torch.randn(1, 4).half().expand(tokens, 4)
    w1, w2 = torch.randn(2, 8, 2).half(), torch.randn(4, 16, 4).half()
    with torch.inference_mode():
        out = effkern.monarch_matmul(x, w1, w2)
    assert out.numel() > 1 << 31
    assert torch.equal(out[-1], out[0]) and torch.equal(out[tokens // 2], out[0])


def test_meta_tensors_of_every_kind() -> None:
    for dtype in (torch.float32, torch.float64, torch.complex64):
        x, w = torch.empty(5, 8, dtype=dtype, device="meta"), torch.empty(2, 4, 4, dtype=dtype, device="meta")
        assert effkern.monarch_matmul(x, w, w).shape == (5, 8)
        assert effkern.block_diag_matmul(x, w).shape == (5, 8)
        assert effkern.monarch_matmul(x, w, w, backend="reference").shape == (5, 8)


@pytest.mark.sanitize
def test_a_bias_alone() -> None:
    """Frozen factors: the gradient of the bias over several tiles needs nothing else."""
    w1, w2 = factors(4, 6, 6, 4, 6, torch.float32)
    bias = torch.zeros(24, requires_grad=True)
    effkern.monarch_matmul(torch.randn(200, 24), w1, w2, bias).sum().backward()
    assert torch.equal(bias.grad, torch.full((24,), 200.0))  # type: ignore[arg-type]
