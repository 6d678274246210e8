"""Flops and bytes of attention: what the docstring promises, the harness divides by and FlopCounterMode counts."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def _staircase(first: int, rows: int) -> int:
    """Sum of max(0, x) over x = first, first + 1, ..., first + rows - 1."""

    def triangle(n: int) -> int:
        return n * (n + 1) // 2 if n > 0 else 0

    return triangle(first + rows - 1) - triangle(first - 1)


def visible_pairs(sq: int, sk: int, causal: bool, top_left: bool) -> int:
    """How many (query, key) pairs one head computes. Exact, also where rows see no key or all keys."""
    if not causal:
        return sq * sk
    first = 1 if top_left else sk - sq + 1
    return _staircase(first, sq) - _staircase(first - sk, sq)


def _total_pairs(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    top_left: bool,
) -> int:
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return q.shape[0] * q.shape[1] * visible_pairs(q.shape[2], k.shape[2], causal, top_left)
    if isinstance(cu_seqlens_q, FakeTensor) or cu_seqlens_q.is_meta:
        # Without values the lengths are unknown: one sequence, the upper bound.
        return q.shape[0] * visible_pairs(q.shape[1], k.shape[1], causal, top_left)
    lengths = zip(cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist(), strict=True)
    return q.shape[0] * sum(visible_pairs(sq, sk, causal, top_left) for sq, sk in lengths)


def attention_flops(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    align: str = "bottom_right",
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    backward: bool = False,
    **_: Any,
) -> int:
    """Multiplications and additions of the matrix products, over the visible pairs only.

    Forward: 2 (D + Dv) a pair. Backward: 2 (3 D + 2 Dv), the scores being computed again. Meta tensors will do.
    """
    pairs = _total_pairs(q, k, cu_seqlens_q, cu_seqlens_k, causal, align == "top_left")
    d, dv = q.shape[-1], v.shape[-1]
    return pairs * 2 * (3 * d + 2 * dv if backward else d + dv)


def attention_bytes(q: Tensor, k: Tensor, v: Tensor, *, backward: bool = False, **_: Any) -> int:
    """Bytes that must cross memory once: q, k, v, out, lse; backward reads those and grad_out, writes the gradients."""
    size = q.element_size()
    rows = q.numel() // q.shape[-1]
    inputs = (q.numel() + k.numel() + v.numel()) * size
    outputs = rows * v.shape[-1] * size
    lse = rows * 4
    return 2 * inputs + 2 * outputs + lse if backward else inputs + outputs + lse


def forward_formula(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    top_left: bool = False,
    **_: Any,
) -> int:
    """`attention_flops` with the arguments of the dispatcher op."""
    align = "top_left" if top_left else "bottom_right"
    return attention_flops(
        q, k, v, causal=causal, align=align, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k
    )


def backward_formula(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    top_left: bool = False,
    **_: Any,
) -> int:
    align = "top_left" if top_left else "bottom_right"
    return attention_flops(
        q,
        k,
        v,
        causal=causal,
        align=align,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        backward=True,
    )
