"""What decides lies 700 bases back: long convolutions (a Hyena operator) on synthetic DNA.

The first quarter of each sequence has an island rich in C and G, or one rich in A and T: that is the label. Each other
quarter has an island too, all three of one kind that is drawn apart from the label, so that counting bases says
nothing. The model reads its answer off the last 32 positions.

python docs/examples/dna_long_conv.py [--quick]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

import effkern
from effkern.nn import HyenaOperator

LENGTH, QUARTER, ISLAND, WIDTH = 1024, 256, 192, 16
LAST = 32  # positions that the answer is read off
RICH = 0.9  # of an island that is of its kind


def islands(kinds: Tensor) -> Tensor:
    """Kinds (...), 1 for rich in C and G -> bases (..., ISLAND): 0 A, 1 T, 2 C, 3 G."""
    strong = torch.rand(*kinds.shape, ISLAND) < torch.where(kinds == 1, RICH, 1 - RICH)[..., None]
    return 2 * strong.long() + torch.randint(2, strong.shape)


def sequences(count: int) -> tuple[Tensor, Tensor]:
    """Bases (count, LENGTH) and labels (count,). One island in each quarter, somewhere."""
    bases = torch.randint(4, (count, 4, QUARTER))
    labels = torch.randint(2, (count,))
    near = torch.randint(2, (count, 1)).expand(count, 3)
    kinds = torch.cat((labels[:, None], near), 1)
    places = torch.randint(QUARTER - ISLAND, (count, 4, 1)) + torch.arange(ISLAND)
    return bases.scatter(2, places, islands(kinds)).flatten(1), labels


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, WIDTH)
        # Kernels that start with a slow decay: what is far away has to be heard to be learned.
        self.mixer = HyenaOperator(WIDTH, LENGTH, fast_decay_pct=2.0, slow_decay_pct=10.0)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, bases: Tensor) -> Tensor:
        x = self.mixer(self.norm1(self.embed(bases)))  # (B, L, WIDTH)
        return self.head(self.norm2(x[:, -LAST:].mean(1)))


@torch.no_grad()
def accuracy(model: nn.Module, bases: Tensor, labels: Tensor) -> float:
    return (model(bases).argmax(-1) == labels).float().mean().item()


def counted(bases: Tensor, labels: Tensor) -> float:
    """The accuracy of a guess from the whole sequence's share of C and G."""
    share = (bases >= 2).float().mean(1)
    return ((share > share.median()) == labels.bool()).float().mean().item()


def main(quick: bool = False) -> None:
    torch.manual_seed(0)
    model, steps = Classifier(), 120 if quick else 400
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for step in range(steps):
        bases, labels = sequences(16)
        loss = F.cross_entropy(model(bases), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % (steps // 4) == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    print(f"ran on {effkern.backends.last()}")
    bases, labels = sequences(512)
    print(f"whole sequences: accuracy {accuracy(model, bases, labels):.3f}")
    print(f"without the first quarter: accuracy {accuracy(model, bases[:, QUARTER:], labels):.3f}")
    print(f"counting C and G: accuracy {counted(bases, labels):.3f}")


if __name__ == "__main__":
    typer.run(main)
