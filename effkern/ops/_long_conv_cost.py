"""Flops and bytes of the long convolutions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from effkern.ops._long_conv_spectrum import Spectrum


def op_flops(shape: Sequence[int], history: int, k: Tensor, prepared: bool, backward: bool) -> int:
    """Of the dispatcher's op, whose u (B, H, history + L) has that shape."""
    batch, channels, positions = shape
    kinds = k.dim() - 1  # taps that look back, and those that look ahead
    direct = 2 * batch * channels * (positions - history) * k.shape[-1] * kinds
    # Forward the input, the kernel and the product; backward input, gradient, kernel and both products.
    transforms = batch * channels * (3 if backward else 2)
    transforms += channels * kinds * (int(not prepared) + int(backward))
    fft = transforms * 5 * positions * math.log2(max(positions, 2))
    return min(2 * direct if backward else direct, round(fft))


def long_conv_flops(
    u: Tensor, k: Tensor | Spectrum, *, state: Tensor | None = None, backward: bool = False, **_: Any
) -> int:
    """5 N log2 N a complex transform of N numbers, those of a row and its state: 2 a row and 1 a kernel forward, 3 and
    2 backward; a spectrum saves one of the kernel's. Or, where that is less, 2 a tap and output, twice that backward.
    """
    prepared, taps = (True, k.k) if isinstance(k, Spectrum) else (False, k)
    history = 0 if state is None else state.shape[2]
    return op_flops((*u.shape[:2], u.shape[2] + history), history, taps, prepared, backward)


def long_conv_bytes(
    u: Tensor,
    k: Tensor | Spectrum,
    *,
    skip: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    state: Tensor | None = None,
    backward: bool = False,
    **_: Any,
) -> int:
    """Every argument and the output once; backward reads the arguments and the gradient of the output, and writes the
    gradients of the arguments."""
    taps = k.k if isinstance(k, Spectrum) else k
    given = sum(t.nbytes for t in (u, taps, skip, pre_gate, post_gate, state) if t is not None)
    return (2 if backward else 1) * given + u.nbytes
