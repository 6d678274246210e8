"""Calls of attention that must work and calls that must fail, for the contract tests and the self-test."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effkern.ops._attention_option_samples import bad_option_samples, option_samples
from effkern.ops._attention_options import Options, collect
from effkern.ops.registry import BadSample, Sample


def _tensors(
    device: str, dtype: torch.dtype, q: tuple[int, ...], k: tuple[int, ...], value_dim: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    v = (*k[:-1], k[-1] if value_dim is None else value_dim)
    made = []
    for seed, shape in enumerate((q, k, v)):
        generator = torch.Generator().manual_seed(seed)
        made.append(torch.randn(shape, generator=generator).to(device, dtype))
    return made[0], made[1], made[2]


def offsets(*lengths: int, device: str = "cpu") -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def samples(device: str, dtype: torch.dtype) -> list[Sample]:
    packed = {
        "cu_seqlens_q": offsets(5, 0, 9, 1, device=device),
        "cu_seqlens_k": offsets(7, 3, 9, 0, device=device),
    }
    plain = _tensors(device, dtype, (2, 4, 40, 32), (2, 4, 40, 32))
    wide = _tensors(device, dtype, (40, 2, 32, 4), (40, 2, 32, 4))
    return [
        Sample("plain", plain),
        Sample(
            "causal, grouped heads",
            _tensors(device, dtype, (2, 6, 33, 24), (2, 2, 49, 24), 40),
            {"causal": True},
        ),
        Sample(
            "top left",
            _tensors(device, dtype, (1, 2, 17, 16), (1, 1, 9, 16)),
            {"causal": True, "align": "top_left", "scale": 0.3},
        ),
        Sample(
            "first rows see no key", _tensors(device, dtype, (1, 2, 17, 16), (1, 1, 9, 16)), {"causal": True}
        ),
        Sample("packed", _tensors(device, dtype, (4, 15, 16), (2, 19, 16)), {**packed, "causal": True}),
        # (S, B, D, H) in memory: the head dimension is strided.
        Sample("odd strides", tuple(t.permute(1, 3, 0, 2) for t in wide)),
        Sample("one query", _tensors(device, dtype, (2, 4, 1, 64), (2, 1, 130, 64)), {"causal": True}),
        Sample("no keys", _tensors(device, dtype, (1, 2, 3, 8), (1, 2, 0, 8))),
        Sample("empty batch", _tensors(device, dtype, (0, 2, 3, 8), (0, 2, 4, 8))),
        *option_samples(device, dtype),
    ]


def calls(sample: Sample) -> list[tuple[str, tuple[Any, ...]]]:
    """The same call at the dispatcher, forward and backward."""
    q, k, v = sample.args
    given = dict(sample.kwargs)
    geometry = (
        given.pop("cu_seqlens_q", None),
        given.pop("cu_seqlens_k", None),
        given.pop("scale", None),
        given.pop("causal", False),
        given.pop("align", "bottom_right") == "top_left",
    )
    options = collect(q, geometry, **given) if given else Options(*geometry)
    with torch.no_grad():
        out, lse = torch.ops.effkern.attention(q, k, v, *options)
    grads = torch.cos(out), torch.ones_like(lse)
    bias_grad = options.bias is not None and options.bias.shape[-1] > 1
    return [
        ("attention", (q, k, v, *options)),
        ("attention_backward", (*grads, q, k, v, out, lse, *options, bias_grad)),
        ("attention_backward", (grads[0], None, q, k, v, out, lse, *options)),
    ]


def bad_samples(device: str) -> list[BadSample]:
    def bad(
        name: str,
        match: str,
        error: type[Exception] = RuntimeError,
        q: Any = None,
        k: Any = None,
        v: Any = None,
        **kwargs: Any,
    ) -> BadSample:
        q, k, v = (x if given is None else given for x, given in zip(good, (q, k, v), strict=True))
        return BadSample(name, (q, k, v), kwargs, error, match)

    def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.ones(shape, device=device, dtype=dtype)

    def packed(name: str, match: str, q: Tensor, k: Tensor) -> BadSample:
        tokens = ones(2, 6, 8), ones(2, 6, 8), ones(2, 6, 8)
        return BadSample(name, tokens, {"cu_seqlens_q": q, "cu_seqlens_k": k}, RuntimeError, match)

    def cu(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, device=device, dtype=dtype)

    good = ones(2, 4, 6, 8), ones(2, 4, 6, 8), ones(2, 4, 6, 8)
    sparse, whole = good[0].to_sparse(), good[0].long()
    fit = cu(0, 6)
    return [
        bad("not a tensor", "q must be a tensor, got list", TypeError, q=[1.0]),
        bad("scalar", r"q must have 4 dimensions .* got shape \(\)", q=ones()),
        bad(
            "rank 3 without cu_seqlens", r"q must have 4 dimensions .* got shape \(4, 6, 8\)", q=ones(4, 6, 8)
        ),
        bad("rank of k", r"k must have 4 dimensions .* got shape \(4, 6, 8\)", k=ones(4, 6, 8)),
        bad("rank of v", r"v must have 4 dimensions", v=ones(1, 2, 4, 6, 8)),
        bad("dtype mix", "k is bfloat16 but q is float32", k=ones(2, 4, 6, 8, dtype=torch.bfloat16)),
        bad("dtype mix in v", "v is float64 but q is float32", v=ones(2, 4, 6, 8, dtype=torch.float64)),
        bad("integers", "must be float32, bfloat16, float16", q=whole, k=whole, v=whole),
        bad("complex", "must be float32", q=whole * 1j, k=whole * 1j, v=whole * 1j),
        bad("sparse q", "q must be a dense strided tensor, got layout sparse_coo", q=sparse),
        bad("sparse k", "k must be a dense strided tensor", k=sparse),
        bad("heads", "k has 3 heads, which does not divide q's 4", k=ones(2, 3, 6, 8), v=ones(2, 3, 6, 8)),
        bad(
            "no kv heads",
            "k has 0 heads, which does not divide q's 4",
            k=ones(2, 0, 6, 8),
            v=ones(2, 0, 6, 8),
        ),
        bad("heads of v", "v has 2 heads, k has 4", v=ones(2, 2, 6, 8)),
        bad("batch", "k has batch 3, q has 2", k=ones(3, 4, 6, 8)),
        bad("batch of v", "v has batch 3, q has 2", v=ones(3, 4, 6, 8)),
        bad("keys", "v has 5 keys, k has 6", v=ones(2, 4, 5, 8)),
        bad("head dim", "k has head dim 16, q has 8", k=ones(2, 4, 6, 16)),
        bad("head dim 0", "q has head dim 0", q=ones(2, 4, 6, 0), k=ones(2, 4, 6, 0)),
        bad("value dim 0", "v has head dim 0", v=ones(2, 4, 6, 0)),
        bad("NaN scale", "scale must be finite in float32, got nan", scale=float("nan")),
        bad("infinite scale", "scale must be finite in float32, got inf", scale=float("inf")),
        bad("scale beyond float32", r"scale must be finite in float32, got 1e\+300", scale=1e300),
        bad("align", "align must be 'bottom_right' or 'top_left', got 'left'", ValueError, align="left"),
        bad("backend", "backend 'gpu' is unknown", ValueError, backend="gpu"),
        bad("one cu_seqlens", "cu_seqlens_q and cu_seqlens_k go together", cu_seqlens_k=fit),
        bad("rank 4 with cu_seqlens", "q must have 3 dimensions", cu_seqlens_q=fit, cu_seqlens_k=fit),
        packed("int64 cu_seqlens", "cu_seqlens_q must be int32, got int64", cu(0, 6, dtype=torch.int64), fit),
        packed("cu_seqlens rank", r"cu_seqlens_k must have shape \(sequences \+ 1,\)", fit, fit[None]),
        packed("empty cu_seqlens", r"cu_seqlens_q must have shape \(sequences \+ 1,\)", cu(), fit),
        packed("cu_seqlens lengths", "cu_seqlens_q has 1 sequences, cu_seqlens_k has 2", fit, cu(0, 3, 6)),
        packed("cu_seqlens start", "cu_seqlens_q must start at 0, got 1", cu(1, 6), fit),
        packed("cu_seqlens end", "cu_seqlens_k must end at the number of tokens 6, got 7", fit, cu(0, 7)),
        packed(
            "cu_seqlens falls", "cu_seqlens_q must not decrease, got 4 then 2", cu(0, 4, 2, 6), cu(0, 2, 4, 6)
        ),
        packed(
            "negative cu_seqlens", "cu_seqlens_k must not decrease, got 0 then -2", cu(0, 2, 6), cu(0, -2, 6)
        ),
        *bad_option_samples(device),
    ]
