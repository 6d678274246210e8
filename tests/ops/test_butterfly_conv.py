"""butterfly_conv: exact DFT blocks against the float64 long convolution, free ones against the dense transform."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import effkern
from effkern.ops.butterfly_conv import SIZES, butterfly_flops, butterfly_radices
from effkern.reference import long_conv as reference
from effkern.testing import assert_close_to_oracle, errors


def arguments(length: int, taps: int | None = None, batch: int = 2, channels: int = 3) -> dict[str, Tensor]:
    shape = (batch, channels, length)
    made = {
        "u": torch.randn(shape),
        "k": torch.randn(channels, length if taps is None else taps) / math.sqrt(length),
        "skip": torch.randn(channels),
        "pre_gate": torch.randn(shape),
        "post_gate": torch.randn(shape),
    }
    return {name: t.double() for name, t in made.items()}


def cast(named: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: t.to(dtype) for name, t in named.items()}


def dense_transform(factors: dict[int, Tensor], size: int) -> Tensor:
    """The transform as a matrix for each channel, entry by entry: a product over the digits of column and row."""
    radices = butterfly_radices(size)
    assert math.prod(radices) == size
    channels = next(iter(factors.values())).shape[0] if radices else 1
    matrix = torch.ones(channels, size, size, dtype=torch.complex128)
    column, row = torch.arange(size), torch.arange(size)
    whole = size
    for n in radices:
        rest = whole // n
        part, column = column // rest, column % rest  # this stage's number, and the place within the part
        digit, row = row % n, row // n
        turn = torch.exp(-2j * math.pi * (digit[:, None] * column).double() / whole)
        matrix = matrix * factors[n].to(torch.complex128)[:, digit[:, None], part] * turn
        whole = rest
    return matrix


def by_dense_transforms(u: Tensor, k: Tensor, of_inputs: Tensor, of_kernels: Tensor) -> Tensor:
    size, length = of_inputs.shape[1], u.shape[2]
    w = torch.exp(0.5j * math.pi * torch.arange(size).double() / size)
    inputs = torch.einsum("hfn,bhn->bhf", of_inputs, w * F.pad(u, (0, size - length)))
    kernels = torch.einsum("hfn,hn->hf", of_kernels, w * F.pad(k, (0, size - k.shape[1])))
    return (w.conj() * torch.fft.ifft(inputs * kernels)).real[..., :length]


def random_blocks(channels: int, length: int) -> dict[int, Tensor]:
    return {n: torch.randn(channels, n, n, dtype=torch.complex128) for n in set(butterfly_radices(length))}


@pytest.mark.parametrize("length", range(1, 71))
def test_exact_blocks_give_the_convolution(length: int) -> None:
    taps = 1 + length * 5 // 7
    given = arguments(length, min(taps, length))
    factors = effkern.butterfly_factors(dtype=torch.complex128)
    u, k = given.pop("u"), given.pop("k")
    out = effkern.butterfly_conv(u, k, factors, **given)
    assert effkern.backends.last() == "butterfly_conv:composition"
    assert out.is_contiguous()
    torch.testing.assert_close(out, reference.long_conv(u, k, **given), rtol=1e-13, atol=1e-13)
    alone = effkern.butterfly_conv(u, k, effkern.butterfly_factors(3, dtype=torch.complex128))
    torch.testing.assert_close(alone, reference.long_conv(u, k), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("length", [1023, 1024, 1025, 4999, 65536, 100_003])
def test_large_lengths_are_as_exact_as_an_fft(length: int) -> None:
    given = arguments(length, batch=1, channels=2)
    u, k = given["u"].float(), given["k"].float()
    exact = reference.long_conv(u.double(), k.double())
    found = errors(effkern.butterfly_conv(u, k, effkern.butterfly_factors(length=length)), exact)
    assert found.relative_l2 <= 2 * errors(reference.long_conv(u, k), exact).relative_l2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_are_computed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    given = cast(arguments(100, 64), dtype)
    factors = effkern.butterfly_factors()
    u, k = given.pop("u"), given.pop("k")
    out = effkern.butterfly_conv(u, k, factors, **given)
    assert out.dtype == dtype
    wide = {name: t.float() for name, t in given.items()}
    assert torch.equal(out, effkern.butterfly_conv(u.float(), k.float(), factors, **wide).to(dtype))
    float_weights = {**given, "skip": given["skip"].float()}
    assert torch.equal(out, effkern.butterfly_conv(u, k.float(), factors, **float_weights))
    exact = reference.long_conv(u.double(), k.double(), **{name: t.double() for name, t in given.items()})
    assert_close_to_oracle(out, reference.long_conv(u, k, **given), exact, unit=8.0)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("length", [2, 3, 8, 13, 16, 32, 64, 100, 128, 256])
def test_free_blocks_are_the_transform_of_the_formula(length: int, channels: int) -> None:
    given = arguments(length)
    blocks, other = random_blocks(channels, length), random_blocks(channels, length)
    size = 1 << (length - 1).bit_length()
    first, second = dense_transform(blocks, size), dense_transform(other, size)
    for factors, of_kernels in ((blocks, first), ((blocks, other), second)):
        out = effkern.butterfly_conv(given["u"], given["k"], factors)
        expected = by_dense_transforms(
            given["u"], given["k"], first.expand(3, -1, -1), of_kernels.expand(3, -1, -1)
        )
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10 * expected.abs().max().item())


def test_channels_have_their_own_blocks() -> None:
    given, blocks = arguments(48), random_blocks(3, 48)
    out = effkern.butterfly_conv(given["u"], given["k"], blocks)
    for h in range(3):
        alone = {n: block[h : h + 1] for n, block in blocks.items()}
        one = effkern.butterfly_conv(given["u"][:, h : h + 1], given["k"][h : h + 1], alone)
        torch.testing.assert_close(out[:, h : h + 1], one)


def test_a_longer_transform_serves_shorter_inputs() -> None:
    """The same linear map, whatever the length: an input and the same input with zeros after it agree."""
    given, blocks = arguments(40), random_blocks(1, 300)
    u, k = given["u"], F.pad(given["k"], (0, 250))
    out = effkern.butterfly_conv(u, k, blocks, length=300)
    padded = effkern.butterfly_conv(F.pad(u, (0, 260)), k, blocks)
    torch.testing.assert_close(out, padded[..., :40])
    exact = effkern.butterfly_factors(dtype=torch.complex128)
    torch.testing.assert_close(
        effkern.butterfly_conv(u, k, exact, length=1000), reference.long_conv(u, given["k"])
    )


@pytest.mark.parametrize(("length", "channels"), [(1, 1), (3, 2), (6, 1), (20, 2)])
def test_derivatives_in_float64(length: int, channels: int) -> None:
    given = arguments(length, max(1, length - 1), batch=2, channels=2)
    sizes = sorted(set(butterfly_radices(length)))
    blocks = random_blocks(channels, length)
    other = random_blocks(1, length)

    def call(u: Tensor, k: Tensor, skip: Tensor, pre: Tensor, post: Tensor, *flat: Tensor) -> Tensor:
        pair = (dict(zip(sizes, flat, strict=False)), dict(zip(sizes, flat[len(sizes) :], strict=True)))
        return effkern.butterfly_conv(u, k, pair, skip=skip, pre_gate=pre, post_gate=post)

    tensors = [*given.values(), *(blocks[n] for n in sizes), *(other[n] for n in sizes)]
    leaves = [t.detach().requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(call, leaves)
    if length == 3:
        assert torch.autograd.gradgradcheck(call, leaves)
        assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True)


def test_shared_blocks_collect_the_gradients_of_all_channels() -> None:
    given = cast(arguments(24), torch.float32)
    shared = {n: f.requires_grad_() for n, f in effkern.butterfly_factors(length=24, noise=0.1).items()}
    own = {n: f.detach().expand(3, n, n).clone().requires_grad_() for n, f in shared.items()}
    effkern.butterfly_conv(given["u"], given["k"], shared).square().sum().backward()
    effkern.butterfly_conv(given["u"], given["k"], own).square().sum().backward()
    for n, block in shared.items():
        torch.testing.assert_close(block.grad, own[n].grad.sum(0, keepdim=True))  # type: ignore[union-attr]


def test_factors_are_dft_matrices_and_noise() -> None:
    factors = effkern.butterfly_factors(2)
    assert sorted(factors) == list(SIZES)
    for n, block in factors.items():
        assert block.shape == (2, n, n) and block.dtype == torch.complex64 and block.is_contiguous()
        torch.testing.assert_close(block[1], torch.fft.fft(torch.eye(n)).to(torch.complex64))
    assert sorted(effkern.butterfly_factors(length=1000)) == [4, 16]
    assert effkern.butterfly_factors(length=1) == {}
    noisy = effkern.butterfly_factors(
        500, noise=0.01, length=16, generator=torch.Generator().manual_seed(1), dtype=torch.complex128
    )
    noise = noisy[16] - effkern.butterfly_factors(dtype=torch.complex128)[16]
    assert abs(noise.abs().square().mean().sqrt().item() - 0.01) < 1e-4
    again = effkern.butterfly_factors(
        500, noise=0.01, length=16, generator=torch.Generator().manual_seed(1), dtype=torch.complex128
    )
    assert torch.equal(noisy[16], again[16])
    for wrong in ({"channels": 0}, {"length": 0}, {"dtype": torch.float32}):
        with pytest.raises(ValueError, match="butterfly_factors"):
            effkern.butterfly_factors(**wrong)  # type: ignore[arg-type]


def test_radices() -> None:
    assert [butterfly_radices(n) for n in (1, 2, 3, 16, 17, 257, 1000)] == [
        (),
        (2,),
        (4,),
        (16,),
        (16, 2),
        (16, 16, 2),
        (16, 16, 4),
    ]
    for length in range(1, 300):
        size = math.prod(butterfly_radices(length))
        assert size >= length and (size == 1 or size < 2 * length)


def test_strides_do_not_matter() -> None:
    given = cast(arguments(50), torch.float32)
    factors = effkern.butterfly_factors(3, noise=0.1)
    turned = {n: f.mT.contiguous().mT for n, f in factors.items()}
    moved = {name: t.movedim(0, -1).contiguous().movedim(-1, 0) for name, t in given.items()}
    u, k = given.pop("u"), given.pop("k")
    out = effkern.butterfly_conv(u, k, factors, **given)
    other = effkern.butterfly_conv(moved.pop("u"), moved.pop("k"), turned, **moved)
    torch.testing.assert_close(out, other, rtol=1e-5, atol=1e-5)


def test_nothing_gives_nothing_and_zero_gradients() -> None:
    factors = effkern.butterfly_factors()
    for shape in ((0, 3, 20), (2, 0, 20), (2, 3, 0)):
        u = torch.randn(shape, requires_grad=True)
        k = torch.randn(shape[1], 5, requires_grad=True)
        out = effkern.butterfly_conv(u, k, factors)
        assert out.shape == shape
        out.sum().backward()
        assert not k.grad.any() and u.grad.shape == shape  # type: ignore[union-attr]


def test_autocast_changes_nothing() -> None:
    given, factors = cast(arguments(30), torch.float32), effkern.butterfly_factors()
    expected = effkern.butterfly_conv(given["u"], given["k"], factors)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(effkern.butterfly_conv(given["u"], given["k"], factors), expected)


def test_compiles() -> None:
    given = cast(arguments(40), torch.float32)
    factors = effkern.butterfly_factors(noise=0.1)

    def call(u: Tensor, k: Tensor) -> Tensor:
        return effkern.butterfly_conv(u, k, factors)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(given["u"], given["k"]), call(given["u"], given["k"]))


def test_flops_count_both_transforms() -> None:
    u, k = torch.empty(2, 3, 256), torch.empty(3, 256)
    stages, inverse = 8 * 256 * 32 * 9, 5 * 256 * 8 * 6
    assert butterfly_flops(u, k, {}) == stages + inverse
    assert butterfly_flops(u, k, {}, backward=True) == 2 * (stages + inverse)


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


GOOD = effkern.butterfly_factors()


@pytest.mark.parametrize(
    ("error", "match", "args", "kwargs"),
    [
        (TypeError, "k must be a tensor, got list", (ones(2, 3, 8), [1.0], GOOD), {}),
        (
            TypeError,
            "a mapping of sizes to blocks or a pair of them, got list",
            (ones(2, 3, 8), ones(3, 8), [GOOD]),
            {},
        ),
        (TypeError, "a pair of them, got tuple", (ones(2, 3, 8), ones(3, 8), (GOOD,)), {}),
        (TypeError, "factors[8] must be a tensor, got float", (ones(2, 3, 8), ones(3, 8), {8: 1.0}), {}),
        (RuntimeError, "u must have shape (B, H, L), got (3, 8)", (ones(3, 8), ones(3, 8), GOOD), {}),
        (
            RuntimeError,
            "u must be float32, bfloat16 or float16, got int64",
            (ones(2, 3, 8).long(), ones(3, 8), GOOD),
            {},
        ),
        (
            RuntimeError,
            "k must have shape (3, Lk) with Lk at least 1, got (2, 8)",
            (ones(2, 3, 8), ones(2, 8), GOOD),
            {},
        ),
        (RuntimeError, "k must have shape (3, Lk)", (ones(2, 3, 8), ones(3, 0), GOOD), {}),
        (RuntimeError, "k has 9 taps, the transform serves only 8", (ones(2, 3, 8), ones(3, 9), GOOD), {}),
        (
            RuntimeError,
            "k must have u's dtype or float32, got float64",
            (ones(2, 3, 8), ones(3, 8).double(), GOOD),
            {},
        ),
        (
            RuntimeError,
            "skip must have shape (3,), got (2,)",
            (ones(2, 3, 8), ones(3, 8), GOOD),
            {"skip": ones(2)},
        ),
        (
            RuntimeError,
            "post_gate must have u's dtype, got bfloat16 beside float32",
            (ones(2, 3, 8), ones(3, 8), GOOD),
            {"post_gate": ones(2, 3, 8).bfloat16()},
        ),
        (
            ValueError,
            "length must be at least u's 8 positions, got 7",
            (ones(2, 3, 8), ones(3, 7), GOOD),
            {"length": 7},
        ),
        (
            RuntimeError,
            "no block of size 4 in factors; a transform of 64 has stages of 16, 4, got sizes [2, 16]",
            (ones(2, 3, 50), ones(3, 50), {n: GOOD[n] for n in (2, 16)}),
            {},
        ),
        (
            RuntimeError,
            "no block of size 16 in the kernel's factors",
            (ones(2, 3, 16), ones(3, 16), (GOOD, {})),
            {},
        ),
        (
            RuntimeError,
            "factors[8] must have shape (1, 8, 8) or (3, 8, 8), got (2, 8, 8)",
            (ones(2, 3, 8), ones(3, 8), effkern.butterfly_factors(2)),
            {},
        ),
        (
            RuntimeError,
            "factors[8] must be complex64 beside float32, got complex128",
            (ones(2, 3, 8), ones(3, 8), effkern.butterfly_factors(dtype=torch.complex128)),
            {},
        ),
        (
            RuntimeError,
            "factors[8] must be complex128 beside float64, got complex64",
            (ones(2, 3, 8).double(), ones(3, 8), GOOD),
            {},
        ),
    ],
)
def test_says_what_is_wrong(
    error: type[Exception], match: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    with pytest.raises(error, match=re.escape(match)):
        effkern.butterfly_conv(*args, **kwargs)
