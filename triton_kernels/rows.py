"""What launchers of convolutions share: rows of tensors (B, H, L) as their kernels read them, and the device."""

from __future__ import annotations

import contextlib

import torch


def adjacent(t: torch.Tensor) -> torch.Tensor:
    """With positions that are neighbours in memory; a copy where they are not."""
    return t if t.stride(2) == 1 or t.size(2) == 1 else t.contiguous()


def steps(t: torch.Tensor | None) -> tuple[int, int]:
    """Strides of batch and channel."""
    return (0, 0) if t is None else (t.stride(0), t.stride(1))


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Launches on `device` inside the block."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
