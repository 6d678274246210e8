"""Products with palettised weights: the dense weight is never in memory."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from effkern import backends
from effkern.ops import registry
from effkern.ops._cluster_checks import require
from effkern.ops._dispatch import (
    FAST_DTYPES,
    autocast_dtype,
    dtype_name,
    refuse_all_but_fast,
    refuse_all_but_floating,
    refuse_forward_mode,
    require_dense,
    triton_refusal,
    without_autocast,
)
from effkern.ops._palettized_linear_dispatch import DOUBLE_BACKWARD, NAME
from effkern.ops._palettized_linear_samples import bad_samples, calls, samples
from effkern.ops.palettize import Palette
from effkern.reference import palettized_linear as reference

__all__ = ["eora_factors", "palettized_linear", "palettized_linear_bytes", "palettized_linear_flops"]

_OPS = torch.ops.effkern


def palettized_linear_flops(x: Tensor, palette: Palette, *_: Any, backward: bool = False, **__: Any) -> int:
    """2 a weight and token, twice that backward. Low-rank factors are matmuls of their own."""
    tokens = x.numel() // max(1, x.shape[-1])
    return (4 if backward else 2) * tokens * math.prod(palette.shape)


def palettized_linear_bytes(
    x: Tensor, palette: Palette, bias: Tensor | None = None, *, backward: bool = False, **_: Any
) -> int:
    """Tokens in and out, indices and tables once; backward twice the indices."""
    out = x.numel() // max(1, x.shape[-1]) * palette.shape[0] * x.element_size()
    weight = palette.indices.nbytes + palette.lut.nbytes
    held = 0 if bias is None else bias.nbytes
    return (2 if backward else 1) * (x.nbytes + weight + held) + out


def _check(x: Tensor, palette: Palette, bias: Tensor | None, low_rank: Any) -> None:
    for name, t in (("x", x), ("bias", bias)):
        if not isinstance(t, Tensor) and not (t is None and name == "bias"):
            raise TypeError(f"{NAME}: {name} must be a tensor, got {type(t).__name__}")
    if not isinstance(palette, Palette):
        raise TypeError(f"{NAME}: palette must be a Palette, got {type(palette).__name__}")
    allowed = (*FAST_DTYPES, torch.float64)
    require(
        NAME,
        x.dtype in allowed,
        f"x must be float32, bfloat16, float16 or float64, got {dtype_name(x.dtype)}",
    )
    rows, features = palette.shape[0], math.prod(palette.shape[1:])
    require(NAME, len(palette.shape) > 1, "palette must be of a matrix, not of a vector")
    if x.dim() < 1 or x.shape[-1] != features:
        raise RuntimeError(f"{NAME}: x must have {features} features, got shape {tuple(x.shape)}")
    same = palette.indices.device == x.device and palette.lut.device == x.device
    require(NAME, same, "palette is on another device than x")
    # Messages with sizes are put together where they are needed only: a compiler may not know the sizes yet.
    if bias is not None:
        if bias.dim() != 1 or bias.shape[0] != rows:
            raise RuntimeError(f"{NAME}: bias must have shape ({rows},), got {tuple(bias.shape)}")
        require(NAME, bias.is_floating_point(), f"bias must be floating, got {dtype_name(bias.dtype)}")
        require(NAME, bias.device == x.device, "bias is on another device than x")
    if low_rank is None:
        return
    pair = isinstance(low_rank, tuple | list) and len(low_rank) == 2
    if not pair or not all(isinstance(t, Tensor) and t.is_floating_point() for t in low_rank):
        raise TypeError(f"{NAME}: low_rank must be two tensors of floating numbers")
    first, second = low_rank
    require_dense(NAME, **{"low_rank[0]": first, "low_rank[1]": second})
    if first.dim() != 2 or first.shape[1] != features:
        raise RuntimeError(f"{NAME}: low_rank[0] must have shape (r, {features}), got {tuple(first.shape)}")
    if second.dim() != 2 or second.shape[0] != rows or second.shape[1] != first.shape[0]:
        wanted = (rows, first.shape[0])
        raise RuntimeError(f"{NAME}: low_rank[1] must have shape {wanted}, got {tuple(second.shape)}")
    same = first.device == x.device and second.device == x.device
    require(NAME, same, "low_rank is on another device than x")


def palettized_linear(
    x: Tensor,
    palette: Palette,
    bias: Tensor | None = None,
    *,
    low_rank: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> Tensor:
    """A linear layer whose weight is a palette.

        out = x W^T + bias  [+ (x A^T) B^T]          W[o, i] = lut[index[o, i]]

    Args:
        x: (..., in). float32, bfloat16 or float16; float64 through the reference. Any strides.
        palette: of a weight (out, in) (or (out, ...), flattened), as `effkern.palettize` makes it. The dtype of its
            table need not be that of x.
        bias: (out), any floating dtype.
        low_rank: (A, B), A (r, in) and B (out, r), any floating dtype: a correction of the weight by B A, such as
            `effkern.eora_factors` gives.
        backend: "cpu", "triton" (palettes of dim 1) or "reference"; None leaves the choice to `effkern.backends`.

    Returns:
        out (..., out), contiguous, in x's dtype; differentiable in x, palette.lut, bias, A and B. The indices are
        constants.

    Raises:
        TypeError: x or bias is not a tensor, palette not a Palette, low_rank not two tensors.
        ValueError: backend is unknown.
        RuntimeError: shapes, dtypes or devices do not fit; the message names the argument, what was expected and what
            came.
        effkern.backends.Unavailable: the backend asked for cannot run.
        NotImplementedError: differentiated twice or in forward mode, on any backend but the reference.

    Numerics:
        Tables, products and sums in float32, also those of A and B; rounded once at the end. Where the CPU multiplies
        bfloat16 (AVX512-BF16, AMX), more than 6 tokens and a table that both are bfloat16 go through that, which loses
        no digit of a product and sums in float32; numbers below 2^-126 count as 0 there. Backward is in float32 on all
        CPUs, so there bfloat16 gains no speed; the gradient of the table is summed in float64. Deterministic: the bits
        do not depend on the number of threads. Under autocast x is cast to the autocast dtype, nothing else is.

    Cost:
        `palettized_linear_flops`, `palettized_linear_bytes`. Up to 6 tokens, indices are unpacked, looked up (up to 4
        bits by permutations of a register that is the table) and multiplied in registers; what takes the time is this
        work, hardly the reading. With more, some rows at a time are looked up into the cache and multiplied from there.
        Backward looks the weight up again, and makes the gradient of the dense weight 16 rows at a time. Through Triton
        up to 8 tokens are few, and more go through tensor cores: 16-bit x and table of one dtype as they are, others as
        float32.

    Source:
        Cho et al. 2022 (DKM); Kim et al. 2023 (SqueezeLLM), section 4.3, for products with looked up weights; Liu et
        al. 2024 (EoRA: Training-free compensation for compressed LLM with eigenspace low-rank approximation).
    """
    _check(x, palette, bias, low_rank)
    name = backends.forced() if backend is None else backend
    if name is not None:
        backends.check_name(name)
        if name != "reference":
            backends.select(NAME, x.device.type, x.dtype, {}, name)
    usable = x.dtype in FAST_DTYPES and x.device.type in ("cpu", "cuda", "meta")
    usable = usable and palette.lut.dtype in FAST_DTYPES
    x = x.to(autocast_dtype(x))
    with without_autocast(x):
        if name == "reference" or (name is None and not usable):
            backends.record(f"{NAME}:reference")
            return reference.palettized_linear(x, palette, bias, low_rank=low_rank)
        factors = () if low_rank is None else low_rank
        refuse_forward_mode(NAME, x, palette.lut, bias, *factors)
        if bias is not None and bias.dtype not in FAST_DTYPES:
            bias = bias.float()
        weight = (palette.indices, palette.lut, palette.bits, palette.groups, palette.dim)
        kernel = _OPS.palettized_linear_triton if name == "triton" else _OPS.palettized_linear
        out = kernel(x, *weight, bias, low_rank is not None)
        if low_rank is None:
            return out
        first, second = (factor.float() for factor in low_rank)
        return (out + x.float() @ first.mT @ second.mT).to(x.dtype)


def eora_factors(weight: Tensor, palette: Palette, covariance: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The low-rank correction of a palettised weight that a layer's inputs see least of the error with.

        C = Q L Q^T          B A' = the leading singular pairs of (W - W_palette) Q L^(1/2)          A = A' L^(-1/2) Q^T

    Args:
        weight: (out, in), what was palettised.
        palette: of weight.
        covariance: (in, in), E[x x^T] of the inputs, symmetric; any factor.
        rank: r, 1 to min(out, in).

    Returns:
        A (r, in) and B (out, r), float32, contiguous, for low_rank of `effkern.palettized_linear`.

    Raises:
        ValueError: shapes do not fit, rank is out of its range, or covariance is not finite.

    Numerics:
        In float64. Directions that the inputs never take (eigenvalues below 1e-12 of the largest) are left alone.

    Source:
        Liu et al. 2024 (EoRA), section 3.
    """
    op = "eora_factors"
    shape = tuple(weight.shape)
    require(op, shape == palette.shape and len(shape) == 2, f"weight has shape {shape}", ValueError)
    inputs = shape[1]
    fits = tuple(covariance.shape) == (inputs, inputs) and bool(covariance.isfinite().all())
    require(op, fits, f"covariance must be finite, of shape ({inputs}, {inputs})", ValueError)
    require(op, 1 <= rank <= min(shape), f"rank must be between 1 and {min(shape)}, got {rank}", ValueError)
    with torch.no_grad():
        error = weight.double() - palette.to_dense().double()
        values, vectors = torch.linalg.eigh(covariance.double())
        root = values.clamp(min=0.0).sqrt()
        taken = root > 1e-6 * root.amax()
        u, s, v = torch.linalg.svd(error @ vectors * root, full_matrices=False)
        scale = torch.where(taken, 1.0 / torch.where(taken, root, 1.0), 0.0)
        split = s[:rank].sqrt()
        first = split[:, None] * v[:rank] * scale @ vectors.mT
        second = u[:, :rank] * split
        return first.float().contiguous(), second.float().contiguous()  # as files want them


registry.register(
    registry.OpSpec(
        name=NAME,
        family="dkm",
        public=palettized_linear,
        reference=reference.palettized_linear,
        schemas=tuple(f"{NAME}{kind}" for kind in ("", "_backward", "_triton", "_triton_backward")),
        backends=(
            registry.Backend("cpu", ("cpu",), refuse_all_but_fast),
            registry.Backend(
                "triton", (), triton_refusal(NAME), note="unverified on hardware", automatic=False
            ),
            registry.Backend("reference", (), refuse_all_but_floating, note="plain PyTorch"),
        ),
        dtypes=(*FAST_DTYPES, torch.float64),
        sizes={},
        samples=samples,
        bad_samples=bad_samples,
        calls=calls,
        flops=palettized_linear_flops,
        bytes=palettized_linear_bytes,
        double_backward=DOUBLE_BACKWARD,
        batched=(0,),
    )
)
