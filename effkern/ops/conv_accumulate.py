"""What a finished piece of input adds to the outputs after it: the one step of exact online long convolution."""

from __future__ import annotations

import torch
from torch import Tensor

from effkern import backends
from effkern.ops._dispatch import FAST_DTYPES, dtype_name, require_dense, without_autocast

__all__ = ["conv_accumulate"]

# Up to so many positions on the shorter side the products of a matrix are faster than three transforms.
MOST_DIRECT = 8


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(f"conv_accumulate: {message}")


def _check(tile: Tensor, k_slice: Tensor, out: Tensor) -> None:
    for name, t in (("tile", tile), ("k_slice", k_slice), ("out", out)):
        if not isinstance(t, Tensor):
            raise TypeError(f"conv_accumulate: {name} must be a tensor, got {type(t).__name__}")
    require_dense("conv_accumulate", tile=tile, k_slice=k_slice, out=out)
    allowed = (*FAST_DTYPES, torch.float64)
    _require(tile.dtype in allowed, f"tile must be a floating dtype, got {dtype_name(tile.dtype)}")
    _require(tile.dim() == 3, f"tile must have shape (batch, channels, T), got {tuple(tile.shape)}")
    batch, channels, length = tile.shape
    _require(
        out.dim() == 3 and out.shape[:2] == tile.shape[:2],
        f"out must have shape ({batch}, {channels}, R), got {tuple(out.shape)}",
    )
    reach = out.shape[2]
    _require(length >= 1 and reach >= 1, f"tile has {length} positions and out {reach}, expected at least 1")
    lags = (channels, length + reach - 1)
    _require(
        tuple(k_slice.shape) == lags,
        f"k_slice must have shape {lags}, the lags 1 to T + R - 1, got {tuple(k_slice.shape)}",
    )
    for name, t in (("k_slice", k_slice), ("out", out)):
        _require(
            t.dtype == tile.dtype, f"{name} is {dtype_name(t.dtype)} but tile is {dtype_name(tile.dtype)}"
        )
        _require(t.device == tile.device, f"{name} is on another device than tile")


def conv_accumulate(tile: Tensor, k_slice: Tensor, out: Tensor) -> Tensor:
    """Adds what T inputs in a row contribute, through a long convolution, to the R outputs right after them.

        result[b, h, r] = out[b, h, r] + sum_s tile[b, h, s] k[h, T - s + r],  0 <= s < T, 0 <= r < R

    k is the kernel by its lag; lag 0, an input's own output, is the caller's. Where outputs feed back as inputs, as in
    generating text, an exact convolution cannot be one transform, but it can be a tiling of all pairs of positions by
    such steps: after input i (counted from 1), with T the largest power of 2 that divides i, the last T inputs are
    added to the next T outputs. L inputs then cost O(L log^2 L) in place of O(L^2).

    Args:
        tile: (B, H, T), inputs. float32, bfloat16, float16 or float64; any strides.
        k_slice: (H, T + R - 1), lags 1 to T + R - 1 of the kernel: k[:, 1 : T + R]. tile's dtype.
        out: (B, H, R), what these outputs have so far. tile's dtype.

    Returns:
        A new tensor (B, H, R), contiguous, in out's dtype; differentiable in all three to any order.

    Raises:
        TypeError: an argument is not a tensor.
        RuntimeError: shapes, dtypes or devices do not fit, or T or R is 0; the message names the argument, what was
            expected and what came.

    Numerics:
        In float32 (float64 for float64), added to `out` and rounded once. Up to 8 positions on the shorter side by
        products, else by transforms, whose error is relative to the largest numbers. Autocast changes nothing.

    Cost:
        2 B H T R, or three real transforms of T + R numbers a row: sizes T + R without large prime factors are fast.

    Source:
        Oncescu et al. 2024 (FlashInference: Near-Linear Inference for Long Convolution Sequence Models), section 3.
    """
    _check(tile, k_slice, out)
    length, reach = tile.shape[2], out.shape[2]
    compute = torch.float64 if tile.dtype == torch.float64 else torch.float32
    x, k = tile.to(compute), k_slice.to(compute)
    with without_autocast(tile):
        if min(length, reach) <= MOST_DIRECT or tile.numel() == 0:  # MKL refuses transforms of no rows
            backends.record("conv_accumulate:composition/direct")
            added = _direct(x, k, reach)
        else:
            backends.record("conv_accumulate:composition/fft")
            added = _transformed(x, k, reach)
        return (out.to(compute) + added).to(out.dtype).contiguous()


def _direct(x: Tensor, k: Tensor, reach: int) -> Tensor:
    lags = k.unfold(1, reach, 1)  # (H, T, R): row s has the lags from s + 1 on
    return (x.flip(2).transpose(0, 1) @ lags).transpose(0, 1)


def _transformed(x: Tensor, k: Tensor, reach: int) -> Tensor:
    """Entries T - 1 to T + R - 2 of the convolution; a circle of T + R wraps only what comes before them."""
    length = x.shape[2]
    circle = length + reach
    product = torch.fft.rfft(x, circle) * torch.fft.rfft(k, circle)
    return torch.fft.irfft(product, circle)[:, :, length - 1 : length + reach - 1]
