"""PyTorch's flash attention operators on effkern's, as `register_flash_attention_impl` wants them. See sdpa.register.

Inputs and outputs are those of PyTorch's own CUDA kernels: (B, H, S, D) in the operators of
`scaled_dot_product_attention`, (B, S, H, D) or packed (T, H, D) in the others. Everything happens below autograd, whose
formulas call the backward operators with what the forward ones returned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effkern.integrations._flash_attn_window import window_mask
from effkern.ops._attention_options import Options, collect

_OPS = torch.ops.effkern


@dataclass
class Handle:
    """Keeps the registrations alive; PyTorch calls `remove` to put its own kernels back."""

    library: torch.library.Library | None

    def remove(self) -> None:
        self.library = None


def install(key: str = "CUDA") -> Handle:
    """Puts the functions of this module behind `key` of the dispatcher."""
    library = torch.library.Library("aten", "IMPL", key)
    for op, kernel in (
        ("_scaled_dot_product_flash_attention", _sdpa_forward),
        ("_scaled_dot_product_flash_attention_backward", _sdpa_backward),
        ("_flash_attention_forward", _forward),
        ("_flash_attention_forward_no_dropout_inplace", _forward_into),
        ("_flash_attention_backward", _backward),
    ):
        if hasattr(torch.ops.aten, op):
            library.impl(op, kernel, key)
    return Handle(library)


def _options(
    q: Tensor,
    cu_seqlens: tuple[Tensor | None, Tensor | None],
    scale: float | None,
    causal: bool,
    window: tuple[int | None, int | None],
    alibi_slopes: Tensor | None,
    dropout_p: float,
) -> Options:
    ends = tuple(-1 if n is None else n for n in window)
    mask = window_mask("flash attention", causal, (ends[0], ends[1]))
    return collect(
        *(q, (*cu_seqlens, scale, causal, False)),
        mask=mask,
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
    )


def _states(options: Options, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What PyTorch saves of dropout, uint64 (2,) and (), and a debug mask without entries.

    The second has no use for dropout, and the backward operator has no argument for the slopes of ALiBi: where there
    are any, they travel in it, (Hq,).
    """
    state = torch.zeros(2, dtype=torch.int64, device=q.device)
    if options.dropout_seed is not None:
        state[:1] = options.dropout_seed
    unused = torch.zeros((), dtype=torch.int64, device=q.device)
    if options.alibi_slopes is not None:
        unused = options.alibi_slopes.detach().double()
    return state.view(torch.uint64), unused.view(torch.uint64), q.new_empty(0)


def _gradients(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    options: Options,
    state: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    if options.dropout_p > 0.0:
        options = options._replace(dropout_seed=state.view(torch.int64)[:1])
    return _OPS.attention_backward.default(grad_out, None, q, k, v, out, lse, *options, False)[:3]


def _sdpa_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    _refuse(return_debug_mask=return_debug_mask)
    options = _options(query, (None, None), scale, is_causal, (None, None), None, dropout_p)
    out, lse = _OPS.attention.default(query, key, value, *options)
    like = torch.empty_like(query)  # compilers rely on the strides of the query
    out = out if out.stride() == like.stride() else like.copy_(out)
    return out, lse, None, None, query.shape[2], key.shape[2], *_states(options, query)


def _sdpa_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    options = Options(None, None, scale, is_causal, dropout_p=dropout_p)
    return _gradients(grad_out, query, key, value, out, logsumexp, options, philox_seed)


def _heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.transpose(-3, -2) for t in tensors)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[Tensor, ...]:
    _refuse(return_debug_mask=return_debug_mask, seqused_k=seqused_k, block_table=block_table)
    window = window_size_left, window_size_right
    options = _options(query, (cum_seq_q, cum_seq_k), scale, is_causal, window, alibi_slopes, dropout_p)
    out, lse = _OPS.attention.default(*_heads_first(query, key, value), *options)
    return out.transpose(-3, -2).contiguous(), lse, *_states(options, query)


def _forward_into(out: Tensor, *args: Any, **named: Any) -> Tensor:
    """The forward pass with memory for its result given. Returns lse."""
    result, lse, *_ = _forward(*args, **named)
    out.copy_(result)
    return lse


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, ...]:
    # Dropout is put in afterwards: with its seed, and without drawing another.
    window = window_size_left, window_size_right
    slopes = unused.view(torch.float64).float() if unused.dim() else None
    options = _options(query, (cum_seq_q, cum_seq_k), scale, is_causal, window, slopes, 0.0)
    options = options._replace(dropout_p=dropout_p)
    grad_out, q, k, v, out = _heads_first(grad_out, query, key, value, out)
    return _heads_first(*_gradients(grad_out, q, k, v, out, logsumexp, options, rng_state))


def _refuse(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise NotImplementedError(f"flash attention by effkern: {name} is not supported")
