"""A small vision transformer on scikit-learn's handwritten digits, then fine-tuned as a reversible network.

The model is plain PyTorch: its calls of scaled_dot_product_attention are routed to effkern, and its trained blocks
converted.

python docs/examples/digits_vit.py [--quick]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import typer
from sklearn.datasets import load_digits
from torch import Tensor, nn

import effkern
import effkern.integrations.sdpa
from effkern.nn import DualResidualSchedule

PATCH, WIDTH, HEADS, DEPTH = 2, 64, 4, 4


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(WIDTH), Attention(), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Images (B, 8, 8) -> logits (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, WIDTH, PATCH, PATCH)
        self.place = nn.Parameter(0.5 * torch.randn((8 // PATCH) ** 2, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.stem(images.unsqueeze(1)).flatten(2).mT  # (B, 16, WIDTH)
        return self.head(self.norm(self.blocks(patches + self.place)).mean(1))


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    steps: int,
    learning_rate: float,
    schedule: DualResidualSchedule | None = None,
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate)
    for _ in range(steps):
        chosen = torch.randint(len(images), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()  # from the trained network towards one that needs no stored activation


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (model(images).argmax(-1) == labels).float().mean().item()


def main(quick: bool = False) -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.images / 8 - 1).float(), torch.tensor(digits.target)
    order = torch.randperm(len(images))
    learn, test = order[:1437], order[1437:]
    steps, more = (150, 40) if quick else (600, 300)

    model = ViT()
    with effkern.integrations.sdpa.route() as calls:
        train(model, images[learn], labels[learn], steps, 2e-3)
        print(calls)
        print(f"trained: accuracy {accuracy(model, images[test], labels[test]):.3f}")

        print(effkern.convert.reversible(model, example=images[:4]))
        train(model, images[learn], labels[learn], more, 5e-4, DualResidualSchedule(model, more // 2))
        print(
            f"fine-tuned as a reversible network: accuracy {accuracy(model, images[test], labels[test]):.3f}"
        )


if __name__ == "__main__":
    typer.run(main)
