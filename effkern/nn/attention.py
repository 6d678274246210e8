"""Multi-head self-attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from effkern.masks import Mask
from effkern.ops.attention import attention


class Attention(nn.Module):
    """Self-attention with one projection for q, k and v, and grouped heads where asked for.

        x (B, S, E) -> q (B, H, S, D), k and v (B, Hkv, S, D) -> attention -> (B, S, E)

    Args:
        embed_dim: E, the width of the input and of the output.
        num_heads: H, heads of q.
        num_kv_heads: Hkv, heads of k and v; divides H. None is H.
        head_dim: D; None is E / H.
        bias: whether both projections have a bias.
        causal: whether a position sees only itself and what came before.
        mask: which other positions it sees, one of `effkern.masks`: a window is SlidingWindow(left, right). Its tensors
            follow the input to its device.
        softcap: bound of the scores, as in `effkern.attention`; 0 is off.
        dropout: probability that a weight is dropped in training.
        backend: as in `effkern.attention`.

    Parameters: `qkv` (a Linear whose output holds the heads of q, then of k, then of v) and `proj`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        head_dim: int | None = None,
        bias: bool = True,
        causal: bool = False,
        mask: Mask | None = None,
        softcap: float = 0.0,
        dropout: float = 0.0,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"Attention: num_kv_heads {num_kv_heads} does not divide num_heads {num_heads}")
        if head_dim is None:
            if embed_dim % num_heads:
                raise ValueError(f"Attention: num_heads {num_heads} does not divide embed_dim {embed_dim}")
            head_dim = embed_dim // num_heads
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"Attention: dropout must be in [0, 1), got {dropout}")
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.causal, self.mask, self.softcap, self.dropout = causal, mask, softcap, dropout
        self.backend = backend
        heads = num_heads + 2 * num_kv_heads
        self.qkv = nn.Linear(embed_dim, heads * head_dim, bias=bias, device=device, dtype=dtype)
        self.proj = nn.Linear(num_heads * head_dim, embed_dim, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor, mask: Mask | None = None) -> Tensor:
        """x (B, S, E) -> (B, S, E). `mask` hides more than the module's own: the documents of this batch, say."""
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        own = self.mask
        if own is not None:
            own = own if own.device in (None, x.device) else own.to(x.device)
            mask = own if mask is None else own & mask
        out = attention(
            *(q, k, v),
            causal=self.causal,
            mask=mask,
            softcap=self.softcap,
            dropout_p=self.dropout if self.training else 0.0,
            backend=self.backend,
        )
        return self.proj(out.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        shown = f"heads={self.num_heads}, kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, causal={self.causal}"
        options = {"mask": self.mask, "softcap": self.softcap, "dropout": self.dropout}
        return ", ".join([shown, *(f"{name}={value}" for name, value in options.items() if value)])
