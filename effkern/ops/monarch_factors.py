"""Monarch matrices themselves: the best one for a dense matrix, the dense one of two factors, stacks of factors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effkern.ops._dispatch import require_dense, without_autocast
from effkern.ops._monarch_checks import check_factors, check_kinds
from effkern.ops.monarch import block_diag_matmul, monarch_matmul

__all__ = ["monarch_chain", "monarch_dense", "monarch_project"]


def monarch_project(weight: Tensor, nblocks: int, rank: int = 1) -> tuple[Tensor, Tensor]:
    """The Monarch matrix closest to a dense one in the Frobenius norm.

    With k = l = nblocks, the entries of the weight that an input block kk and an output block ll share form a slice of
    m / nblocks rows and n / nblocks columns. A Monarch matrix is exactly a weight all of whose slices have rank `rank`,
    so the best one comes from the leading singular pairs of every slice, sqrt(sigma) on both sides.

    Args:
        weight: (m, n), rows are outputs, as in torch.nn.Linear. Any floating or complex dtype, any strides; detached.
        nblocks: divides m and n.
        rank: singular pairs kept of every slice, 1 to min(m, n) / nblocks.

    Returns:
        w1 (nblocks, nblocks rank, n / nblocks) and w2 (nblocks, m / nblocks, nblocks rank), in the weight's dtype, for
        `effkern.monarch_matmul`; `effkern.monarch_dense` multiplies them out again.

    Raises:
        TypeError: weight is not a tensor of floating or complex numbers.
        ValueError: weight is not a finite matrix or a meta tensor, nblocks does not divide m or n, or rank is out of
            its range.

    Numerics:
        In float64 (complex128), rounded once. The singular vectors are eigenvectors of the smaller Gram matrix of each
        slice, which costs a few times less than a singular value decomposition; the error is that of the optimum to
        about 1e-7 of the norm. The sign of a singular pair is arbitrary.

    Cost:
        nblocks^2 symmetric eigenproblems of order min(m, n) / nblocks.

    Source:
        Dao et al. 2022 (Monarch), section 3.3 and theorem 1; rank above 1 as in its appendix on rectangular blocks.
    """
    check_kinds("monarch_project", weight=weight)
    require_dense("monarch_project", weight=weight)
    if not (weight.is_floating_point() or weight.is_complex()):
        raise TypeError(f"monarch_project: weight must be floating or complex, got {weight.dtype}")
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"monarch_project: weight must be a matrix (m, n), got shape {tuple(weight.shape)}")
    m, n = weight.shape
    if nblocks < 1 or m % nblocks or n % nblocks:
        raise ValueError(
            f"monarch_project: nblocks {nblocks} does not divide both sizes of weight ({m}, {n})"
        )
    s, p = m // nblocks, n // nblocks
    if not 1 <= rank <= min(s, p):
        raise ValueError(f"monarch_project: rank must be between 1 and {min(s, p)}, got {rank}")
    if weight.is_meta:
        raise ValueError("monarch_project: weight must have numbers, got a meta tensor")
    with torch.no_grad():
        wide = weight.to(torch.complex128 if weight.is_complex() else torch.float64)
        if not wide.isfinite().all():
            raise ValueError("monarch_project: weight has entries that are not finite")
        slices = wide.reshape(s, nblocks, nblocks, p).permute(1, 2, 0, 3)  # (l, k, s, p)
        left, right = _leading_pairs(slices, rank)  # (l, k, s, rank), (l, k, rank, p)
        w1 = right.permute(1, 2, 0, 3).reshape(nblocks, rank * nblocks, p)  # rows (rank, l)
        w2 = left.permute(0, 2, 1, 3).reshape(nblocks, s, nblocks * rank)  # columns (k, rank)
        return w1.to(weight.dtype), w2.to(weight.dtype)


def _leading_pairs(slices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U sqrt(S) and sqrt(S) V^H of the leading singular pairs."""
    rows, columns = slices.shape[-2:]
    if rows > columns:
        right, left = _leading_pairs(slices.mH, rank)
        return left.mH, right.mH
    # Scaled to 1, so that squares neither overflow nor vanish.
    size = slices.abs().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    scaled = slices / size
    _, vectors = torch.linalg.eigh(scaled @ scaled.mH)  # ascending
    u = vectors[..., -rank:].flip(-1)
    projected = (
        u.mH @ scaled
    )  # S V^H; U U^H A is the best approximation, however exact its singular values are
    sigma = projected.norm(dim=-1, keepdim=True)
    root, half = sigma.sqrt(), size.sqrt()
    # A slice of lower rank has pairs of nothing; they stay zero.
    right = torch.where(sigma > 0, projected / root.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    return u * root.mT * half, right * half


def monarch_dense(w1: Tensor, w2: Tensor) -> Tensor:
    """The dense weight of a Monarch matrix: F.linear(x, monarch_dense(w1, w2)) = monarch_matmul(x, w1, w2).

    Args:
        w1: (k, q, p).
        w2: (l, s, r), w1's dtype and device, with l r = k q.

    Returns:
        weight (l s, k p), rows in the order of monarch_matmul's output; differentiable to any order.

    Raises:
        TypeError: an argument is not a tensor.
        RuntimeError: as `effkern.monarch_matmul`.

    Numerics:
        Products in the dtype of the factors, as torch.matmul; autocast changes nothing.

    Cost:
        2 m n q / l where l divides q; else that of multiplying the identity.

    Source:
        Dao et al. 2022 (Monarch), section 3.3 (reverse sparsification).

    Example:
        >>> effkern.monarch_dense(torch.ones(2, 2, 2), torch.ones(2, 2, 2)).shape
        torch.Size([4, 4])
    """
    check_kinds("monarch_dense", w1=w1, w2=w2)
    require_dense("monarch_dense", w1=w1, w2=w2)
    check_factors("monarch_dense", w1, w2)
    with without_autocast(w1):
        return _multiply_out(w1, w2)


def _multiply_out(w1: Tensor, w2: Tensor) -> Tensor:
    (k, q, p), (l, s, _) = w1.shape, w2.shape
    if q % l:
        identity = torch.eye(k * p, dtype=w1.dtype, device=w1.device)
        return monarch_matmul(identity, w1, w2, backend="reference").mT
    right = w1.unflatten(1, (q // l, l)).permute(2, 0, 1, 3)  # (l, k, rank, p)
    left = w2.unflatten(2, (k, q // l)).transpose(1, 2)  # (l, k, s, rank)
    return (left @ right).permute(2, 0, 1, 3).reshape(s * l, k * p)


def monarch_chain(x: Tensor, factors: Sequence[Tensor], *, backend: str | None = None) -> Tensor:
    """Multiplies by a stack of block-diagonal factors with the Monarch permutation between neighbours.

    The result of each factor, block after block, is read as (r, l) with l fastest, and column ll is the input of block
    ll of the next factor; after the last one the blocks are interleaved once more, so that two factors are
    `effkern.monarch_matmul`.

    Args:
        x: (..., k1 p1). Dtypes as in `effkern.monarch_matmul`.
        factors: w_i (k_i, q_i, p_i), at least one, with k_(i+1) p_(i+1) = k_i q_i; x's dtype.
        backend: "cpu" or "reference"; with two factors as in `effkern.monarch_matmul`.

    Returns:
        out (..., k q) of the last factor, differentiable in x and every factor. One factor is `block_diag_matmul`.

    Raises:
        ValueError: there are no factors.
        TypeError, RuntimeError, effkern.backends.Unavailable: as `effkern.monarch_matmul`.

    Numerics:
        As `effkern.monarch_matmul`; after the second factor and each that follows results are rounded to x's dtype.

    Cost:
        2 sum k q p a token. The first two factors in one pass, each further one in a pass and a shuffle of its own.

    Source:
        Fu et al. 2023 (Monarch Mixer), section 3: order-p Monarch matrices.
    """
    factors = list(factors)
    if not factors:
        raise ValueError("monarch_chain: factors is empty, expected at least one")
    first, *rest = factors
    if not rest:
        return block_diag_matmul(x, first, backend=backend)
    out = monarch_matmul(
        x, first, rest[0], output_order="s_major" if len(rest) == 1 else "l_major", backend=backend
    )
    for i, factor in enumerate(rest[1:], 3):
        check_kinds("monarch_chain", factor=factor)
        if factor.dim() != 3 or out.shape[-1] != factor.shape[0] * factor.shape[2]:
            raise RuntimeError(
                f"monarch_chain: factor {i} must have shape (blocks, rows, columns) with blocks * columns = "
                f"{out.shape[-1]}, got {tuple(factor.shape)}"
            )
        blocks, rows, columns = factor.shape
        shuffled = out.unflatten(-1, (columns, blocks)).transpose(-1, -2).flatten(-2)
        out = block_diag_matmul(shuffled, factor, backend=backend)
        if i == len(factors):
            out = out.unflatten(-1, (blocks, rows)).transpose(-1, -2).flatten(-2)
    return out
