"""Attention in plain PyTorch: any floating dtype and device, differentiable to any order, lse included."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effkern.masks import Lowered, Mask
from effkern.reference._attention_scores import Terms, dropout_factors, entry, one_sequence, shaped_scores


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _products(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """scale * q k^T (B, Hq, Sq, Sk)."""
    b, hq, sq, d = q.shape
    hkv, sk = k.shape[1], k.shape[2]
    # (B, Hkv, G * Sq, D): the heads of a group become rows, so that k is never expanded.
    rows = (q * scale).reshape(b, hkv, hq // max(hkv, 1) * sq, d)
    return (rows @ k.transpose(-1, -2)).reshape(b, hq, sq, sk)


def _dense(q: Tensor, k: Tensor, v: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """q (B, Hq, Sq, D), k (B, Hkv, Sk, D), v (B, Hkv, Sk, Dv) -> out (B, Hq, Sq, Dv), lse (B, Hq, Sq)."""
    dtype, compute = q.dtype, _compute_dtype(q.dtype)
    b, hq, sq, d = q.shape
    hkv, sk, dv = v.shape[1], v.shape[2], v.shape[3]
    q, k, v = q.to(compute), k.to(compute), v.to(compute)
    scores, _ = shaped_scores(_products(q, k, d**-0.5 if terms.scale is None else terms.scale), terms)
    # The shift cancels out of both results, so it needs no gradient.
    shift = scores.detach().amax(-1) if sk > 0 else scores.new_full(scores.shape[:-1], -torch.inf)
    sinks = None if terms.sink_logits is None else terms.sink_logits.to(compute)[:, None]
    if sinks is not None:
        shift = torch.maximum(shift, sinks.detach())
    empty = shift == -torch.inf
    shift = shift.masked_fill(empty, 0.0)
    weights = (scores - shift[..., None]).exp()
    total = weights.sum(-1)
    if sinks is not None:
        total = total + (sinks - shift).exp()
    # 1 instead of 0 before dividing and taking the logarithm: the branch not taken must not make a NaN gradient.
    total = total.masked_fill(empty, 1.0)
    lse = (shift + total.log()).masked_fill(empty, -torch.inf)
    factors = dropout_factors(terms, sk, compute)
    weights = weights if factors is None else weights * factors
    weighted = (weights.reshape(b, hkv, hq // max(hkv, 1) * sq, sk) @ v).reshape(b, hq, sq, dv)
    return (weighted / total[..., None]).to(dtype), lse


def _sequences(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> list[tuple[slice, slice]]:
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    found = zip(ends_q[:-1], ends_q[1:], ends_k[:-1], ends_k[1:], strict=True)
    return [(slice(a, b), slice(c, d)) for a, b, c, d in found] or [(slice(0), slice(0))]


def _collect(
    q: Tensor,
    causal: bool,
    align: str,
    scale: float | None,
    mask: Mask | Lowered | None = None,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> Terms:
    """The terms of the whole call. Packed, q (Hq, T, D), tables still hold one entry a sequence."""
    rows = None
    if dropout_p:
        if dropout_seed is None:
            dropout_seed = new_dropout_seed(q.device)
        rows = torch.arange(q.numel() // q.shape[-1], device=q.device).reshape(q.shape[:-1])
    lowered = mask.lower() if isinstance(mask, Mask) else mask
    bias = None if bias is None else bias.reshape((1,) * (4 - bias.dim()) + bias.shape)
    top_left = align == "top_left"
    return Terms(
        *(scale, causal, top_left, lowered, bias, softcap, sink_logits, alibi_slopes),
        *(dropout_p, dropout_seed, rows),
    )


def _cut(terms: Terms, index: int, queries: slice, keys: slice) -> Terms:
    return terms._replace(
        mask=one_sequence(terms.mask, index, keys),
        bias=entry(terms.bias, index),
        rows=None if terms.rows is None else terms.rows[None, :, queries],
    )


def new_dropout_seed(device: torch.device) -> Tensor:
    """int64 (1,) from the default generator of the device."""
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    align: str = "bottom_right",
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v and the log of its denominator.

    Shapes and options as `effkern.attention`; `mask` may also be in canonical form (`effkern.masks.Lowered`), and
    `dropout_seed` (int64, one entry) repeats a draw. float64 is computed in float64, everything else in float32; lse
    has the dtype of the computation. A row that sees no key gives out 0, lse -inf (or its sink) and zero gradients. The
    packed form walks the sequences one by one and reads cu_seqlens, which torch.compile cannot trace.
    """
    with torch.autocast(q.device.type, enabled=False):
        terms = _collect(q, causal, align, scale, **options)
        if cu_seqlens_q is None or cu_seqlens_k is None:
            return _dense(q, k, v, terms)
        parts = [
            _dense(q[None, :, a], k[None, :, c], v[None, :, c], _cut(terms, n, a, c))
            for n, (a, c) in enumerate(_sequences(cu_seqlens_q, cu_seqlens_k))
        ]
        outs, lses = zip(*parts, strict=True)
        return torch.cat(outs, 2)[0], torch.cat(lses, 2)[0]


def _dense_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    terms: Terms,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k and v; dS before softcap and scale (B, Hq, Sq, Sk); delta (B, Hq, Sq)."""
    dtype, compute = q.dtype, _compute_dtype(q.dtype)
    b, hq, sq, d = q.shape
    hkv, sk, dv = v.shape[1], v.shape[2], v.shape[3]
    rows = (b, hkv, hq // max(hkv, 1) * sq)
    scale = d**-0.5 if terms.scale is None else terms.scale
    q, k, v, out, grad_out = (t.to(compute) for t in (q, k, v, out, grad_out))
    scores, slope = shaped_scores(_products(q, k, scale), terms)
    # A row with neither key nor sink has lse -inf: turned to inf, all its weights become 0.
    empty = lse == -torch.inf
    weights = (scores - lse.to(compute).masked_fill(empty, torch.inf)[..., None]).exp()
    delta = (grad_out * out).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse.to(compute)
    delta = delta.masked_fill(empty, 0.0)
    grad_weights = (grad_out.reshape(*rows, dv) @ v.transpose(-1, -2)).reshape(b, hq, sq, sk)
    factors = dropout_factors(terms, sk, compute)
    dropped = weights
    if factors is not None:
        grad_weights, dropped = grad_weights * factors, weights * factors
    grad_scores = weights * (grad_weights - delta[..., None])
    inner = (grad_scores if slope is None else grad_scores * slope).reshape(*rows, sk) * scale
    grad_q = (inner @ k).reshape(b, hq, sq, d)
    grad_k = inner.transpose(-1, -2) @ q.reshape(*rows, d)
    grad_v = dropped.reshape(*rows, sk).transpose(-1, -2) @ grad_out.reshape(*rows, dv)
    return grad_q.to(dtype), grad_k.to(dtype), grad_v.to(dtype), grad_scores, delta


def _add_bias_gradient(grad_bias: Tensor, index: int, grad_scores: Tensor) -> None:
    """Adds dS (B, Hq, Sq, Sk) of a dense call (index 0) or of one sequence, summed over what the bias broadcasts."""
    target = grad_bias if grad_scores.shape[0] == grad_bias.shape[0] else entry(grad_bias, index)
    assert target is not None
    target = target[:, :, : grad_scores.shape[2], : grad_scores.shape[3]]
    target += grad_scores.sum_to_size(target.shape).to(target.dtype)


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool = False,
    align: str = "bottom_right",
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    bias_grad: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients in closed form, for the kernels' place in the dispatcher, where autograd is switched off.

    P = exp(z - lse), dV = (m P)^T dO, delta = rowsum(dO O) - dlse, dS = P (m dO V^T - delta), dbias = dS; through the
    cap dS *= 1 - tanh^2; dQ = scale dS K, dK = scale dS^T Q.

    Returns:
        The gradients of q, k and v; that of the bias, float32 in four axes, (0,) without `bias_grad`; delta, float32.
    """
    terms = _collect(q, causal, align, scale, **options)
    grad_bias = q.new_zeros(0, dtype=torch.float32)
    if bias_grad:
        assert terms.bias is not None
        grad_bias = q.new_zeros(terms.bias.shape, dtype=torch.float32)
    if cu_seqlens_q is None or cu_seqlens_k is None:
        *grads, grad_scores, delta = _dense_backward(grad_out, grad_lse, q, k, v, out, lse, terms)
        if bias_grad:
            _add_bias_gradient(grad_bias, 0, grad_scores)
        return grads[0], grads[1], grads[2], grad_bias, delta.to(torch.float32)
    grad_q, grad_k, grad_v = (torch.zeros_like(t) for t in (q, k, v))
    delta = q.new_zeros(lse.shape, dtype=torch.float32)
    for n, (a, c) in enumerate(_sequences(cu_seqlens_q, cu_seqlens_k)):
        parts = _dense_backward(
            grad_out[None, :, a],
            None if grad_lse is None else grad_lse[None, :, a],
            *(q[None, :, a], k[None, :, c], v[None, :, c], out[None, :, a], lse[None, :, a]),
            _cut(terms, n, a, c),
        )
        for whole, own, part in zip((grad_q, grad_k, grad_v, delta), (a, c, c, a), (*parts[:3], parts[4])):
            whole[:, own] = part[0]
        if bias_grad:
            _add_bias_gradient(grad_bias, n, parts[3])
    return grad_q, grad_k, grad_v, grad_bias, delta
