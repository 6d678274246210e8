"""Calls of attention_merge that must work and calls that must fail, for the contract tests and the self-test."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effkern.ops.registry import BadSample, Sample


def _parts(
    device: str, dtype: torch.dtype, count: int, shape: tuple[int, ...]
) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(count)
    level = torch.float64 if dtype == torch.float64 else torch.float32
    outs = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(count)]
    lses = [(3 * torch.randn(shape[:-1], generator=generator)).to(device, level) for _ in range(count)]
    return outs, lses


def samples(device: str, dtype: torch.dtype) -> list[Sample]:
    unseen = _parts(device, dtype, 3, (3, 4, 7, 24))
    for k, rows in enumerate((5, 3, 1)):
        unseen[1][k][:, :, :rows] = -torch.inf
    return [
        Sample("two parts", _parts(device, dtype, 2, (2, 4, 30, 32))),
        Sample("parts that saw nothing", unseen),
        Sample("one part", _parts(device, dtype, 1, (3, 17, 5))),
        Sample("many parts", _parts(device, dtype, 9, (3, 300, 40))),
        Sample("no rows", _parts(device, dtype, 2, (0, 4, 8))),
    ]


def calls(sample: Sample) -> list[tuple[str, tuple[Any, ...]]]:
    """The same call at the dispatcher, forward and backward."""
    outs, lses = sample.args
    with torch.no_grad():
        out, lse = torch.ops.effkern.attention_merge(outs, lses)
    return [
        ("attention_merge", (outs, lses)),
        ("attention_merge_backward", (torch.cos(out), torch.ones_like(lse), outs, lses, out, lse)),
        ("attention_merge_backward", (torch.cos(out), None, outs, lses, out, lse)),
    ]


def bad_samples(device: str) -> list[BadSample]:
    def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.ones(shape, device=device, dtype=dtype)

    def bad(
        name: str, match: str, outs: Any, lses: Any, error: type[Exception] = RuntimeError, **kwargs: Any
    ) -> BadSample:
        return BadSample(name, (outs, lses), kwargs, error, match)

    out, lse = ones(2, 3, 8), ones(2, 3)
    return [
        bad("no parts", "outs is empty", [], []),
        bad("counts", "there are 2 outs and 1 lses", [out, out], [lse]),
        bad("shapes", r"outs\[1\] has shape \(2, 4, 8\)", [out, ones(2, 4, 8)], [lse, lse]),
        bad("shape of lse", r"lses\[1\] has shape \(2, 4\)", [out, out], [lse, ones(2, 4)]),
        bad("dtypes", r"outs\[1\] has another dtype", [out, out.bfloat16()], [lse, lse]),
        bad("dtype of lse", r"lses\[0\] must be float32", [out], [lse.bfloat16()]),
        bad("integers", "outs must be float32", [out.long()], [lse]),
        bad("not tensors", "must be sequences of tensors", [1.0], [lse], TypeError),
        bad("backend", "backend 'gpu' is unknown", [out], [lse], ValueError, backend="gpu"),
    ]
