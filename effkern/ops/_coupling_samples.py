"""Calls of coupling that must work and calls that must fail, for the contract tests and the self-test."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effkern.ops.registry import BadSample, Sample


def samples(device: str, dtype: torch.dtype) -> list[Sample]:
    level = torch.float64 if dtype == torch.float64 else torch.float32

    def three(*shape: int, streams: torch.dtype = dtype) -> tuple[Tensor, ...]:
        """f, y and x."""
        generator = torch.Generator().manual_seed(sum(shape))
        made = [torch.randn(shape, generator=generator) for _ in range(3)]
        return made[0].to(device, dtype), *(t.to(device, streams) for t in made[1:])

    return [
        Sample("dual residual", three(3, 5, 70), {"alpha": 0.3, "beta": 0.7}),
        Sample("dual residual, kept", three(4, 33), {"alpha": 1.0, "keep": 0.1}),
        Sample("dual residual, undone", three(4, 33), {"alpha": 0.3, "subtract": True}),
        Sample("added on a grid", three(3, 300, streams=level)[:2], {"q": 14}),
        Sample("subtracted on a grid", three(2, 9, streams=level)[:2], {"q": 14, "subtract": True}),
        Sample("dual residual on a grid", three(2, 77, streams=level), {"alpha": 0.5, "q": 12}),
        Sample("rounded", three(7, 11)[:1], {"q": 8}),
        Sample("wider streams", three(2, 40, streams=level), {"alpha": -0.4}),
        Sample("nothing", three(0, 6), {"q": 14}),
    ]


def calls(sample: Sample) -> list[tuple[str, tuple[Any, ...]]]:
    """The same call at the dispatcher."""
    tensors = (*sample.args, None, None)[:3]
    defaults = {"alpha": 1.0, "beta": 1.0, "subtract": False, "q": None, "keep": None}
    return [("coupling", (*tensors, *(defaults | sample.kwargs).values()))]


def bad_samples(device: str) -> list[BadSample]:
    def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.ones(shape, device=device, dtype=dtype)

    def bad(
        name: str, match: str, *args: Any, error: type[Exception] = RuntimeError, **kwargs: Any
    ) -> BadSample:
        return BadSample(name, args, kwargs, error, match)

    f = ones(2, 3)
    return [
        bad("shape of y", r"y has shape \(2, 4\), f has \(2, 3\)", f, ones(2, 4)),
        bad("shape of x", r"x has shape \(3,\), f has \(2, 3\)", f, f, ones(3)),
        bad("integers", "f must be float32, bfloat16 or float16, got int64", f.long(), f),
        bad("dtype of y", "y must be float32, bfloat16 or float16, got int64", f, f.long()),
        bad("dtype of x", "x must be float32, bfloat16 or float16", f, f, f.to(torch.complex64)),
        bad("nothing to do", "expected y, x or q beside f", f),
        bad("subtract", "subtract needs y", f, None, f, subtract=True),
        bad("keep", "keep needs x", f, f, keep=0.5),
        bad("fine grid", "q must be from 0 to 23, got 24", f, f, q=24),
        bad("coarse grid", "q must be from 0 to 23, got -1", f, q=-1),
        bad("no number", "q must be None or a whole number, got 'auto'", f, f, error=TypeError, q="auto"),
        bad("not a tensor", "f must be a tensor, got list", [1.0], f, error=TypeError),
        bad("nor y", "y must be a tensor, got float", f, 1.0, error=TypeError),
        bad("backend", "backend 'gpu' is unknown", f, f, error=ValueError, backend="gpu"),
    ]
