"""Attention in plain PyTorch: any floating dtype and device, differentiable to any order, lse included."""

from __future__ import annotations

import torch
from torch import Tensor


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _visible(sq: int, sk: int, top_left: bool, device: torch.device) -> Tensor:
    """Causal visibility (Sq, Sk): query i stands at i, or at i + Sk - Sq when the last query sees the last key."""
    position = torch.arange(sq, device=device)
    if not top_left:
        position = position + (sk - sq)
    return torch.arange(sk, device=device) <= position[:, None]


def _scores(q: Tensor, k: Tensor, scale: float | None, causal: bool, top_left: bool) -> Tensor:
    """Scaled scores (B, Hkv, G, Sq, Sk), hidden ones -inf."""
    b, hq, sq, d = q.shape
    hkv, sk = k.shape[1], k.shape[2]
    scale = d**-0.5 if scale is None else scale
    # (B, Hkv, G * Sq, D): the heads of a group become rows, so that k is never expanded.
    rows = (q * scale).reshape(b, hkv, (hq // hkv) * sq, d)
    scores = (rows @ k.transpose(-1, -2)).reshape(b, hkv, hq // hkv, sq, sk)
    if not causal:
        return scores
    return scores.masked_fill(~_visible(sq, sk, top_left, q.device), -torch.inf)


def _dense(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool, top_left: bool
) -> tuple[Tensor, Tensor]:
    """q (B, Hq, Sq, D), k (B, Hkv, Sk, D), v (B, Hkv, Sk, Dv) -> out (B, Hq, Sq, Dv), lse (B, Hq, Sq)."""
    dtype, compute = q.dtype, _compute_dtype(q.dtype)
    b, hq, sq, _ = q.shape
    hkv, sk, dv = v.shape[1], v.shape[2], v.shape[3]
    q, k, v = q.to(compute), k.to(compute), v.to(compute)
    scores = _scores(q, k, scale, causal, top_left)
    # The shift cancels out of both results, so it needs no gradient.
    shift = scores.detach().amax(-1) if sk > 0 else scores.new_full(scores.shape[:-1], -torch.inf)
    empty = shift == -torch.inf
    shift = shift.masked_fill(empty, 0.0)
    weights = (scores - shift[..., None]).exp()
    # 1 instead of 0 before dividing and taking the logarithm: the branch not taken must not make a NaN gradient.
    total = weights.sum(-1).masked_fill(empty, 1.0)
    lse = (shift + total.log()).masked_fill(empty, -torch.inf)
    weighted = (weights.reshape(b, hkv, (hq // hkv) * sq, sk) @ v).reshape(b, hq, sq, dv)
    out = weighted / total.reshape(b, hq, sq, 1)
    return out.to(dtype), lse.reshape(b, hq, sq)


def _sequences(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> list[tuple[int, int, int, int]]:
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    return list(zip(ends_q[:-1], ends_q[1:], ends_k[:-1], ends_k[1:], strict=True))


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
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v and the log of its denominator.

    Shapes as `effkern.attention`. float64 is computed in float64, everything else in float32; lse has the dtype
    of the computation. A row that sees no key gives out 0, lse -inf and zero gradients. The packed form walks the
    sequences one by one and reads cu_seqlens, which torch.compile cannot trace.
    """
    top_left = align == "top_left"
    with torch.autocast(q.device.type, enabled=False):
        if cu_seqlens_q is None or cu_seqlens_k is None:
            return _dense(q, k, v, scale, causal, top_left)
        parts = [
            _dense(q[None, :, a:b], k[None, :, c:d], v[None, :, c:d], scale, causal, top_left)
            for a, b, c, d in _sequences(cu_seqlens_q, cu_seqlens_k)
        ]
        if not parts:
            parts = [_dense(q[None], k[None], v[None], scale, causal, top_left)]
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
    scale: float | None,
    causal: bool,
    top_left: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, compute = q.dtype, _compute_dtype(q.dtype)
    b, hq, sq, d = q.shape
    hkv, sk, dv = v.shape[1], v.shape[2], v.shape[3]
    rows = (hq // hkv) * sq
    q, k, v, out, grad_out = (t.to(compute) for t in (q, k, v, out, grad_out))
    scores = _scores(q, k, scale, causal, top_left)
    # A row that saw no key has lse -inf: turned to inf, all its weights become 0.
    lse = lse.to(compute).masked_fill(lse == -torch.inf, torch.inf).reshape(b, hkv, hq // hkv, sq)
    weights = (scores - lse[..., None]).exp().reshape(b, hkv, rows, sk)
    delta = (grad_out * out).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse.to(compute)
    grad_out = grad_out.reshape(b, hkv, rows, dv)
    grad_scores = weights * (grad_out @ v.transpose(-1, -2) - delta.reshape(b, hkv, rows, 1))
    grad_scores = grad_scores * (d**-0.5 if scale is None else scale)
    grad_q = (grad_scores @ k).reshape(b, hq, sq, d)
    grad_k = grad_scores.transpose(-1, -2) @ q.reshape(b, hkv, rows, d)
    grad_v = weights.transpose(-1, -2) @ grad_out
    return grad_q.to(dtype), grad_k.to(dtype), grad_v.to(dtype)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients in closed form, for the kernels' place in the dispatcher, where autograd is switched off.

    P = exp(s - lse), dV = P^T dO, dS = P (dO V^T - (rowsum(dO O) - dlse)), dQ = scale dS K, dK = scale dS^T Q.
    """
    top_left = align == "top_left"
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return _dense_backward(grad_out, grad_lse, q, k, v, out, lse, scale, causal, top_left)
    grads = q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    for a, b, c, d in _sequences(cu_seqlens_q, cu_seqlens_k):
        parts = _dense_backward(
            grad_out[None, :, a:b],
            None if grad_lse is None else grad_lse[None, :, a:b],
            q[None, :, a:b],
            k[None, :, c:d],
            v[None, :, c:d],
            out[None, :, a:b],
            lse[None, :, a:b],
            scale,
            causal,
            top_left,
        )
        grads[0][:, a:b], grads[1][:, c:d], grads[2][:, c:d] = (part[0] for part in parts)
    return grads
