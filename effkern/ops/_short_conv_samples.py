"""Calls of short_conv that must work and calls that must fail, for the contract tests and the self-test."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effkern.ops.registry import BadSample, Sample


def samples(device: str, dtype: torch.dtype) -> list[Sample]:
    def make(*shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(sum(shape))
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    return [
        Sample("silu", (make(3, 5, 70), make(5, 4), make(5)), {"activation": "silu"}),
        Sample("no bias", (make(2, 6, 33), make(6, 3))),
        Sample("many taps", (make(2, 3, 150), make(3, 37), make(3)), {"return_state": True}),
        Sample(
            "state",
            (make(2, 5, 40), make(5, 4), make(5)),
            {"activation": "silu", "state": make(2, 5, 3), "return_state": True},
        ),
        Sample(
            "one step",
            (make(2, 9, 1), make(9, 4), make(9)),
            {"activation": "silu", "state": make(2, 9, 3), "return_state": True},
        ),
        Sample("one tap", (make(2, 4, 12), make(4, 1)), {"activation": "silu"}),
        Sample("no positions", (make(2, 4, 0), make(4, 3), make(4)), {"state": make(2, 4, 2)}),
        Sample("no batch", (make(0, 4, 9), make(4, 4), make(4))),
    ]


def calls(sample: Sample) -> list[tuple[str, tuple[Any, ...]]]:
    """The same call at the dispatcher, forward and backward."""
    x, weight, *rest = sample.args
    bias, state = rest[0] if rest else None, sample.kwargs.get("state")
    silu = sample.kwargs.get("activation") == "silu"
    call = (x, weight, bias, state, silu)
    return [
        ("short_conv", call),
        ("short_conv_backward", (torch.cos(x), *call)),
        ("short_conv_backward", (torch.cos(x), *call, False, True, False, False)),
        ("short_conv_backward", (torch.cos(x), *call, True, False, False, False)),
    ]


def bad_samples(device: str) -> list[BadSample]:
    def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.ones(shape, device=device, dtype=dtype)

    def bad(
        name: str, match: str, *args: Any, error: type[Exception] = RuntimeError, **kwargs: Any
    ) -> BadSample:
        return BadSample(name, args, kwargs, error, match)

    x, w = ones(2, 3, 8), ones(3, 4)
    return [
        bad("two dimensions", r"x must have shape \(batch, channels, length\), got \(3, 8\)", ones(3, 8), w),
        bad("scalar", "x must have shape", ones(), w),
        bad("channels", r"weight must have shape \(3, taps\), got \(4, 4\)", x, ones(4, 4)),
        bad("weight of conv1d", r"weight must have shape \(3, taps\), got \(3, 1, 4\)", x, ones(3, 1, 4)),
        bad("no taps", "weight has 0 taps, expected 1 to 256", x, ones(3, 0)),
        bad("too many taps", "weight has 257 taps, expected 1 to 256", x, ones(3, 257)),
        bad("bias", r"bias must have shape \(3,\), got \(4,\)", x, w, ones(4)),
        bad("state", r"state must have shape \(2, 3, 3\), got \(2, 3, 4\)", x, w, state=ones(2, 3, 4)),
        bad(
            "dtype of weight", "weight is float16, expected bfloat16 as x or float32", x.bfloat16(), w.half()
        ),
        bad("dtype of bias", "bias is float64, expected float32 as x", x, w, ones(3).double()),
        bad("dtype of state", "state is int64, expected float32", x, w, state=ones(2, 3, 3).long()),
        bad("integers", "x must be float32, bfloat16 or float16, got int64", x.long(), w.long()),
        bad(
            "complex", "x must be float32, bfloat16 or float16", x.to(torch.complex64), w.to(torch.complex64)
        ),
        bad("not a tensor", "weight must be a tensor, got list", x, [1.0], error=TypeError),
        bad(
            "activation",
            "activation must be None or 'silu', got 'gelu'",
            x,
            w,
            error=ValueError,
            activation="gelu",
        ),
        bad("backend", "backend 'gpu' is unknown", x, w, error=ValueError, backend="gpu"),
    ]
