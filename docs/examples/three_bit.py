"""A byte model at 3 bits a weight: rounded, and fine-tuned with the weights that it will be rounded to.

python docs/examples/three_bit.py [--quick]
"""

from __future__ import annotations

import copy

import torch
import typer
from byte_lm import CONTEXT, ByteModel, held_out_bits, library_text, loss, windows
from torch import Tensor, nn

import effkern
from effkern.nn import TemperatureSchedule


def train(
    model: nn.Module,
    text: Tensor,
    steps: int,
    learning_rate: float,
    schedule: TemperatureSchedule | None = None,
) -> None:
    """The same windows of the text in every call."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate)
    for _ in range(steps):
        starts = torch.randint(len(text) - CONTEXT - 1, (8,), generator=generator)
        optimizer.zero_grad()
        loss(model, windows(text, starts)).backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()  # moves the centroids on, and hardens the clustering


def kilobytes(model: nn.Module) -> float:
    """Of the tensors that a file would have, those of tied layers once."""
    return sum({t.data_ptr(): t.nbytes for t in model.state_dict().values()}.values()) / 1e3


def main(quick: bool = False) -> None:
    torch.manual_seed(0)
    text, rest = library_text()
    steps, more = (50, 20) if quick else (1000, 300)
    shown: dict[str, nn.Module] = {}
    dense = ByteModel()
    train(dense, text, steps, 3e-3)

    # What clustering would do, layer by layer; the model is not touched.
    print(effkern.convert.cluster(dense, bits=3, dry_run=True))
    shown["dense"] = copy.deepcopy(dense)
    shown["rounded to 3 bits"] = rounded = copy.deepcopy(dense)
    effkern.convert.cluster(rounded, bits=3)
    effkern.convert.finalize(rounded)

    shown["fine-tuned at 3 bits"] = tuned = copy.deepcopy(dense)
    effkern.convert.cluster(tuned, bits=3)
    train(tuned, text, more, 1e-3, TemperatureSchedule(tuned, more))
    print(effkern.convert.finalize(tuned))

    train(dense, text, more, 1e-3)
    shown["dense, trained as much longer"] = dense
    for name, model in shown.items():
        print(f"{name}: {held_out_bits(model, rest):.3f} bits per byte, {kilobytes(model):.0f} kB")


if __name__ == "__main__":
    typer.run(main)
