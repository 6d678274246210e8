"""Calls of dkm that must work and calls that must fail, for the contract tests and the self-test."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effkern.ops.registry import BadSample, Sample


def samples(device: str, dtype: torch.dtype) -> list[Sample]:
    def make(*shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(sum(shape))
        made = torch.randn(shape, generator=generator, dtype=torch.float64)
        return made.to(torch.bfloat16).to(device, dtype)

    def sample(name: str, weight: Tensor, centroids: Tensor, **kwargs: Any) -> Sample:
        return Sample(name, (weight,), {"centroids": centroids, "temperature": 0.1, **kwargs})

    return [
        sample("one codebook", make(6, 20), make(8)),
        sample("groups", make(6, 35), make(3, 4), groups=3, iterations=2),
        sample("pairs", make(4, 18), make(5, 2), dim=2),
        sample("groups of vectors", make(4, 3, 8), make(2, 6, 4), groups=2, dim=4, tolerance=0.05),
        sample("many weights", make(3, 41000), make(3, 4), groups=3),
        sample("one weight", make(1), make(2)),
        sample("no weight", make(0, 5), make(2)),
    ]


def calls(sample: Sample) -> list[tuple[str, tuple[Any, ...]]]:
    """The same call at the dispatcher, forward and backward."""
    (weight,) = sample.args
    groups, dim = sample.kwargs.get("groups", 1), sample.kwargs.get("dim", 1)
    iterations, tolerance = sample.kwargs.get("iterations", 3), sample.kwargs.get("tolerance", 0.0)
    temperature = sample.kwargs["temperature"]
    start = sample.kwargs["centroids"].float().reshape(groups, -1, dim)
    call = (weight, start, temperature, iterations, tolerance, groups, dim)
    _, *saved = torch.ops.effkern.dkm(*call)
    return [
        ("dkm", call),
        ("dkm_backward", (torch.cos(weight), weight, *saved, temperature, groups, dim)),
    ]


def bad_samples(device: str) -> list[BadSample]:
    def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.ones(shape, device=device, dtype=dtype)

    def bad(
        name: str,
        match: str,
        weight: Any,
        centroids: Any,
        *,
        error: type[Exception] = RuntimeError,
        **kwargs: Any,
    ) -> BadSample:
        return BadSample(name, (weight, centroids), {"temperature": 0.1, **kwargs}, error, match)

    w, c, value = ones(6, 8), ones(4), ValueError
    return [
        bad("scalar", r"weight must have at least one axis", ones(), c),
        bad(
            "shape of centroids",
            r"centroids must have shape \(clusters\) with groups 1 and dim 1",
            w,
            ones(4, 2),
        ),
        bad(
            "groups of centroids", r"centroids must have shape \(groups, clusters\)", w, ones(2, 4), groups=3
        ),
        bad("no group axis", r"centroids must have shape \(groups, clusters\)", w, c, groups=3),
        bad("dim of centroids", r"centroids must have shape \(clusters, dim\)", w, ones(4, 4), dim=2),
        bad("no clusters", "clusters of centroids must be between 1 and 256, got 0", w, ones(0), error=value),
        bad(
            "too many clusters",
            "clusters of centroids must be between 1 and 256, got 257",
            w,
            ones(257),
            error=value,
        ),
        bad("groups", "groups 4 does not divide the 6 rows", w, ones(4, 4), error=value, groups=4),
        bad("no groups", "groups 0 does not divide the 6 rows", w, c, error=value, groups=0),
        bad("dim", "dim 4 does not divide the last axis", ones(8, 6), ones(4, 4), error=value, dim=4),
        bad("odd dim", "dim must be 1, 2 or 4, got 3", ones(6, 6), ones(4, 3), error=value, dim=3),
        bad("uneven", "dim 2 does not divide", ones(2), ones(2, 4, 2), error=value, groups=2, dim=2),
        bad(
            "temperature",
            "temperature must be positive and finite, got 0",
            w,
            c,
            error=value,
            temperature=0.0,
        ),
        bad(
            "temperature nan",
            "temperature must be positive and finite",
            w,
            c,
            error=value,
            temperature=float("nan"),
        ),
        bad("iterations", "iterations must be at least 1, got 0", w, c, error=value, iterations=0),
        bad(
            "tolerance",
            "tolerance must be finite and not negative, got -1",
            w,
            c,
            error=value,
            tolerance=-1.0,
        ),
        bad("nan in weight", "weight has entries that are not finite", w * float("nan"), c),
        bad("infinity in weight", "weight has entries that are not finite", w / 0, c),
        bad("infinity among codes", "weight has entries that are not finite", ones(40000).bfloat16() / 0, c),
        bad("nan in centroids", "centroids has entries that are not finite", w, c * float("nan")),
        bad(
            "dtype of centroids", "centroids is float16, expected bfloat16 as weight", w.bfloat16(), c.half()
        ),
        bad("integers", "weight must be float32, bfloat16, float16 or float64, got int64", w.long(), c),
        bad("not a tensor", "centroids must be a tensor, got list", w, [1.0], error=TypeError),
        bad("text", "temperature must be a number, got str", w, c, error=TypeError, temperature="cold"),
        bad("fraction", "iterations must be an integer, got float", w, c, error=TypeError, iterations=2.0),
        bad("backend", "backend 'gpu' is unknown", w, c, error=ValueError, backend="gpu"),
    ]
