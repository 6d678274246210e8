"""Calls of kmeans_init that must work and calls that must fail, for the contract tests and the self-test."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effkern.ops.registry import BadSample, Sample


def _random(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def samples(device: str, dtype: torch.dtype) -> list[Sample]:
    def sample(name: str, *shape: int, **kwargs: Any) -> Sample:
        return Sample(name, (_random(device, dtype, *shape),), kwargs)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    importance = _random(device, wide, 6, 21).abs()
    return [
        sample("one table", 6, 20, clusters=8),
        sample("importance", 6, 21, clusters=5, importance=importance),
        sample("groups", 6, 20, clusters=4, groups=3),
        sample("pairs", 6, 20, clusters=4, dim=2),
        sample("groups of fours", 6, 20, clusters=3, dim=4, groups=2),
        sample("fewer values than clusters", 2, 3, clusters=8),
    ]


def calls(sample: Sample) -> list[tuple[str, tuple[Any, ...]]]:
    """The same call at the dispatcher."""
    names = ("clusters", "groups", "dim", "importance")
    given = {"groups": 1, "dim": 1, "importance": None, **sample.kwargs}
    return [("kmeans_init", (*sample.args, *(given[name] for name in names)))]


def bad_samples(device: str) -> list[BadSample]:
    def bad(
        name: str, match: str, weight: Any, error: type[Exception] = RuntimeError, **kwargs: Any
    ) -> BadSample:
        return BadSample(name, (weight,), {"clusters": 4, **kwargs}, error, match)

    w = _random(device, torch.float32, 6, 8)
    nan, infinite, negative = w.clone(), w.bfloat16(), w.abs()
    nan[2, 3], infinite[5, 7], negative[0, 0] = torch.nan, -torch.inf, -1e-9
    value = ValueError
    return [
        bad("NaN", "weight has entries that are not finite", nan),
        bad("infinity", "weight has entries that are not finite", infinite),
        bad("infinity in pairs", "weight has entries that are not finite", infinite, dim=2),
        bad("negative importance", "importance has entries that are negative", w, importance=negative),
        bad("NaN importance", "importance has entries that are neg", w, importance=nan.abs(), dim=4),
        bad("empty", "weight must not be empty", w[:0]),
        bad("scalar", "weight must have at least one axis", w[0, 0]),
        bad("integers", "weight must be float32, bfloat16, float16 or float64", w.long()),
        bad("not a tensor", "weight must be a tensor, got list", [1.0], TypeError),
        bad("no clusters", "clusters must be between 1 and 256, got 0", w, value, clusters=0),
        bad("clusters", "clusters must be between 1 and 256, got 257", w, value, clusters=257),
        bad("groups", "groups 4 does not divide the 6 rows", w, value, groups=4),
        bad("dim", "dim must be 1, 2 or 4, got 3", w, value, dim=3),
        bad("columns", "dim 4 does not divide the last axis", w[:, :6], value, dim=4),
        bad("shape", r"importance has shape \(6, 7\)", w, importance=negative[:, 1:]),
        bad("kind", "importance must be a tensor, got list", w, TypeError, importance=[1.0]),
        bad("integer importance", "importance must be floating", w, importance=w.long()),
        bad("backend", "backend 'gpu' is unknown", w, value, backend="gpu"),
    ]
