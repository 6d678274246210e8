"""Calls of the Monarch ops that must work and calls that must fail, for the contract tests and the self-test."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effkern.ops.registry import BadSample, Sample


def _random(device: str, dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def samples(device: str, dtype: torch.dtype) -> list[Sample]:
    def make(*shape: int) -> Tensor:
        return _random(device, dtype, *shape)

    return [
        Sample("square", (make(5, 7, 24), make(4, 6, 6), make(4, 6, 6), make(24))),
        Sample("no bias", (make(70, 32), make(4, 8, 8), make(4, 8, 8))),
        Sample("rectangular", (make(3, 60), make(5, 8, 12), make(10, 3, 4), make(30))),
        Sample(
            "l-major output",
            (make(60, 40), make(4, 6, 10), make(3, 5, 8), make(15)),
            {"output_order": "l_major"},
        ),
        Sample("one token", (make(64), make(2, 40, 32), make(8, 9, 10))),
        Sample("no tokens", (make(2, 0, 8), make(2, 4, 4), make(2, 4, 4), make(8))),
    ]


def calls(sample: Sample) -> list[tuple[str, tuple[Any, ...]]]:
    """The same call at the dispatcher, forward and backward."""
    x, w1, w2, *rest = sample.args
    bias = rest[0] if rest else None
    l_major = sample.kwargs.get("output_order") == "l_major"
    with torch.no_grad():
        out = torch.ops.effkern.monarch_matmul(x, w1, w2, bias, l_major)
    return [
        ("monarch_matmul", (x, w1, w2, bias, l_major)),
        ("monarch_matmul_backward", (torch.cos(out), x, w1, w2, l_major, True, True, True, True)),
        ("monarch_matmul_backward", (torch.cos(out), x, w1, w2, l_major, False, True, False, False)),
    ]


def bad_samples(device: str) -> list[BadSample]:
    def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.ones(shape, device=device, dtype=dtype)

    def bad(
        name: str, match: str, *args: Any, error: type[Exception] = RuntimeError, **kwargs: Any
    ) -> BadSample:
        return BadSample(name, args, kwargs, error, match)

    x, w = ones(3, 8), ones(2, 4, 4)
    return [
        bad("features", "x must have 8 features", ones(3, 9), w, w),
        bad("scalar", "x must have 8 features", ones(), w, w),
        bad("factor of two dimensions", r"w1 must have shape \(blocks, rows, columns\)", x, ones(8, 4), w),
        bad("factors that do not fit", r"w2 reads 2 \* 5 numbers, w1 gives 2 \* 4", x, w, ones(2, 4, 5)),
        bad("empty factor", "must not be empty", ones(3, 0), ones(0, 4, 4), w),
        bad("bias", r"bias must have shape \(8,\)", x, w, w, ones(7)),
        bad("dtypes", "w2 is bfloat16 but x is float32", x, w, w.bfloat16()),
        bad("dtype of bias", "bias is float16 but x is float32", x, w, w, ones(8).half()),
        bad("integers", "x must be float32, bfloat16 or float16", x.long(), w.long(), w.long()),
        bad("not a tensor", "w1 must be a tensor, got list", x, [1.0], w, error=TypeError),
        bad(
            "order",
            "output_order must be 's_major' or 'l_major'",
            *(x, w, w),
            error=ValueError,
            output_order="major",
        ),
        bad("backend", "backend 'gpu' is unknown", x, w, w, error=ValueError, backend="gpu"),
    ]


def block_diag_samples(device: str, dtype: torch.dtype) -> list[Sample]:
    def make(*shape: int) -> Tensor:
        return _random(device, dtype, *shape)

    return [
        Sample("square", (make(5, 7, 24), make(4, 6, 6))),
        Sample("rectangular", (make(70, 36), make(3, 17, 12))),
        Sample("one token", (make(64), make(2, 40, 32))),
        Sample("no tokens", (make(2, 0, 8), make(2, 4, 4))),
    ]


def block_diag_calls(sample: Sample) -> list[tuple[str, tuple[Any, ...]]]:
    x, w = sample.args
    with torch.no_grad():
        out = torch.ops.effkern.block_diag_matmul(x, w)
    return [
        ("block_diag_matmul", (x, w)),
        ("block_diag_matmul_backward", (torch.cos(out), x, w)),
        ("block_diag_matmul_backward", (torch.cos(out), x, w, False, True)),
    ]


def block_diag_bad_samples(device: str) -> list[BadSample]:
    def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.ones(shape, device=device, dtype=dtype)

    def bad(
        name: str, match: str, *args: Any, error: type[Exception] = RuntimeError, **kwargs: Any
    ) -> BadSample:
        return BadSample(name, args, kwargs, error, match)

    x, w = ones(3, 8), ones(2, 4, 4)
    return [
        bad("features", "x must have 8 features", ones(3, 9), w),
        bad("two dimensions", r"w must have shape \(blocks, rows, columns\)", x, ones(8, 4)),
        bad("empty", "w must not be empty", ones(3, 0), ones(0, 4, 4)),
        bad("dtypes", "w is bfloat16 but x is float32", x, w.bfloat16()),
        bad("integers", "x must be float32, bfloat16 or float16", x.long(), w.long()),
        bad("not a tensor", "w must be a tensor, got list", x, [1.0], error=TypeError),
        bad("backend", "backend 'gpu' is unknown", x, w, error=ValueError, backend="gpu"),
    ]
