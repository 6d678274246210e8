"""Calls of attention with masks, score terms and dropout: some that must work and some that must fail."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effkern.masks import (
    BlockSparse,
    Dense,
    Document,
    Lambda,
    Mask,
    ShiftedGroups,
    SlidingWindow,
    alibi_slopes,
)
from effkern.ops.registry import BadSample, Sample


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def option_samples(device: str, dtype: torch.dtype) -> list[Sample]:
    def tensors(q: tuple[int, ...], k: tuple[int, ...]) -> tuple[Tensor, ...]:
        return tuple(_random(i, *shape).to(device, dtype) for i, shape in enumerate((q, k, k)))

    def terms(*shape: int) -> Tensor:
        return _random(3, *shape).to(device, dtype)

    square = tensors((2, 4, 40, 16), (2, 2, 40, 16))
    wide = tensors((2, 4, 33, 16), (2, 2, 40, 16))
    packed = tensors((4, 15, 16), (2, 19, 16))
    ends = {
        "cu_seqlens_q": torch.tensor([0, 5, 5, 14, 15], device=device, dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 7, 10, 19, 19], device=device, dtype=torch.int32),
    }
    ids = (torch.arange(40) // 15).expand(2, -1)
    layout = _random(4, 1, 4, 3, 3) < 0.3
    hidden = terms(4, 33, 40).masked_fill(_random(5, 33, 40).to(device) < -0.5, -torch.inf)
    everything = {
        "mask": Lambda(3, 9) & Dense(_random(6, 4, 33, 40) < 1.0).to(device),
        "bias": terms(33, 40),
        "softcap": 4.0,
        "sink_logits": terms(4),
        "alibi_slopes": alibi_slopes(4).to(device),
        "dropout_p": 0.3,
    }
    return [
        Sample("window", square, {"mask": SlidingWindow(7, 3)}),
        Sample("lambda, packed", packed, {**ends, "mask": Lambda(2, 4)}),
        Sample("shifted groups", wide, {"mask": ShiftedGroups(12), "causal": True}),
        Sample("blocks", wide, {"mask": BlockSparse(layout, 16).to(device), "causal": True}),
        Sample("documents", square, {"mask": (Document(ids) & SlidingWindow(None, 0)).to(device)}),
        Sample("dense mask", wide, {"mask": Dense(_random(6, 4, 33, 40) < 0.5).to(device)}),
        Sample("bias", wide, {"bias": hidden}),
        Sample(
            "bias of rows, sinks, packed",
            packed,
            {**ends, "bias": terms(4, 1, 9, 1), "sink_logits": terms(4), "causal": True},
        ),
        Sample("dropout, packed", packed, {**ends, "dropout_p": 0.5}),
        Sample("everything", wide, everything),
    ]


def bad_option_samples(device: str) -> list[BadSample]:
    q = torch.ones(2, 4, 20, 8, device=device)
    packed: dict[str, Any] = {
        name: torch.tensor([0, 8, 20], dtype=torch.int32, device=device)
        for name in ("cu_seqlens_q", "cu_seqlens_k")
    }

    def bad(name: str, match: str, error: type[Exception] = RuntimeError, **kwargs: Any) -> BadSample:
        tensors = (q[0],) * 3 if "cu_seqlens_q" in kwargs else (q,) * 3
        return BadSample(name, tensors, kwargs, error, match)

    def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.ones(shape, device=device, dtype=dtype)

    def seen(*shape: int) -> Mask:
        return Dense(ones(*shape, dtype=torch.bool))

    def blocks(*shape: int) -> Mask:
        return BlockSparse(ones(*shape, dtype=torch.bool), 16)

    small = r"layout has shape \(1, 1, 1, 2\), which does not broadcast to \(2, 4, 2, 2\)"
    return [
        bad("bool tensor as mask", "got Tensor; effkern.masks.Dense", TypeError, mask=ones(20, 20).bool()),
        bad("name as mask", "mask must be one of effkern.masks, got str", TypeError, mask="window"),
        bad("small layout", small, mask=blocks(1, 1, 1, 2)),
        bad("heads of layout", r"layout has shape \(1, 3, 2, 2\)", mask=blocks(1, 3, 2, 2)),
        bad("small packed layout", r"layout has shape \(2, 1, 1, 0\)", mask=blocks(2, 1, 1, 0), **packed),
        bad(
            "short ids", r"ids must have shape \(2 or 1, 20\), got \(1, 19\)", mask=Document(ones(19).long())
        ),
        bad("batch of ids", r"ids must have shape .* got \(3, 20\)", mask=Document(ones(3, 20).long())),
        bad("dense size", r"visible has shape \(1, 1, 20, 19\)", mask=seen(20, 19)),
        bad("small packed dense", r"visible has shape \(1, 1, 11, 12\)", mask=seen(11, 12), **packed),
        bad("bias size", r"bias has shape \(1, 4, 19, 20\), which does not broadcast", bias=ones(4, 19, 20)),
        bad("bias rank", "bias must broadcast to .* got shape", bias=ones(1, 1, 1, 20, 20)),
        bad(
            "bias dtype",
            "bias must be float32 or q's float32, got float16",
            bias=ones(20, dtype=torch.float16),
        ),
        bad("bias list", "bias must be a tensor, got list", TypeError, bias=[0.0]),
        bad("bias device", "bias is on", bias=torch.ones(20, device="meta")),
        bad(
            "layout device",
            "layout is on",
            mask=BlockSparse(torch.ones(1, 1, 2, 2, dtype=torch.bool, device="meta"), 16),
        ),
        bad("small packed bias", r"bias has shape \(2, 1, 1, 11\)", bias=ones(2, 1, 1, 11), **packed),
        bad("negative softcap", "softcap must be finite and at least 0, got -1", softcap=-1.0),
        bad("NaN softcap", "softcap must be finite and at least 0, got nan", softcap=float("nan")),
        bad("sinks shape", r"sink_logits must have shape \(4,\), .* got \(3,\)", sink_logits=ones(3)),
        bad("sinks dtype", "sink_logits must be float32 or q's", sink_logits=ones(4, dtype=torch.float64)),
        bad("slopes shape", r"alibi_slopes must have shape \(4,\), .* got \(1, 4\)", alibi_slopes=ones(1, 4)),
        bad(
            "trained slopes",
            "alibi_slopes must not require a gradient",
            alibi_slopes=ones(4).requires_grad_(),
        ),
        bad("dropout of all", r"dropout_p must be in \[0, 1\), got 1", dropout_p=1.0),
        bad("negative dropout", r"dropout_p must be in \[0, 1\), got -0.1", dropout_p=-0.1),
        bad("NaN dropout", r"dropout_p must be in \[0, 1\), got nan", dropout_p=float("nan")),
    ]
