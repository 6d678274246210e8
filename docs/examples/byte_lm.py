"""A byte-level language model on the source of Python's standard library, with effkern's causal attention.

python docs/examples/byte_lm.py [--quick]
"""

from __future__ import annotations

import math
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

import effkern

CONTEXT = 256


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        # (B, S, 3 W) -> three times (B, H, S, D)
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = effkern.attention(q, k, v, causal=True)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class ByteModel(nn.Module):
    """Bytes (B, S) -> logits of the byte after each (B, S, 256). The head has the weights of the embedding."""

    def __init__(self, width: int = 96, layers: int = 2, heads: int = 3) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(256, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)
        for table in (self.embed, self.place):
            nn.init.normal_(table.weight, std=0.05)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.norm(self.blocks(self.embed(tokens) + self.place(positions))))


def library_text() -> tuple[Tensor, Tensor]:
    """Bytes to train on and bytes of other files."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    held_out = files[::10]
    parts = ([path for path in files if path not in held_out], held_out)
    train, rest = (
        torch.frombuffer(bytearray(b"\n".join(map(Path.read_bytes, part))), dtype=torch.uint8)
        for part in parts
    )
    return train, rest


def windows(text: Tensor, starts: Tensor) -> Tensor:
    """(B, CONTEXT + 1), int64."""
    return text[starts[:, None] + torch.arange(CONTEXT + 1)].long()


def loss(model: nn.Module, rows: Tensor) -> Tensor:
    """Cross-entropy of every next byte, in bits."""
    return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()) / math.log(2)


@torch.no_grad()
def held_out_bits(model: nn.Module, text: Tensor) -> float:
    """Bits per byte in 16 windows spread over the text."""
    model.eval()
    starts = torch.linspace(0, len(text) - CONTEXT - 1, 16).long()
    bits = loss(model, windows(text, starts)).item()
    model.train()
    return bits


def frequency_bits(train: Tensor, text: Tensor) -> float:
    """What a model comes to that knows the frequency of each byte and nothing else."""
    counts = torch.bincount(train.long(), minlength=256) + 1
    chances = counts / counts.sum()
    return -chances[text.long()].log2().mean().item()


@torch.no_grad()
def continued(model: nn.Module, start: bytes, length: int) -> str:
    """Draws the bytes that follow."""
    tokens = torch.tensor([list(start)])
    for _ in range(length):
        chances = (1.3 * model(tokens[:, -CONTEXT:])[:, -1]).softmax(-1)
        tokens = torch.cat((tokens, torch.multinomial(chances, 1)), 1)
    return bytes(tokens[0].tolist()).decode(errors="replace")


def main(quick: bool = False) -> None:
    torch.manual_seed(0)
    train, rest = library_text()
    model, steps = ByteModel(), 90 if quick else 1500
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(steps):
        bits = loss(model, windows(train, torch.randint(len(train) - CONTEXT - 1, (8,))))
        optimizer.zero_grad()
        bits.backward()
        optimizer.step()
        if step % (steps // 4) == 0:
            print(f"step {step}: {bits.item():.2f} bits per byte")
    print(f"ran on {effkern.backends.last()}")
    print(continued(model, b"def main(", 60 if quick else 400))
    print(f"held-out text: {held_out_bits(model, rest):.3f} bits per byte")
    print(f"byte frequencies alone: {frequency_bits(train, rest):.3f} bits per byte")


if __name__ == "__main__":
    typer.run(main)
