"""What differentiable k-means keeps for its backward, counted without computing anything: tensors on the meta device.

Cho et al. 2023 (eDKM) report it for the linear layers of one decoder layer of LLaMA-7B.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import effkern

from .dkm_plain import unrolled
from .results import Saved

# q, k, v and o projection, gate, up, down.
LLAMA_7B_DECODER = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
ITERATIONS = 3
BITS = (2, 3, 4)


def saved_bytes(call: Callable[..., Tensor], *inputs: Tensor) -> int:
    """The memory behind everything that autograd saves in a call, each piece once, the inputs left out."""
    kept: list[Tensor] = []  # alive, so that no two pieces have the same address

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = call(*inputs)
    given = {tensor.untyped_storage()._cdata for tensor in inputs}
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in kept}
    del out
    return sum(size for place, size in storages.items() if place not in given)


def decoder_layer(shapes: Sequence[tuple[int, int]] = LLAMA_7B_DECODER) -> list[Saved]:
    """A row for every number of bits and dtype: all weights of the layer clustered, by autograd and by ours."""
    rows = []
    for bits in BITS:
        for dtype in (torch.float32, torch.bfloat16):
            plain = functools.partial(unrolled, temperature=1.0, iterations=ITERATIONS)
            ours = functools.partial(_clustered, temperature=1.0, iterations=ITERATIONS)
            start = torch.empty(2**bits, device="meta")
            leaves = [torch.empty(s, dtype=dtype, device="meta").requires_grad_() for s in shapes]
            sums = [sum(saved_bytes(call, leaf, start) for leaf in leaves) for call in (plain, ours)]
            count = sum(leaf.numel() for leaf in leaves)
            name = str(dtype).removeprefix("torch.")
            rows.append(Saved("LLaMA-7B decoder layer", count, bits, name, ITERATIONS, *sums))
    return rows


def _clustered(weight: Tensor, start: Tensor, *, temperature: float, iterations: int) -> Tensor:
    return effkern.dkm(weight, start, temperature=temperature, iterations=iterations)[0]
