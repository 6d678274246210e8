"""Merging of attention results in plain PyTorch, differentiable to any order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def attention_merge(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """l = log sum_k e^(l_k), o = sum_k e^(l_k - l) o_k; shapes as `effkern.attention_merge`.

    float64 is computed in float64, everything else in float32. A part that saw nothing (l_k = -inf) counts for
    nothing, and a row that no part saw gives 0 and -inf; neither has NaN in its gradients.
    """
    dtype = outs[0].dtype
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    levels = torch.stack([lse.to(compute) for lse in lses])
    unseen = levels == -torch.inf
    empty = unseen.all(0)
    top = levels.detach().amax(0).masked_fill(empty, 0.0)
    weights = (levels.masked_fill(unseen, 0.0) - top).exp().masked_fill(unseen, 0.0)
    total = weights.sum(0).masked_fill(empty, 1.0)
    shares = weights / total
    out = shares.new_zeros(outs[0].shape)
    for share, skipped, part in zip(shares, unseen, outs, strict=True):
        out = out + (share[..., None] * part.to(compute)).masked_fill(skipped[..., None], 0.0)
    return out.to(dtype), (top + total.log()).masked_fill(empty, -torch.inf)
