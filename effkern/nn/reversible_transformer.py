"""A small transformer that stores no activations: what `ReversibleSequence` is for, in one page."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from effkern.masks import Mask
from effkern.nn.attention import Attention
from effkern.nn.reversible import ReversibleBlock
from effkern.nn.reversible_sequence import ReversibleSequence


class ReversibleTransformer(nn.Module):
    """A pre-norm transformer of two streams, whose training memory does not grow with its depth.

        y1 = x1 + attention(norm(x2))        y2 = x2 + mlp(norm(y1))        out = norm(y1 + y2)

    in every block; both streams start from the input.

    Args:
        embed_dim: E, the width.
        depth: blocks, at least 1.
        num_heads: H, heads of the attention; divides E.
        vocabulary: tokens in and logits out, through an embedding and a linear head; None: vectors in and out.
        max_length: longest input; there is a learned embedding of positions. None: positions are not told apart.
        mlp_ratio: width of the MLP's inside over E.
        causal: whether a position sees only itself and what came before.
        dropout: probability that an output of a sub-block is dropped in training.
        overlap, exact: as in `ReversibleSequence`.
        backend: of the attention, as in `effkern.attention`.

    Calling it:
        model(x, mask=None): x (B, S, E), or (B, S) int64 with a vocabulary, -> (B, S, E), or (B, S, vocabulary). mask
        is one of `effkern.masks` and hides more than `causal` does.

    Parameters: `embed`, `positions` and `head` where asked for, the stack `body`, `norm`.

    Raises:
        ValueError: a size is not positive, num_heads does not divide embed_dim, or dropout is not in [0, 1).
        RuntimeError: x has the wrong shape or is longer than max_length; what `ReversibleSequence` raises.

    Source: Mangalam et al. 2022 (Reversible Vision Transformers); Kitaev et al. 2020 (Reformer), section 3.
    """

    def __init__(
        self,
        embed_dim: int,
        depth: int,
        num_heads: int,
        *,
        vocabulary: int | None = None,
        max_length: int | None = None,
        mlp_ratio: float = 4.0,
        causal: bool = False,
        dropout: float = 0.0,
        overlap: bool | str = "auto",
        exact: int | str | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        inner = int(embed_dim * mlp_ratio)
        sizes = {"embed_dim": embed_dim, "depth": depth, "vocabulary": vocabulary, "max_length": max_length}
        for name, size in {**sizes, "embed_dim * mlp_ratio": inner}.items():
            if size is not None and size < 1:
                raise ValueError(f"ReversibleTransformer: {name} must be at least 1, got {size}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"ReversibleTransformer: dropout must be in [0, 1), got {dropout}")
        self.embed_dim, self.max_length = embed_dim, max_length
        self.embed = (
            None if vocabulary is None else nn.Embedding(vocabulary, embed_dim, device=device, dtype=dtype)
        )
        self.positions = (
            None if max_length is None else nn.Embedding(max_length, embed_dim, device=device, dtype=dtype)
        )

        def block() -> ReversibleBlock:
            attention = Attention(
                embed_dim, num_heads, causal=causal, backend=backend, device=device, dtype=dtype
            )
            mlp = nn.Sequential(
                nn.LayerNorm(embed_dim, device=device, dtype=dtype),
                nn.Linear(embed_dim, inner, device=device, dtype=dtype),
                nn.GELU(),
                nn.Linear(inner, embed_dim, device=device, dtype=dtype),
                nn.Dropout(dropout),
            )
            return ReversibleBlock(_AttentionBranch(attention, dropout), mlp)

        self.body = ReversibleSequence([block() for _ in range(depth)], overlap=overlap, exact=exact)
        self.norm = nn.LayerNorm(embed_dim, device=device, dtype=dtype)
        self.head = (
            None
            if vocabulary is None
            else nn.Linear(embed_dim, vocabulary, bias=False, device=device, dtype=dtype)
        )
        for table in (self.embed, self.positions):
            if table is not None:
                nn.init.normal_(table.weight, std=0.02)

    def forward(self, x: Tensor, mask: Mask | None = None) -> Tensor:
        """x (B, S) or (B, S, E) -> (B, S, vocabulary) or (B, S, E)."""
        self._check(x)
        if self.embed is not None:
            x = self.embed(x)
        if self.positions is not None:
            x = x + self.positions.weight[: x.shape[1]]
        y1, y2 = self.body(x) if mask is None else self.body(x, mask=mask)
        out = self.norm(y1 + y2)
        return out if self.head is None else self.head(out)

    def _check(self, x: Tensor) -> None:
        tokens = self.embed is not None
        if x.dim() != (2 if tokens else 3) or not (tokens or x.shape[2] == self.embed_dim):
            expected = "(B, S)" if tokens else f"(B, S, {self.embed_dim})"
            raise RuntimeError(f"ReversibleTransformer: x must have shape {expected}, got {tuple(x.shape)}")
        if self.max_length is not None and x.shape[1] > self.max_length:
            raise RuntimeError(
                f"ReversibleTransformer: x has {x.shape[1]} positions, max_length is {self.max_length}"
            )

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, max_length={self.max_length}"


class _AttentionBranch(nn.Module):
    def __init__(self, attention: Attention, dropout: float) -> None:
        super().__init__()
        weight = attention.qkv.weight
        self.norm = nn.LayerNorm(weight.shape[1], device=weight.device, dtype=weight.dtype)
        self.attention = attention
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Mask | None = None) -> Tensor:
        return self.dropout(self.attention(self.norm(x), mask))
