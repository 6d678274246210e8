"""Gradients of attention at the dispatcher: the backward op, and what follows from its results for bias and sinks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effkern.ops._attention_options import Options
from effkern.ops._dispatch import register_gradient

DOUBLE_BACKWARD = "attention: second derivatives are only available with backend='reference'"
_BIAS, _SINKS = Options._fields.index("bias"), Options._fields.index("sink_logits")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *options = inputs
    o = Options(*options)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        *(q, k, v, *output, o.cu_seqlens_q, o.cu_seqlens_k, o.layout, o.ids, o.visible),
        *(o.bias, o.sink_logits, o.alibi_slopes, o.dropout_seed),
    )
    ctx.count = len(options)
    ctx.scalars = o.scale, o.causal, o.top_left, o.bands, o.groups, o.block, o.softcap, o.dropout_p


def _options(ctx: Any, tensors: tuple[Tensor | None, ...]) -> Options:
    scale, causal, top_left, bands, groups, block, softcap, dropout_p = ctx.scalars
    cu_seqlens_q, cu_seqlens_k, layout, ids, visible, bias, sink_logits, alibi_slopes, seed = tensors
    return Options(
        *(cu_seqlens_q, cu_seqlens_k, scale, causal, top_left, bands, groups, layout, block, ids, visible),
        *(bias, softcap, sink_logits, alibi_slopes, dropout_p, seed),
    )


def register(op: str, backward_op: str) -> None:
    backward = getattr(torch.ops.effkern, backward_op).default

    def gradient(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        rest: list[Tensor | None] = [None] * ctx.count
        if grad_out is None and grad_lse is None:
            return (None, None, None, *rest)
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        o = _options(ctx, tensors)
        if grad_out is None:  # only lse was used
            grad_out = torch.zeros_like(out)
        bias = o.bias if o.bias is not None and ctx.needs_input_grad[3 + _BIAS] else None
        per_key = bias is not None and bias.shape[-1] > 1
        grad_q, grad_k, grad_v, grad_bias, delta = backward(
            grad_out, grad_lse, q, k, v, out, lse, *o, per_key
        )
        if bias is not None:
            if not per_key:
                grad_bias = _row_gradient(bias, o, lse, grad_lse, delta)
            rest[_BIAS] = grad_bias.to(bias.dtype)
        if o.sink_logits is not None and ctx.needs_input_grad[3 + _SINKS]:
            grad_sinks = -_sink_share(o.sink_logits, lse, delta).sum(-1)
            rest[_SINKS] = (grad_sinks.sum(0) if grad_sinks.dim() == 2 else grad_sinks).to(
                o.sink_logits.dtype
            )
        return grad_q, grad_k, grad_v, *rest

    register_gradient(op, _setup_context, gradient)


def _sink_share(sink_logits: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """exp(sink - lse) * delta, 0 in rows that see nothing, not even a sink."""
    return (sink_logits[:, None] - lse.masked_fill(lse == -torch.inf, torch.inf)).exp() * delta


def _row_gradient(bias: Tensor, o: Options, lse: Tensor, grad_lse: Tensor | None, delta: Tensor) -> Tensor:
    """Of a bias that is the same for all keys. It moves lse alone, and out only through a sink: the sum of dS over the
    keys is dlse + delta * exp(sink - lse)."""
    row = torch.zeros_like(lse) if grad_lse is None else grad_lse.masked_fill(lse == -torch.inf, 0.0)
    if o.sink_logits is not None:
        row = row + _sink_share(o.sink_logits, lse, delta)
    shape = bias.shape
    if o.cu_seqlens_q is None:
        return row[..., None].sum_to_size(shape)  # from (B, Hq, Sq, 1)
    entries, _, queries, _ = shape
    begin, end = o.cu_seqlens_q[:-1].long(), o.cu_seqlens_q[1:].long()
    if row.shape[1] == 0:
        return row.new_zeros(shape)
    if queries > 1:  # gathered to (Hq, N, queries): no two tokens meet, so no order of addition to choose
        index = begin[:, None] + torch.arange(queries, device=row.device)
        inside = index < end[:, None]
        padded = row[:, index.clamp(max=row.shape[1] - 1)].masked_fill(~inside, 0.0)
        return padded.transpose(0, 1)[..., None].sum_to_size(shape)
    if entries == 1:
        return row.sum(-1)[None, :, None, None].sum_to_size(shape)
    running = torch.nn.functional.pad(row.to(torch.float64).cumsum(1), (1, 0))
    sums = (running[:, end] - running[:, begin]).to(row.dtype)  # (Hq, N)
    return sums.t()[..., None, None].sum_to_size(shape)


def register_refusal(op: str) -> None:
    def refuse(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(DOUBLE_BACKWARD)

    register_gradient(op, lambda ctx, inputs, output: None, refuse)
