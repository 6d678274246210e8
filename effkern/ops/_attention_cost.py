"""Flops and bytes of attention: what the docstring promises, the harness divides by and FlopCounterMode counts."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from effkern.masks import Lowered, Mask
from effkern.ops._attention_options import Options, lower
from effkern.ops._attention_pairs import total_pairs


def _flops(pairs: int, q: Tensor, v: Tensor, backward: bool) -> int:
    d, dv = q.shape[-1], v.shape[-1]
    return pairs * 2 * (3 * d + 2 * dv if backward else d + dv)


def attention_flops(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    align: str = "bottom_right",
    mask: Mask | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    backward: bool = False,
    **_: Any,
) -> int:
    """Multiplications and additions of the matrix products, over the visible pairs only.

    Forward: 2 (D + Dv) a pair. Backward: 2 (3 D + 2 Dv), the scores being computed again. Meta tensors will do; where
    the tensors of a mask have no values, every pair counts that they might show. What a bias hides is counted.
    """
    lowered = Lowered() if mask is None else lower(mask)
    pairs = total_pairs(q, k, cu_seqlens_q, cu_seqlens_k, causal, align == "top_left", lowered)
    return _flops(pairs, q, v, backward)


def attention_bytes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | None = None,
    bias: Tensor | None = None,
    backward: bool = False,
    **_: Any,
) -> int:
    """Bytes that must cross memory once: q, k, v, out, lse, the tensors of a mask, a bias.

    The backward reads those and grad_out, writes the gradients, and counts that of the bias.
    """
    size = q.element_size()
    rows = q.numel() // q.shape[-1]
    inputs = (q.numel() + k.numel() + v.numel()) * size
    outputs = rows * v.shape[-1] * size
    lse = rows * 4
    extra = 0 if bias is None else bias.numel() * (bias.element_size() + (4 if backward else 0))
    if mask is not None:
        extra += sum(t.numel() * t.element_size() for t in mask.lower() if isinstance(t, Tensor))
    return extra + (2 * inputs + 2 * outputs + lse if backward else inputs + outputs + lse)


def forward_formula(q: Tensor, k: Tensor, v: Tensor, *options: Any, **named: Any) -> int:
    """`attention_flops` with the arguments of the dispatcher op."""
    return _flops(_pairs(q, k, *options, **named), q, v, False)


def backward_formula(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *options: Any,
    bias_grad: bool = False,
    **named: Any,
) -> int:
    return _flops(_pairs(q, k, *options[: len(Options._fields)], **named), q, v, True)


def _pairs(q: Tensor, k: Tensor, *options: Any, out_val: Any = None, **named: Any) -> int:
    o = Options(*options, **named)
    return total_pairs(q, k, o.cu_seqlens_q, o.cu_seqlens_k, o.causal, o.top_left, o.mask())
