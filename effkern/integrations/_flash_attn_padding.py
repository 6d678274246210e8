"""Padded batches to packed tokens and back, with the signatures of flash_attn.bert_padding."""

from __future__ import annotations

import torch
from torch import Tensor


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The tokens that a padded batch really has, one sequence after the other.

    Args:
        hidden_states: (B, S, ...).
        attention_mask: (B, S), nonzero where there is a token.
        unused_mask: (B, S), nonzero where memory for a token is wanted that is not used: it is kept as well, but does
            not count in the last result.

    Returns:
        tokens (T, ...); indices int64 (T,) into the flattened batch; cu_seqlens int32 (B + 1,); the length of the
        longest sequence; used int32 (B,), the tokens of every sequence.
    """
    used = attention_mask != 0
    kept = used if unused_mask is None else used | (unused_mask != 0)
    if kept.shape != hidden_states.shape[:2]:
        raise RuntimeError(
            f"unpad_input: attention_mask has shape {tuple(kept.shape)}, hidden_states has "
            f"{tuple(hidden_states.shape[:2])}"
        )
    lengths = kept.sum(-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if len(lengths) else 0
    tokens = hidden_states.flatten(0, 1).index_select(0, indices)
    return tokens, indices, cu_seqlens, longest, used.sum(-1, dtype=torch.int32)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """tokens (T, ...) of `unpad_input` back to (batch, seqlen, ...), with zeros between them."""
    padded = hidden_states.new_zeros((batch * seqlen, *hidden_states.shape[1:]))
    return padded.index_copy(0, indices, hidden_states).unflatten(0, (batch, seqlen))
