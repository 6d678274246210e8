"""Monarch products in plain PyTorch, differentiable to any order: batched matmuls with the permutation written out."""

from __future__ import annotations

from torch import Tensor


def block_diag_matmul(x: Tensor, w: Tensor) -> Tensor:
    """out[kk q + j] = sum_i w[kk, j, i] x[kk p + i]; shapes as `effkern.block_diag_matmul`."""
    k, q, p = w.shape
    rows = x.reshape(-1, k, p).transpose(0, 1)  # (k, tokens, p)
    return (rows @ w.mT).transpose(0, 1).reshape(*x.shape[:-1], k * q).contiguous()


def monarch_matmul(
    x: Tensor, w1: Tensor, w2: Tensor, bias: Tensor | None = None, *, output_order: str = "s_major"
) -> Tensor:
    """Shapes as `effkern.monarch_matmul`; 16-bit dtypes round the middle."""
    l, s, r = w2.shape
    mid = block_diag_matmul(x, w1).reshape(-1, r, l).permute(2, 0, 1)  # (l, tokens, r)
    out = mid @ w2.mT  # (l, tokens, s)
    order = (1, 0, 2) if output_order == "l_major" else (1, 2, 0)
    out = out.permute(order).reshape(*x.shape[:-1], l * s).contiguous()
    return out if bias is None else out + bias
