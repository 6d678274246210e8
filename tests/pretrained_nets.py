"""Models with the blocks of timm's ViT and of GPT-2 in transformers, and blocks that only look like them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS = 8, 2


class Attention(nn.Module):
    """The call of timm's."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal)
        return self.proj(out.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int = WIDTH, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.dropout(self.fc2(F.gelu(self.fc1(hidden_states))))


class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.empty(x.shape[0], 1, 1, dtype=x.dtype).bernoulli_(0.5) if self.training else x


class ViTBlock(nn.Module):
    def __init__(self, scaled: bool = False, drop_path: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.attn = Attention()
        self.ls1 = LayerScale() if scaled else nn.Identity()
        self.drop_path1 = DropPath() if drop_path else nn.Identity()
        self.norm2 = nn.LayerNorm(WIDTH)
        self.mlp = Mlp()
        self.ls2 = LayerScale() if scaled else nn.Identity()
        self.drop_path2 = DropPath() if drop_path else nn.Identity()

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        attended = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
        x = x + self.drop_path1(self.ls1(attended))
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x


class ViT(nn.Module):
    def __init__(self, depth: int = 4, **options: bool) -> None:
        super().__init__()
        self.stem = nn.Linear(5, WIDTH)
        self.blocks = nn.Sequential(*(ViTBlock(**options) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        x = self.stem(x)
        if attn_mask is None:
            x = self.blocks(x)
        else:
            for block in self.blocks:
                x = block(x, attn_mask=attn_mask)
        return self.head(self.norm(x).mean(1))


class GPT2Attention(nn.Module):
    """Returns a tuple, and takes more than it needs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Attention()

    def forward(
        self,
        hidden_states: Tensor,
        layer_past: object = None,
        attention_mask: Tensor | None = None,
        use_cache: object = False,
        output_attentions: bool = False,
        **kwargs: Tensor,
    ) -> tuple[Tensor, None]:
        return self.inner(hidden_states * kwargs.get("scale", 1.0), attention_mask), None


class GPT2Block(nn.Module):
    """Its arguments are those of transformers; `tuples`: it returns one, as before version 5."""

    def __init__(self, tuples: bool = True, cross: bool = False) -> None:
        super().__init__()
        self.tuples = tuples
        self.ln_1, self.attn = nn.LayerNorm(WIDTH), GPT2Attention()
        self.ln_2, self.mlp = nn.LayerNorm(WIDTH), Mlp(dropout=0.3)
        if cross:
            self.crossattention = GPT2Attention()

    def forward(
        self,
        hidden_states: Tensor,
        layer_past: object = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        use_cache: object = False,
        output_attentions: bool = False,
        **kwargs: Tensor,
    ) -> Tensor | tuple[Tensor | None, ...]:
        residual = hidden_states
        hidden_states = self.ln_1(hidden_states)
        attn_outputs = self.attn(
            hidden_states,
            layer_past=layer_past,
            attention_mask=attention_mask,
            use_cache=use_cache,
            output_attentions=output_attentions,
            **kwargs,
        )
        hidden_states = attn_outputs[0] + residual
        if encoder_hidden_states is not None:
            hidden_states = hidden_states + self.crossattention(encoder_hidden_states)[0]
        residual = hidden_states
        hidden_states = residual + self.mlp(self.ln_2(hidden_states))
        outputs = (hidden_states, *attn_outputs[1:]) if output_attentions else (hidden_states,)
        return outputs if self.tuples else hidden_states


class GPT2(nn.Module):
    def __init__(self, depth: int = 4, tuples: bool = True) -> None:
        super().__init__()
        self.wte = nn.Embedding(7, WIDTH)
        self.h = nn.ModuleList(GPT2Block(tuples) for _ in range(depth))
        self.ln_f = nn.LayerNorm(WIDTH)

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None, **kwargs: object) -> Tensor:
        x = self.wte(tokens)
        for block in self.h:
            out = block(x, None, attention_mask, **kwargs)
            x = out[0] if isinstance(out, tuple) else out
        return self.ln_f(x) @ self.wte.weight.mT


class PostNorm(ViTBlock):
    """Of BERT: the children of a ViT block, and another network."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attn(x))
        return self.norm2(x + self.mlp(x))


class Parallel(ViTBlock):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        return x + self.attn(y) + self.mlp(y)


class Halved(ViTBlock):
    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.5 * self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Windowed(ViTBlock):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x).reshape(1, -1, WIDTH)).view_as(x)
        return x + self.mlp(self.norm2(x))


class InTraining(ViTBlock):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), is_causal=self.training)
        return x + self.mlp(self.norm2(x))


class InPlace(ViTBlock):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        y += 1
        x = x + self.attn(y)
        return x + self.mlp(self.norm2(x))


class PostScaled(ViTBlock):
    """A norm at the end of a branch is no obstacle (Swin v2)."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norm1(self.attn(x))
        return x + self.norm2(self.mlp(x))
