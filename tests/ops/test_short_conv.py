"""The short convolution against the float64 oracle: shapes, dtypes, strides, states, gradients, every CPU level."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from short_conv_oracle import NAMES, results
from short_conv_oracle import check as check_inputs
from torch import Tensor, nn

import effkern
from effkern.ops import _short_conv_dispatch as dispatch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FUZZ = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def check(unit: str, inputs: list[Tensor | None], activation: str | None = None) -> dict[str, Tensor]:
    ours = check_inputs(inputs, activation)
    assert effkern.backends.last() == f"short_conv_backward:cpu/{unit}"
    return ours


def unit_of(isa: str) -> str:
    return "avx512" if isa in ("avx512_bf16", "amx") else isa


@pytest.mark.sanitize
@FUZZ
@given(data=st.data())
def test_against_oracle(data: st.DataObject, isa: str) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(DTYPES))
    batch, channels = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    length = draw(st.one_of(st.integers(1, 9), st.integers(1, 200), st.integers(1000, 1100)))
    taps = draw(st.one_of(st.integers(1, 5), st.integers(1, 50), st.integers(1, 256)))

    def parameter(*shape: int) -> Tensor:
        wide = draw(st.booleans())
        return torch.randn(shape).to(torch.float32 if wide else dtype)

    x = torch.randn(batch, channels, length).to(dtype)
    layout = draw(st.sampled_from(["contiguous", "channels last", "slice", "every other", "batch last"]))
    if layout == "channels last":
        x = x.mT.contiguous().mT
    elif layout == "slice":
        x = torch.randn(batch, channels + 1, length + 7).to(dtype)[:, 1:, 3:-4]
    elif layout == "every other":
        x = torch.randn(batch, channels, 2 * length).to(dtype)[..., ::2]
    elif layout == "batch last":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    bias = parameter(channels) if draw(st.booleans()) else None
    state = parameter(batch, channels, taps - 1) if draw(st.booleans()) else None
    activation = draw(st.sampled_from([None, "silu"]))
    check(unit_of(isa), [x, parameter(channels, taps) / taps**0.5, bias, state], activation)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("taps", [1, 2, 3, 4, 5, 8, 9, 64, 256])
def test_several_stretches(taps: int, dtype: torch.dtype, isa: str) -> None:
    """Rows longer than what goes through a cache at once, and rows that end on its seams."""
    for length in (1023, 1024, 1025, 2048, 3333):
        inputs: list[Tensor | None] = [
            torch.randn(2, 2, length).to(dtype),
            torch.randn(2, taps).to(dtype) / taps**0.5,
            torch.randn(2).to(dtype),
            torch.randn(2, 2, taps - 1).to(dtype),
        ]
        check(unit_of(isa), inputs, "silu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("taps", [1, 2, 3, 4, 7, 40])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
def test_few_positions_of_many_channels(length: int, taps: int, dtype: torch.dtype, isa: str) -> None:
    """Decoding: rows go in groups, which end where the channels begin anew."""
    channels = 700
    weight = torch.randn(channels, taps) / taps**0.5
    x, bias = torch.randn(3, channels, length).to(dtype), torch.randn(channels)
    for state in (None, torch.randn(3, channels, taps - 1).to(dtype), torch.randn(3, channels, taps - 1)):
        for given_bias in (bias, None):
            check(unit_of(isa), [x, weight, given_bias, state], "silu")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("taps", [1, 4, 23])
@pytest.mark.parametrize("cuts", [[30], [1, 2, 40], [0, 100, 117], list(range(1, 40))], ids=str)
def test_chunks_equal_one_shot(cuts: list[int], taps: int, dtype: torch.dtype) -> None:
    """Outputs, the last state, and all gradients, those that pass from chunk to chunk through the state included."""
    length = 120
    x, weight, bias = torch.randn(2, 3, length), torch.randn(3, taps) / taps**0.5, torch.randn(3)
    first = torch.randn(2, 3, taps - 1)
    inputs: list[Tensor | None] = [t.to(dtype) for t in (x, weight, bias, first)]

    def chunked(x: Tensor, weight: Tensor, bias: Tensor, *, state: Tensor, **kwargs: Any) -> Any:
        outs = []
        for begin, end in zip([0, *cuts], [*cuts, length], strict=True):
            out, state = effkern.short_conv(x[..., begin:end], weight, bias, state=state, **kwargs)
            outs.append(out)
        return torch.cat(outs, -1), state

    compute = torch.float64 if dtype == torch.float64 else torch.float32
    whole, parts = (results(conv, inputs, "silu") for conv in (effkern.short_conv, chunked))
    for name, expected in whole.items():
        # The gradient of an input is rounded where it passes a seam, that of a parameter once a chunk; the sums
        # themselves, of 240 terms, go in another order.
        size = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
        limit = (len(cuts) + 2) * torch.finfo(dtype).eps * size + 64 * torch.finfo(compute).eps
        torch.testing.assert_close(parts[name], expected, rtol=0, atol=limit)


@pytest.mark.parametrize("taps", [2, 4, 17])
def test_step_by_step(taps: int, isa: str) -> None:
    x, weight, bias = torch.randn(2, 50, 60), torch.randn(50, taps), torch.randn(50)
    expected, last = effkern.short_conv(x, weight, bias, activation="silu", return_state=True)
    state, outs = None, []
    for t in range(60):
        out, state = effkern.short_conv(
            x[..., t : t + 1], weight, bias, activation="silu", state=state, return_state=True
        )
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, -1), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(state, last)


@pytest.mark.sanitize
@pytest.mark.parametrize("shape", [(2, 3, 0), (0, 3, 5), (2, 0, 5), (0, 0, 0), (2, 0, 1)], ids=str)
@pytest.mark.parametrize("taps", [1, 4])
def test_nothing_to_convolve(shape: tuple[int, int, int], taps: int, isa: str) -> None:
    """Empty results, zero gradients of what is there, and a state that has not moved."""
    batch, channels, _ = shape
    leaves = [
        t.requires_grad_()
        for t in (
            torch.randn(shape),
            torch.randn(channels, taps),
            torch.randn(channels),
            torch.randn(batch, channels, taps - 1),
        )
    ]
    for backend in (None, "reference"):
        x, weight, bias, state = leaves
        out, last = effkern.short_conv(
            x, weight, bias, activation="silu", state=state, return_state=True, backend=backend
        )
        assert out.shape == shape and last.shape == state.shape
        if shape[2] == 0:
            assert torch.equal(last, state)
        for leaf, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
            assert torch.equal(grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("taps", [4, 9])
@pytest.mark.parametrize("length", [1, 3, 70, 1100])
def test_nan_and_infinity_stay_in_their_row(length: int, taps: int, isa: str) -> None:
    x, weight = torch.randn(2, 5, length), torch.randn(5, taps)
    expected = results(effkern.short_conv, [x, weight, None, None], "silu")
    x[0, 2, length // 2], x[1, 4, length - 1] = torch.nan, torch.inf
    found = results(effkern.short_conv, [x, weight, None, None], "silu")
    clean = torch.ones(2, 5, dtype=torch.bool)
    clean[0, 2] = clean[1, 4] = False
    for name in ("out", "grad_x"):
        assert torch.equal(found[name][clean], expected[name][clean])
    assert torch.equal(found["out"][0, 2].isnan().nonzero()[0], torch.tensor([length // 2]))
    assert torch.equal(found["grad_weight"][[0, 1, 3]], expected["grad_weight"][[0, 1, 3]])
    assert found["grad_weight"][2].isnan().all()


@pytest.mark.parametrize("taps", [1, 4, 9])
def test_values_behind_the_row_do_not_matter(taps: int, isa: str) -> None:
    """Rows are views into a larger tensor full of NaN, before and behind them."""
    for length in (1, 5, 63, 64, 65, 130, 1030):
        room = torch.full((2, 3, length + 600), torch.nan)
        x = room[..., 300 : 300 + length]
        x.copy_(torch.randn(x.shape))
        inputs: list[Tensor | None] = [x, torch.randn(3, taps), None, None]
        assert all(t.isfinite().all() for t in check(unit_of(isa), inputs).values())


def test_silu_at_the_ends_of_the_range(isa: str) -> None:
    x = torch.tensor([-torch.inf, -1e30, -200.0, -90.0, -20.0, -1e-6, 0.0, 1e-6, 20.0, 90.0, 1e30, torch.inf])
    one = torch.ones(1, 1)
    leaf = x.reshape(1, 1, -1).clone().requires_grad_()
    out = effkern.short_conv(leaf, one, activation="silu")
    (grad,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
    wide = x.double().requires_grad_()
    exact = F.silu(wide)
    (exact_grad,) = torch.autograd.grad(exact, wide, torch.ones_like(exact))
    torch.testing.assert_close(out.flatten(), exact.float(), rtol=1e-6, atol=1e-36, equal_nan=True)
    torch.testing.assert_close(grad.flatten(), exact_grad.float(), rtol=1e-6, atol=1e-35, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 3, 1500), (3, 200, 90), (2, 900, 1)], ids=str)
@pytest.mark.parametrize("taps", [4, 20])
def test_same_bits_for_any_number_of_threads(
    taps: int, shape: tuple[int, int, int], dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    batch, channels, _ = shape
    inputs: list[Tensor | None] = [
        torch.randn(shape).to(dtype),
        torch.randn(channels, taps).to(dtype),
        torch.randn(channels).to(dtype),
        torch.randn(batch, channels, taps - 1).to(dtype),
    ]
    found = []
    for count in (1, 2, 3, 2):
        threads(count)
        found.append(results(effkern.short_conv, inputs, "silu"))
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in other)


def test_gradients_of_parameters_are_summed_in_float32() -> None:
    """A bfloat16 sum would stop growing at 256 times its terms."""
    x = torch.ones(4, 2, 5000, dtype=torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32):
        weight, bias = (
            torch.ones(2, 4, dtype=dtype).requires_grad_(),
            torch.ones(2, dtype=dtype).requires_grad_(),
        )
        effkern.short_conv(x, weight, bias).sum().backward()
        assert torch.equal(bias.grad, torch.full((2,), 20_000.0, dtype=dtype))  # type: ignore[arg-type]
        expected = torch.tensor([4 * (5000.0 - w) for w in (3, 2, 1, 0)]).to(dtype).expand(2, 4)
        assert torch.equal(weight.grad, expected)  # type: ignore[arg-type]


def test_only_the_gradients_that_are_wanted() -> None:
    """Frozen parameters, a frozen x, a state alone: each gives what all together give."""
    for taps in (4, 11):
        inputs = [torch.randn(2, 3, 40), torch.randn(3, taps), torch.randn(3), torch.randn(2, 3, taps - 1)]
        everything = results(effkern.short_conv, [*inputs], "silu")
        for i, name in enumerate(NAMES):
            leaves = [t.detach().requires_grad_(i == j) for j, t in enumerate(inputs)]
            out, last = effkern.short_conv(*leaves[:3], activation="silu", state=leaves[3], return_state=True)
            generator = torch.Generator().manual_seed(1)
            grads = [torch.randint(-64, 65, t.shape, generator=generator) / 32 for t in (out, last)]
            used = [(t, g) for t, g in zip((out, last), grads, strict=True) if t.requires_grad]
            (found,) = torch.autograd.grad([t for t, _ in used], leaves[i], [g for _, g in used])
            assert torch.equal(found, everything[f"grad_{name}"])


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 40), (2, 3, 2), (2, 3, 0)], ids=str)
def test_what_runs_on_a_gpu(shape: tuple[int, int, int], silu: bool) -> None:
    """The composed kernels of the key CUDA, called on the CPU."""
    x, weight, bias = torch.randn(shape), torch.randn(3, 4), torch.randn(3)
    state, grad = torch.randn(2, 3, 3), torch.randn(shape)
    ours = torch.ops.effkern.short_conv(x, weight, bias, state, silu)
    torch.testing.assert_close(dispatch._composed_forward(x, weight, bias, state, silu), ours)
    for needs in ((True, True, True, True), (False, True, False, False), (True, False, False, False)):
        for given_bias, given_state in ((bias, state), (None, None)):
            args = (grad, x, weight, given_bias, given_state, silu, *needs)
            expected = torch.ops.effkern.short_conv_backward(*args)
            for a, b in zip(dispatch._composed_backward(*args), expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_errors_of_the_backward_op() -> None:
    x, weight = torch.randn(2, 3, 8), torch.randn(3, 4)
    with pytest.raises(RuntimeError, match="grad_out has shape"):
        torch.ops.effkern.short_conv_backward(torch.randn(2, 3, 9), x, weight)


def test_autocast_leaves_float64_alone() -> None:
    x, weight = torch.randn(2, 3, 9, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        out = effkern.short_conv(x, weight)
    assert torch.equal(out, effkern.short_conv(x, weight))


def test_meta_tensors() -> None:
    for dtype in (torch.float32, torch.float64):
        x, weight = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((2, 3, 8), (3, 4)))
        out, state = effkern.short_conv(x, weight, return_state=True)
        assert out.shape == (2, 3, 8) and state.shape == (2, 3, 3)


@pytest.mark.parametrize("bias", [True, False])
def test_module_replaces_a_conv1d(bias: bool) -> None:
    conv = nn.Conv1d(6, 6, 4, groups=6, padding=3, bias=bias)
    module = effkern.nn.ShortConv.from_conv1d(conv, activation="silu")
    assert module.weight is conv.weight and module.bias is conv.bias
    x = torch.randn(2, 6, 30)
    torch.testing.assert_close(module(x), F.silu(conv(x)[..., :30]))
    fresh = effkern.nn.ShortConv(6, 4, bias)
    fresh.load_state_dict(conv.state_dict())
    torch.testing.assert_close(fresh(x), conv(x)[..., :30])
    head, state = fresh(x[..., :13], return_state=True)
    tail, state = fresh(x[..., 13:], state, return_state=True)
    torch.testing.assert_close(torch.cat((head, tail), -1), conv(x)[..., :30])
    assert torch.equal(state, x[..., -3:])


def test_module_says_what_is_wrong() -> None:
    for kwargs in ({"padding": 2}, {"padding": 3, "groups": 3}, {"padding": 3, "stride": 2}):
        conv = nn.Conv1d(6, 6, 4, **{"groups": 6, **kwargs})
        with pytest.raises(ValueError, match="ShortConv: expected a Conv1d with"):
            effkern.nn.ShortConv.from_conv1d(conv)
    with pytest.raises(ValueError, match="taps between 1 and 256, got 6 and 257"):
        effkern.nn.ShortConv(6, 257)
    with pytest.raises(ValueError, match="activation must be None or 'silu'"):
        effkern.nn.ShortConv(6, 4, activation="gelu")


def test_fresh_module_is_like_a_fresh_conv1d() -> None:
    weight = effkern.nn.ShortConv(500, 16).weight
    assert weight.shape == (500, 1, 16)
    assert 0.9 / 16**0.5 < weight.abs().max() <= 1 / 16**0.5
