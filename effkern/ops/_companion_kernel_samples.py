"""Calls of companion_kernel that must work and calls that must fail, for the contract tests and the self-test."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effkern.ops.registry import BadSample, Sample


def samples(device: str, dtype: torch.dtype) -> list[Sample]:
    def make(name: str, channels: int, order: int, length: int) -> Sample:
        generator = torch.Generator().manual_seed(order)
        a, b, c = (torch.randn(channels, order, generator=generator, dtype=torch.float64) for _ in range(3))
        a = a / a.abs().sum(1, keepdim=True)  # no pole outside the unit circle
        args = tuple(t.to(device, dtype) for t in (a, b, c))
        return Sample(name, args, {"length": length})

    return [
        make("a few channels", 3, 6, 40),
        make("many", 21, 17, 300),
        make("more than a chunk", 9, 5, 530),
        make("order one", 8, 1, 25),
        make("shorter than its order", 5, 30, 12),
        make("no channels", 0, 4, 8),
    ]


def calls(sample: Sample) -> list[tuple[str, tuple[Any, ...]]]:
    """The same call at the dispatcher, forward and backward."""
    args, length = sample.args, sample.kwargs["length"]
    with torch.no_grad():
        out = torch.ops.effkern.companion_kernel(*args, length)
    return [
        ("companion_kernel", (*args, length)),
        ("companion_kernel_backward", (torch.cos(out), *args, out)),
    ]


def bad_samples(device: str) -> list[BadSample]:
    def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.ones(shape, device=device, dtype=dtype)

    def bad(
        name: str, match: str, *args: Any, error: type[Exception] = RuntimeError, **kwargs: Any
    ) -> BadSample:
        return BadSample(name, args, kwargs, error, match)

    a = ones(3, 4)
    return [
        bad("one dimension", r"a must have shape \(channels, order\)", ones(4), ones(4), ones(4), 8),
        bad("no order", "order at least 1", ones(3, 0), ones(3, 0), ones(3, 0), 8),
        bad("shapes", r"b has shape \(3, 5\), a has \(3, 4\)", a, ones(3, 5), a, 8),
        bad("dtypes", "c is bfloat16 but a is float32", a, a, a.bfloat16(), 8),
        bad("integers", "a must be float32, float64", a.long(), a.long(), a.long(), 8),
        bad("no length", "length must be at least 1, got 0", a, a, a, 0, error=ValueError),
        bad("length", "length must be an integer, got float", a, a, a, 8.0, error=TypeError),
        bad("not a tensor", "b must be a tensor, got list", a, [1.0], a, 8, error=TypeError),
        bad("backend", "backend 'gpu' is unknown", a, a, a, 8, error=ValueError, backend="gpu"),
    ]
