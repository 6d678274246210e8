"""Calls of attention_decode that must work and calls that must fail, for the contract tests and the self-test."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effkern.masks import Dense, Lambda, SlidingWindow
from effkern.ops.registry import BadSample, Sample


def _numbers(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape) + shape[-2])
    return torch.randn(shape, generator=generator).to(device, dtype)


def _lengths(device: str, *values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def samples(device: str, dtype: torch.dtype) -> list[Sample]:
    def numbers(*shape: int) -> Tensor:
        return _numbers(device, dtype, *shape)

    pages = torch.tensor([[4, 0, 7], [2, 5, -1]], dtype=torch.int32, device=device)
    paged = numbers(2, 4, 1, 32), numbers(8, 2, 11, 32), numbers(8, 2, 11, 24), _lengths(device, 30, 15)
    return [
        Sample(
            "ragged",
            (numbers(2, 6, 1, 32), numbers(2, 3, 70, 32), numbers(2, 3, 70, 32), _lengths(device, 70, 33)),
        ),
        Sample("pages", paged, {"page_table": pages}),
        Sample("window over pages", paged, {"page_table": pages, "mask": SlidingWindow(6, 0)}),
        Sample(
            "several queries",
            (numbers(2, 6, 5, 16), numbers(2, 2, 600, 16), numbers(2, 2, 600, 40), _lengths(device, 555, 2)),
            {"mask": Lambda(4, 90), "softcap": 5.0, "sink_logits": _numbers(device, torch.float32, 1, 6)[0]},
        ),
        Sample(
            "no keys",
            (numbers(2, 2, 2, 8), numbers(2, 1, 9, 8), numbers(2, 1, 9, 8), _lengths(device, 0, 1)),
        ),
    ]


def calls(sample: Sample) -> list[tuple[str, tuple[Any, ...]]]:
    """The same call at the dispatcher."""
    mask = sample.kwargs.get("mask")
    options = (
        sample.kwargs.get("page_table"),
        None,
        None if mask is None else list(mask.lower().bands),
        sample.kwargs.get("softcap", 0.0),
        sample.kwargs.get("sink_logits"),
    )
    return [("attention_decode", (*sample.args, *options))]


def bad_samples(device: str) -> list[BadSample]:
    def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.ones(shape, device=device, dtype=dtype)

    good = ones(2, 4, 1, 8), ones(2, 2, 6, 8), ones(2, 2, 6, 8), _lengths(device, 6, 3)
    pages = torch.zeros(2, 3, dtype=torch.int32, device=device)

    def bad(
        name: str,
        match: str,
        error: type[Exception] = RuntimeError,
        q: Any = None,
        k: Any = None,
        v: Any = None,
        lengths: Any = None,
        **kwargs: Any,
    ) -> BadSample:
        args = (x if given is None else given for x, given in zip(good, (q, k, v, lengths), strict=True))
        return BadSample(name, tuple(args), kwargs, error, match)

    return [
        bad("not a tensor", "k_cache must be a tensor, got list", TypeError, k=[1.0]),
        bad("rank", r"q must have 4 dimensions, got shape \(4, 1, 8\)", q=ones(4, 1, 8)),
        bad("dtypes", "v_cache is bfloat16 but q is float32", v=ones(2, 2, 6, 8, dtype=torch.bfloat16)),
        bad("head dim", "k_cache has head dim 16, q has 8", k=ones(2, 2, 6, 16)),
        bad("cache sizes", "v_cache has shape .* does not match", v=ones(2, 2, 5, 8)),
        bad("heads", "k_cache has 3 heads", k=ones(2, 3, 6, 8), v=ones(2, 3, 6, 8)),
        bad("batch", "k_cache has batch 3, q has 2", k=ones(3, 2, 6, 8), v=ones(3, 2, 6, 8)),
        bad("dtype of lengths", "cache_seqlens must be int32", lengths=torch.tensor([6, 3], device=device)),
        bad("number of lengths", r"cache_seqlens must be int32 of shape \(2,\)", lengths=_lengths(device, 6)),
        bad(
            "length too long",
            r"cache_seqlens\[1\] is 7, the cache holds 0 to 6",
            lengths=_lengths(device, 6, 7),
        ),
        bad("negative length", r"cache_seqlens\[0\] is -1", lengths=_lengths(device, -1, 3)),
        bad("page table", "page_table must be int32", page_table=pages.long()),
        bad("page that is not there", r"page_table\[0, 0\] is 2, there are 2 pages", page_table=pages + 2),
        bad("softcap", "softcap must be finite and at least 0", softcap=-1.0),
        bad("scale", "scale must be finite", scale=float("nan")),
        bad("sinks", r"sink_logits must have shape \(4,\)", sink_logits=ones(3)),
        bad("mask", "must be made of SlidingWindow and Lambda", ValueError, mask=Dense(ones(1, 1).bool())),
        bad("not a mask", "mask must be one of effkern.masks, got Tensor", TypeError, mask=ones(1, 1)),
        bad("gradient", "there is no gradient", NotImplementedError, q=ones(2, 4, 1, 8).requires_grad_()),
        bad("backend", "backend 'gpu' is unknown", ValueError, backend="gpu"),
    ]
