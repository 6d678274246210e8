"""Long convolutions whose Fourier transform is learned: butterfly stages with free blocks in place of DFT matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effkern import backends
from effkern.ops._dispatch import FAST_DTYPES, dtype_name, require_dense, without_autocast

__all__ = ["butterfly_bytes", "butterfly_conv", "butterfly_factors", "butterfly_flops", "butterfly_radices"]

SIZES = (2, 4, 8, 16)
Factors = Mapping[int, Tensor]


def butterfly_radices(length: int) -> tuple[int, ...]:
    """The block sizes of the stages of a transform of so many positions: 16 as often as it fits into the next power of
    2, and what is left. (16, 16, 4) for 1000; none for a single position."""
    bits = (length - 1).bit_length() if length > 1 else 0
    return (16,) * (bits // 4) + ((1 << bits % 4,) if bits % 4 else ())


def butterfly_factors(
    channels: int = 1,
    *,
    length: int | None = None,
    noise: float = 0.0,
    dtype: torch.dtype = torch.complex64,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> dict[int, Tensor]:
    """Blocks to start from in `effkern.butterfly_conv`: the exact Fourier transform, or that and some noise.

        F[n][h, p, q] = exp(-2 pi i p q / n) + noise z,  z a complex normal number of variance 1

    Args:
        channels: 1 for blocks that all channels share, H for blocks of their own.
        length: only the sizes that a transform of so many positions has; None: 2, 4, 8 and 16.
        noise: the standard deviation of the noise.
        dtype: complex64, or complex128 for float64 inputs.
        device: where to make them.
        generator: of the noise.

    Returns:
        {n: (channels, n, n)}.

    Raises:
        ValueError: channels or length is below 1, or dtype is not complex64 or complex128.
    """
    if channels < 1 or (length is not None and length < 1):
        raise ValueError(
            f"butterfly_factors: channels and length must be at least 1, got {channels} and {length}"
        )
    if dtype not in (torch.complex64, torch.complex128):
        raise ValueError(f"butterfly_factors: dtype must be complex64 or complex128, got {dtype_name(dtype)}")
    found = {}
    for n in SIZES if length is None else sorted(set(butterfly_radices(length))):
        powers = torch.arange(n, device=device)
        block = _circle(powers[:, None] * powers, n, dtype).expand(channels, n, n).clone()
        if noise:
            block += noise * torch.randn(block.shape, dtype=dtype, device=device, generator=generator)
        found[n] = block
    return found


def _circle(steps: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """exp(-2 pi i steps / n), rounded once. `steps` are integers."""
    angle = (steps % n).to(torch.float64) * (-2 * math.pi / n)
    return torch.polar(torch.ones_like(angle), angle).to(dtype)


def _transform(x: Tensor, factors: Factors, radices: tuple[int, ...]) -> Tensor:
    """Along the middle axis of x (H, N, M); with DFT matrices the Fourier transform, in its usual order.

    A stage of size n takes numbers N / n apart through a block, turns number j of part p by p j steps of the circle,
    and goes on within the parts. The part's index moves behind those that are still to be split: so the last stage
    leaves them in the order last part first, which is that of the frequencies.
    """
    rest = x.shape[1]
    for n in radices:
        rest, whole = rest // n, rest
        x = factors[n] @ x.reshape(x.shape[0], n, -1)  # (H, n, rest * done * M)
        x = x.unflatten(2, (rest, -1))
        if rest > 1:
            steps = torch.arange(n, device=x.device)[:, None] * torch.arange(rest, device=x.device)
            x = x * _circle(steps, whole, x.dtype)[..., None]
        x = x.transpose(1, 2)  # (H, rest, n, done * M)
    return x.reshape(x.shape[0], math.prod(radices), -1)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(f"butterfly_conv: {message}")


def _check(u: Tensor, k: Tensor, **others: Tensor | None) -> None:
    for name, t in (("u", u), ("k", k), *others.items()):
        if not isinstance(t, Tensor) and not (t is None and name not in ("u", "k")):
            raise TypeError(f"butterfly_conv: {name} must be a tensor, got {type(t).__name__}")
    require_dense("butterfly_conv", u=u, k=k, **others)
    kinds = (*FAST_DTYPES, torch.float64)
    _require(u.dtype in kinds, f"u must be float32, bfloat16 or float16, got {dtype_name(u.dtype)}")
    _require(u.dim() == 3, f"u must have shape (B, H, L), got {tuple(u.shape)}")
    channels = u.shape[1]
    _require(
        k.dim() == 2 and k.shape[0] == channels and k.shape[1] >= 1,
        f"k must have shape ({channels}, Lk) with Lk at least 1, got {tuple(k.shape)}",
    )
    shapes = {"skip": (channels,), "pre_gate": tuple(u.shape), "post_gate": tuple(u.shape)}
    for name, t in (("k", k), *others.items()):
        if t is None:
            continue
        expected = shapes.get(name, tuple(k.shape))
        _require(tuple(t.shape) == expected, f"{name} must have shape {expected}, got {tuple(t.shape)}")
        weight = name in ("k", "skip")
        _require(
            t.dtype == u.dtype or (weight and t.dtype == torch.float32),
            f"{name} must have u's dtype{' or float32' if weight else ''}, got {dtype_name(t.dtype)} beside "
            f"{dtype_name(u.dtype)}",
        )
        _require(t.device == u.device, f"{name} is on another device than u")


def _pair(factors: Factors | tuple[Factors, Factors]) -> tuple[Factors, Factors]:
    pair = factors if isinstance(factors, tuple) else (factors, factors)
    if len(pair) != 2 or not all(isinstance(f, Mapping) for f in pair):
        found = type(factors).__name__
        raise TypeError(
            f"butterfly_conv: factors must be a mapping of sizes to blocks or a pair of them, got {found}"
        )
    return pair


def _check_factors(factors: Factors, radices: tuple[int, ...], u: Tensor, name: str) -> None:
    channels = u.shape[1]
    dtype = torch.complex128 if u.dtype == torch.float64 else torch.complex64
    for n in sorted(set(radices)):
        _require(
            n in factors,
            f"no block of size {n} in {name}; a transform of {math.prod(radices)} has stages of "
            f"{', '.join(map(str, radices))}, got sizes {sorted(factors)}",
        )
        block = factors[n]
        if not isinstance(block, Tensor):
            raise TypeError(f"butterfly_conv: {name}[{n}] must be a tensor, got {type(block).__name__}")
        require_dense("butterfly_conv", **{f"{name}[{n}]": block})
        _require(
            tuple(block.shape) in ((1, n, n), (channels, n, n)),
            f"{name}[{n}] must have shape (1, {n}, {n}) or ({channels}, {n}, {n}), got {tuple(block.shape)}",
        )
        _require(
            block.dtype == dtype,
            f"{name}[{n}] must be {dtype_name(dtype)} beside {dtype_name(u.dtype)}, got {dtype_name(block.dtype)}",
        )
        _require(block.device == u.device, f"{name}[{n}] is on another device than u")


def butterfly_conv(
    u: Tensor,
    k: Tensor,
    factors: Factors | tuple[Factors, Factors],
    *,
    skip: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    length: int | None = None,
) -> Tensor:
    """A long convolution through a transform whose butterfly blocks are given, and may be learned.

        x = pre_gate u,  w[n] = exp(i pi n / (2 N)),  N = the power of 2 from L on,  T = the transform
        out = post_gate (Re(conj(w) IFFT(T(w x) T(w k))) + skip x)

    T is the fast Fourier transform in stages of 16 and one of 2, 4 or 8 (`butterfly_radices`), where blocks F[n] stand
    in for the DFT matrices exp(-2 pi i p q / n); the turns between the stages and the inverse stay those of the Fourier
    transform. With DFT matrices (`effkern.butterfly_factors`) this is `effkern.long_conv`; with others, in general,
    outputs depend on later inputs too.

    Args:
        u: (B, H, L). float32, bfloat16, float16 or float64; any strides and device.
        k: (H, Lk) with Lk <= L, or <= `length`. float32 or u's dtype.
        factors: {n: F[n]} with F[n] (1, n, n) for all channels or (H, n, n), complex64, or complex128 for float64. Only
            the sizes that the transform has are needed. The same blocks transform u and k, unless a pair of such
            mappings is given: for u, and for k.
        skip: (H,), float32 or u's dtype: the weight of the input itself.
        pre_gate: (B, H, L), u's dtype, on the input.
        post_gate: (B, H, L), u's dtype, on the output.
        length: how many positions the transform serves, at least L; None is L. Learned blocks belong to one transform:
            inputs of several lengths need one `length`, the longest of them.

    Returns:
        out (B, H, L) in u's dtype, contiguous; differentiable in every tensor, to any order.

    Raises:
        TypeError: an argument is not a tensor, or factors is not a mapping or a pair of mappings.
        ValueError: length is below L.
        RuntimeError: shapes, dtypes or devices do not fit, the kernel is longer than the transform, or a size is
            missing; the message names the argument, what was expected and what came.

    Numerics:
        In complex64, or complex128 for float64, rounded once. Turns are exact to one rounding. Autocast changes
        nothing. Deterministic.

    Cost:
        `butterfly_flops`, `butterfly_bytes`: batched complex products, 8 N n a stage of size n for each row and each
        kernel, and one inverse FFT a row. A composition of PyTorch ops: autograd keeps two
        complex tensors of N numbers a row and stage.

    Source:
        Fu et al. 2023 (Simple Hardware-Efficient Long Convolutions for Sequence Modeling), the learned extension of
        FlashButterfly; without padding, since w makes what wraps around imaginary.
    """
    _check(u, k, skip=skip, pre_gate=pre_gate, post_gate=post_gate)
    positions = u.shape[2]
    served = max(positions, 1) if length is None else length
    if served < max(positions, 1):
        raise ValueError(f"butterfly_conv: length must be at least u's {positions} positions, got {length}")
    _require(
        k.shape[1] <= served or (length is None and positions == 0),
        f"k has {k.shape[1]} taps, the transform serves only {served} positions; cut k or give a greater length",
    )
    radices = butterfly_radices(served)
    of_inputs, of_kernels = _pair(factors)
    _check_factors(of_inputs, radices, u, "factors")
    if isinstance(factors, tuple):  # one mapping for both is checked once
        _check_factors(of_kernels, radices, u, "the kernel's factors")
    backends.record("butterfly_conv:composition")
    compute = torch.float64 if u.dtype == torch.float64 else torch.float32
    x = u.to(compute) if pre_gate is None else u.to(compute) * pre_gate.to(compute)
    with without_autocast(u):
        if u.numel() == 0:  # which FFTs refuse; the result is empty, but depends on u and k
            y = x * k.to(compute).sum(1)[:, None]
        else:
            y = _convolve(x, k.to(compute), of_inputs, of_kernels, radices)
        if skip is not None:
            y = y + skip.to(compute)[:, None] * x
        if post_gate is not None:
            y = y * post_gate.to(compute)
    return y.to(u.dtype).contiguous()


def _convolve(
    x: Tensor, k: Tensor, of_inputs: Factors, of_kernels: Factors, radices: tuple[int, ...]
) -> Tensor:
    size, positions = math.prod(radices), x.shape[2]
    dtype = torch.complex128 if x.dtype == torch.float64 else torch.complex64
    quarter = _circle(-torch.arange(size, device=x.device), 4 * size, dtype)  # w
    x = F.pad(x, (0, size - positions)) * quarter
    k = F.pad(k, (0, size - k.shape[1])) * quarter
    spectrum = _transform(x.permute(1, 2, 0), of_inputs, radices)  # (H, N, B)
    spectrum = spectrum * _transform(k[..., None], of_kernels, radices)
    y = torch.fft.ifft(spectrum.permute(2, 0, 1), dim=2)[..., :positions]
    w = quarter[:positions]
    return y.real * w.real + y.imag * w.imag


def butterfly_flops(
    u: Tensor, k: Tensor, factors: Any, *, length: int | None = None, backward: bool = False, **_: Any
) -> int:
    """8 n N a stage of size n, each row and each kernel, and 5 N log2 N an inverse; backward twice that."""
    batch, channels, positions = u.shape
    radices = butterfly_radices(max(positions, 1) if length is None else length)
    size = math.prod(radices)
    stages = 8 * size * sum(radices) * channels * (batch + 1)
    inverse = round(5 * size * math.log2(max(size, 2))) * channels * batch
    return (2 if backward else 1) * (stages + inverse)


def butterfly_bytes(
    u: Tensor,
    k: Tensor,
    factors: Factors | tuple[Factors, Factors],
    *,
    skip: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    backward: bool = False,
    **_: Any,
) -> int:
    """Every argument and the output once; backward reads the arguments and the gradient of the output, and writes the
    gradients of the arguments."""
    blocks = {id(block): block for mapping in _pair(factors) for block in mapping.values()}.values()
    given = sum(t.nbytes for t in (u, k, skip, pre_gate, post_gate, *blocks) if t is not None)
    return (2 if backward else 1) * given + u.nbytes
