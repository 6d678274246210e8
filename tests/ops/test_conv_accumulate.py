"""conv_accumulate: the definition, gradients, and decoding token by token that equals one causal convolution."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import effkern
from effkern.testing import errors


def by_definition(tile: Tensor, k_slice: Tensor, out: Tensor) -> Tensor:
    length, found = tile.shape[2], out.clone()
    for r in range(out.shape[2]):
        for s in range(length):
            found[:, :, r] += tile[:, :, s] * k_slice[:, length - s + r - 1]
    return found


def make(batch: int, channels: int, length: int, reach: int, dtype: torch.dtype) -> list[Tensor]:
    shapes = (batch, channels, length), (channels, length + reach - 1), (batch, channels, reach)
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_is_the_definition(data: st.DataObject) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))
    sizes = [draw(st.integers(1, n)) for n in (3, 4, 30, 30)]
    given = make(*sizes, torch.float64)
    torch.testing.assert_close(effkern.conv_accumulate(*given), by_definition(*given))
    path = "direct" if min(sizes[2:]) <= 8 else "fft"
    assert effkern.backends.last() == f"conv_accumulate:composition/{path}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("length", "reach"), [(1, 50), (8, 8), (64, 64), (100, 9), (33, 200)])
def test_precision(length: int, reach: int, dtype: torch.dtype) -> None:
    given = make(2, 5, length, reach, dtype)
    copies = [t.clone() for t in given]
    out = effkern.conv_accumulate(*given)
    assert out.dtype == dtype and out.is_contiguous()
    assert all(torch.equal(t, copy) for t, copy in zip(given, copies, strict=True))
    exact = by_definition(*(t.double() for t in given))
    scale = exact.abs().max().item()
    assert errors(out, exact).max_abs <= (torch.finfo(dtype).eps + 1e-6) * scale
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(effkern.conv_accumulate(*given), out)


@pytest.mark.parametrize(("length", "reach"), [(3, 5), (12, 10)])
def test_gradcheck(length: int, reach: int) -> None:
    given = [t.requires_grad_() for t in make(2, 2, length, reach, torch.float64)]
    assert torch.autograd.gradcheck(effkern.conv_accumulate, given, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(effkern.conv_accumulate, given)


def decode(step: Callable[[Tensor], Tensor], first: Tensor, k: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """u_0 = first, u_(t+1) = step(y_t), y = k * u, each position final before the next input is known."""
    batch, channels = first.shape
    u, y = torch.zeros(batch, channels, length), torch.zeros(batch, channels, length)
    u[:, :, 0] = first
    for t in range(length):
        y[:, :, t] += k[:, 0] * u[:, :, t]
        if t + 1 == length:
            break
        u[:, :, t + 1] = step(y[:, :, t])
        size = (t + 1) & -(t + 1)  # the largest power of 2 that divides t + 1
        reach = min(size, length - t - 1)
        after = slice(t + 1, t + 1 + reach)
        y[:, :, after] = effkern.conv_accumulate(
            u[:, :, t + 1 - size : t + 1], k[:, 1 : size + reach], y[:, :, after]
        )
    return u, y


@pytest.mark.parametrize("length", [1, 2, 64, 100, 257])
def test_online_decoding_is_the_causal_convolution(length: int) -> None:
    channels = 6
    k = torch.randn(channels, length) / (1 + torch.arange(length))
    mix = torch.randn(channels, channels) / channels**0.5
    u, y = decode(lambda now: torch.tanh(now @ mix), torch.randn(2, channels), k, length)
    padded = torch.nn.functional.pad(u.double(), (length - 1, 0))
    at_once = torch.nn.functional.conv1d(padded, k.double().flip(1)[:, None], groups=channels)
    torch.testing.assert_close(y.double(), at_once, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(u[:, :, 1:], torch.tanh(y.mT[:, :-1] @ mix).mT)


def test_compiles_without_a_break() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(effkern.conv_accumulate, fullgraph=True, dynamic=True, backend="aot_eager")
    for sizes in ((2, 3, 4, 5), (2, 3, 20, 30), (3, 4, 40, 17)):
        given = make(*sizes, torch.float32)
        torch.testing.assert_close(compiled(*given), effkern.conv_accumulate(*given))


def test_strides_and_no_rows() -> None:
    tile, k, out = make(2, 3, 12, 10, torch.float32)
    strided = [
        t.T.contiguous().T if t.dim() == 2 else t.permute(2, 1, 0).contiguous().permute(2, 1, 0)
        for t in (tile, k, out)
    ]
    torch.testing.assert_close(effkern.conv_accumulate(*strided), effkern.conv_accumulate(tile, k, out))
    assert effkern.conv_accumulate(tile[:0], k, out[:0]).shape == (0, 3, 10)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"tile": torch.ones(3, 4)}, RuntimeError, r"tile must have shape \(batch, channels, T\)"),
        ({"out": torch.ones(2, 4, 5)}, RuntimeError, r"out must have shape \(2, 3, R\), got \(2, 4, 5\)"),
        ({"k_slice": torch.ones(3, 9)}, RuntimeError, r"k_slice must have shape \(3, 8\), the lags 1 to"),
        ({"k_slice": torch.ones(3, 8).half()}, RuntimeError, "k_slice is float16 but tile is float32"),
        ({"out": torch.ones(2, 3, 5).double()}, RuntimeError, "out is float64 but tile is float32"),
        ({"tile": torch.ones(2, 3, 4).long()}, RuntimeError, "tile must be a floating dtype, got int64"),
        ({"out": torch.ones(2, 3, 0)}, RuntimeError, "tile has 4 positions and out 0, expected at least 1"),
        ({"out": torch.ones(2, 3, 5, device="meta")}, RuntimeError, "out is on another device"),
        ({"tile": [1.0]}, TypeError, "tile must be a tensor, got list"),
    ],
    ids=str,
)
def test_says_what_is_wrong(change: dict, error: type[Exception], match: str) -> None:
    given = {"tile": torch.ones(2, 3, 4), "k_slice": torch.ones(3, 8), "out": torch.ones(2, 3, 5)}
    with pytest.raises(error, match=f"conv_accumulate: {match}"):
        effkern.conv_accumulate(**{**given, **change})
