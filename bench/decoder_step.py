"""One training step of a decoder layer with clustered weights, carried out: peak memory, and that of dense weights.

What `saved.py` counts on tensors without data is the clustering alone; here forward, backward and optimizer run.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effkern.nn import ClusteredLinear, TemperatureSchedule

from .memory import available_bytes, peak_extra_bytes
from .results import DecoderStep

WIDTH, HIDDEN, HEADS = 4096, 11008, 32  # LLaMA-7B
BITS = 3
TOKENS = (
    8  # what is looked at is the memory of weights; PyTorch's bf16 products are slow on a CPU without them
)
DTYPE = torch.bfloat16
# Gradients, two moments, clustered weights, the weights themselves, and room for what comes and goes.
COPIES = 8


class DecoderLayer(nn.Module):
    """LLaMA's: attention and a gated MLP, each behind an RMSNorm; positions left out. Seven matrices."""

    def __init__(self, width: int, hidden: int, heads: int, dtype: torch.dtype) -> None:
        super().__init__()

        def linear(inputs: int, outputs: int) -> nn.Linear:
            made = nn.Linear(inputs, outputs, bias=False, device="meta", dtype=dtype).to_empty(device="cpu")
            nn.init.normal_(made.weight, std=0.02)
            return made

        self.heads = heads
        self.projections = nn.ModuleList(linear(width, width) for _ in range(4))  # q, k, v, o
        self.gate, self.up, self.down = linear(width, hidden), linear(width, hidden), linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, S, width) -> the same."""
        query, key, value, out = self.projections
        normed = F.rms_norm(x, x.shape[-1:])
        q, k, v = (
            make(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2) for make in (query, key, value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + out(mixed)
        normed = F.rms_norm(x, x.shape[-1:])
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))

    def cluster(self, bits: int) -> None:
        """On the same Parameters, from their k-means."""
        for parent, names in ((self.projections, "0123"), (self, ("gate", "up", "down"))):
            for name in names:
                setattr(parent, name, ClusteredLinear.from_linear(getattr(parent, name), bits))


def decoder_step(
    width: int = WIDTH, hidden: int = HIDDEN, heads: int = HEADS, tokens: int = TOKENS
) -> DecoderStep:
    """On the CPU, AdamW: forward, backward, optimizer step and the move of the centroids; dense, then clustered."""
    layer, x = DecoderLayer(width, hidden, heads, DTYPE), torch.randn(1, tokens, width, dtype=DTYPE)
    dense_peak, dense_seconds = _measured(layer, x)
    layer.cluster(BITS)
    peak, seconds = _measured(layer, x)
    return DecoderStep(
        what="LLaMA-7B decoder layer" if (width, hidden) == (WIDTH, HIDDEN) else f"{width} x {hidden}",
        weights=sum(weight.numel() for weight in layer.parameters()),
        bits=BITS,
        dtype=str(DTYPE).removeprefix("torch."),
        optimizer="AdamW",
        tokens=tokens,
        weight_bytes=sum(weight.nbytes for weight in layer.parameters()),
        peak_extra_bytes=peak,
        dense_peak_extra_bytes=dense_peak,
        seconds=seconds,
        dense_seconds=dense_seconds,
    )


def refusal(device: torch.device) -> str | None:
    """Why the step of the full size cannot run, None where it can."""
    if device.type != "cpu":  # there is no kernel yet that would keep it small
        return f"the clustered decoder layer is for the CPU, this run is on {device.type}"
    needed = COPIES * (4 * WIDTH * WIDTH + 3 * WIDTH * HIDDEN) * DTYPE.itemsize
    if available_bytes(device) < needed:
        return f"the clustered decoder layer is left out: it wants {needed / 2**30:.1f} GiB of free memory"
    return None


def _measured(layer: nn.Module, x: Tensor) -> tuple[int | None, float]:
    """Peak memory beyond the weights, and seconds, of the first step of a training."""
    optimizer = torch.optim.AdamW(layer.parameters(), 1e-5)
    clustered = any(isinstance(module, ClusteredLinear) for module in layer.modules())
    moved: Callable[[], None] = TemperatureSchedule(layer, 1000).step if clustered else lambda: None
    spent = 0.0

    def step() -> None:
        nonlocal spent
        begin = time.perf_counter()
        layer(x).float().square().mean().backward()
        optimizer.step()
        moved()
        spent = time.perf_counter() - begin

    peak = peak_extra_bytes(step, x.device)
    optimizer.zero_grad()
    return peak, spent
