"""The functions of flash-attn 2.8, with its names, signatures and layout (B, S, H, D), on every device of effkern.

    from effkern.integrations.flash_attn import flash_attn_func     # instead of: from flash_attn import ...
    out = flash_attn_func(q, k, v, causal=True)                     # q (B, Sq, Hq, D), out (B, Sq, Hq, Dv)

What an argument asks for is done or refused, never ignored; `docs/integrations.md` lists both. Common to all functions:

    * float32 is taken as well, and values may have another head dim than keys. D and Dv from 1 to 256.
    * The backward pass is deterministic whatever `deterministic` says.
    * A row that sees no key gives out 0 and, where flash-attn has +inf, lse -inf.
    * `return_attn_probs=True` returns (out, lse, None), lse (B, Hq, Sq), or (Hq, T) of packed calls, natural logarithm
      in float32, differentiable. The probabilities are never in memory: with dropout, whose pattern they would show, it
      raises.
    * `alibi_slopes` is (Hq,); one row a batch entry raises.

Numerics, cost and errors are those of `effkern.attention`, which does the work.
"""

from __future__ import annotations

from torch import Tensor

from effkern.integrations._flash_attn_cache import flash_attn_with_kvcache
from effkern.integrations._flash_attn_padding import pad_input, unpad_input
from effkern.integrations._flash_attn_window import window_mask
from effkern.ops.attention import attention

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "pad_input",
    "unpad_input",
]

Result = Tensor | tuple[Tensor, Tensor, None]


def _attend(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    return_attn_probs: bool,
    cu_seqlens: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Result:
    """What all functions of this module come down to: the heads move in front of the sequence, as views."""
    rank = 4 if cu_seqlens[0] is None else 3
    for argument, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != rank:
            layout = "(batch, sequence, heads, head dim)" if rank == 4 else "(tokens, heads, head dim)"
            raise RuntimeError(f"{name}: {argument} must have shape {layout}, got {tuple(tensor.shape)}")
    if alibi_slopes is not None and alibi_slopes.dim() != 1:
        shape = tuple(alibi_slopes.shape)
        raise NotImplementedError(f"{name}: alibi_slopes must have shape ({q.shape[-2]},), got {shape}")
    if return_attn_probs and dropout_p > 0.0:
        raise NotImplementedError(
            f"{name}: return_attn_probs with dropout_p {dropout_p} would show which weights were dropped, but they are "
            "never in memory; expected dropout_p 0"
        )
    out, lse = attention(
        *(tensor.transpose(-3, -2) for tensor in (q, k, v)),
        causal=causal,
        scale=softmax_scale,
        mask=window_mask(name, causal, window_size),
        softcap=max(softcap, 0.0),
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
        cu_seqlens_q=cu_seqlens[0],
        cu_seqlens_k=cu_seqlens[1],
        return_lse=True,
    )
    out = out.transpose(-3, -2).contiguous()
    return (out, lse, None) if return_attn_probs else out


def _unpack(name: str, argument: str, packed: Tensor, parts: int, rank: int) -> tuple[Tensor, ...]:
    """Views of what is stacked in the last dimension but two."""
    if packed.dim() != rank or packed.shape[-3] != parts:
        tokens = "batch, sequence" if rank == 5 else "tokens"
        raise RuntimeError(
            f"{name}: {argument} must have shape ({tokens}, {parts}, heads, head dim), got {tuple(packed.shape)}"
        )
    return packed.unbind(-3)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """Attention of q (B, Sq, Hq, D) to k (B, Sk, Hkv, D) and v (B, Sk, Hkv, Dv): out (B, Sq, Hq, Dv).

    Args:
        q, k, v: any strides; Hkv divides Hq.
        dropout_p: as in `effkern.attention`, in [0, 1). The caller passes 0 in evaluation.
        softmax_scale: None is D ** -0.5.
        causal: the last query sees the last key.
        window_size: (left, right), inclusive, around the position of a query; -1 leaves an end open. Keys outside cost
            nothing.
        softcap: bound of the scores; 0 or less is off.
        alibi_slopes: (Hq,).
        deterministic: the backward pass is in any case.
        return_attn_probs: (out, lse, None) instead of out.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit.
        NotImplementedError: `alibi_slopes` with a batch axis, or `return_attn_probs` together with dropout.
    """
    return _attend(
        *("flash_attn_func", q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes),
        return_attn_probs,
    )


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` with k and v stacked: kv (B, Sk, 2, Hkv, D). They are read where they lie."""
    name = "flash_attn_kvpacked_func"
    k, v = _unpack(name, "kv", kv, 2, 5)
    return _attend(
        *(name, q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes),
        return_attn_probs,
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` with all three stacked: qkv (B, S, 3, H, D). They are read where they lie."""
    name = "flash_attn_qkvpacked_func"
    q, k, v = _unpack(name, "qkv", qkv, 3, 5)
    return _attend(
        *(name, q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes),
        return_attn_probs,
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """`flash_attn_func` of packed sequences: q (Tq, Hq, D), k (Tk, Hkv, D), v (Tk, Hkv, Dv), out (Tq, Hq, Dv).

    Args:
        cu_seqlens_q, cu_seqlens_k: int32 (N + 1,), rising from 0 to the number of tokens. Sequences may be empty.
        max_seqlen_q, max_seqlen_k: not needed, whatever they are.
        block_table: None.

    Raises:
        NotImplementedError: with `block_table`; `flash_attn_with_kvcache` takes pages.
    """
    name = "flash_attn_varlen_func"
    if block_table is not None:
        raise NotImplementedError(
            f"{name}: block_table must be None, packed keys cannot lie in pages; flash_attn_with_kvcache takes one"
        )
    return _attend(
        *(name, q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes),
        *(return_attn_probs, (cu_seqlens_q, cu_seqlens_k)),
    )


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` with k and v stacked: kv (Tk, 2, Hkv, D)."""
    name = "flash_attn_varlen_kvpacked_func"
    k, v = _unpack(name, "kv", kv, 2, 4)
    return _attend(
        *(name, q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes),
        *(return_attn_probs, (cu_seqlens_q, cu_seqlens_k)),
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` with all three stacked: qkv (T, 3, H, D)."""
    name = "flash_attn_varlen_qkvpacked_func"
    q, k, v = _unpack(name, "qkv", qkv, 3, 4)
    return _attend(
        *(name, q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes),
        *(return_attn_probs, (cu_seqlens, cu_seqlens)),
    )
