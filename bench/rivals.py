"""Packages that do what some of our ops do, called as their users call them. A case shows those that are installed:
`pip install 'effkern[rivals]'`. Each is imported when it first runs.

Traps, so that nobody walks into them again:

* coremltools.optimize.torch (9.0). `FakePalettize` starts every call from the centroids that the last one ended with,
  keeps every share above 1e-7, takes 1e-7 from the squared distances to the first centroid (its pruning), and stops
  when the inertia, summed in the weight's dtype, moves by 1e-4 or less. With these off it computes our function.
  Distances come from `torch.cdist`, which for more than 25 weights multiplies out the square and takes the root, to be
  squared again: digits are lost. Centroids have the weight's dtype.
* memcnn (1.5.2). Frees the storage of a block's input in the forward pass, so that what is passed in is gone. Refuses
  `torch.autograd.grad`. Runs F and G three times a step: forward, inverse, and again for the gradient. Of its
  dependencies torchvision, SimpleITK and pathlib2 are for its examples only.
* revtorch (0.2.4). Its backward calls `backward()` on the sub-blocks, so that the weights' gradients appear in `.grad`
  and nowhere else: `torch.autograd.grad` finds none, and DDP's buckets see nothing.
* memcnn and revtorch hold both streams in one tensor, which they split and join again around every block: along the
  first dimension here, where the halves are contiguous. Neither restores CPU autocast in the backward pass: called as
  usual, after the autocast block, they recover bfloat16 steps with float32 sub-blocks. Called inside it, they compute
  what everybody else does, and so the cases call them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def palettized(start: Tensor, *, temperature: float, iterations: int) -> Callable[[Tensor], Tensor]:
    """coremltools' layer of differentiable k-means: all iterations, from the centroids `start` (K,) in every call."""
    made: list[Any] = []

    def call(weight: Tensor) -> Tensor:
        if not made:
            made.append(_fake_palettize(len(start), temperature, iterations))
        made[0].centroids = [start.to(weight.dtype).unsqueeze(1)]
        return made[0](weight)

    return call


def _fake_palettize(clusters: int, temperature: float, iterations: int) -> Any:
    from coremltools.optimize.torch.palettization import FakePalettize

    observer = (
        torch.ao.quantization.MovingAverageMinMaxObserver
    )  # for quantized centroids, which these are not
    options = {
        "palett_tau": temperature,
        "kmeans_max_iter": iterations,
        "palett_epsilon": -1.0,
        "zero_threshold": 0.0,
        "prune_threshold": 0.0,
    }
    layer = FakePalettize(
        observer.with_args(dtype=torch.qint8, quant_min=-128, quant_max=127),
        n_bits=clusters.bit_length() - 1,
        cluster_dim=1,
        advanced_options=options,
    )
    layer.enable_fake_palett()
    return layer


def memcnn_stack(blocks: Sequence[Any]) -> Callable[[Tensor], Tensor]:
    """y1 + y2 of a stack of blocks with sub-blocks f and g, both streams starting from x."""
    from memcnn import AdditiveCoupling, InvertibleModuleWrapper

    couplings = [AdditiveCoupling(block.f, block.g, split_dim=0) for block in blocks]
    return _joined(nn.Sequential(*(InvertibleModuleWrapper(coupling) for coupling in couplings)))


def revtorch_stack(blocks: Sequence[Any]) -> Callable[[Tensor], Tensor]:
    """As `memcnn_stack`."""
    from revtorch import ReversibleBlock, ReversibleSequence

    made = [ReversibleBlock(block.f, block.g, split_along_dim=0) for block in blocks]
    return _joined(ReversibleSequence(nn.ModuleList(made)))


def _joined(stack: nn.Module) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        y1, y2 = stack(torch.cat([x, x])).chunk(2)
        return y1 + y2

    return run
