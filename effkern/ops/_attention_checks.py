"""Argument checks of attention in Python, in the words of csrc/attention/checks.h: for every path but the C++ op."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from effkern.ops._dispatch import FAST_DTYPES, dtype_name

MAX_HEAD_DIM = 256


def require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(f"attention: {message}")


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """What must hold before dtype and device mean anything."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"attention: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided:
            layout = str(tensor.layout).removeprefix("torch.")
            raise RuntimeError(f"attention: {name} must be a dense strided tensor, got layout {layout}")


def largest_factor(dtype: torch.dtype) -> tuple[float, str]:
    """Of scores of q's dtype, and the words for it: in float32, in which all but float64 is computed, a larger one
    would turn every score into infinity or NaN."""
    return (math.inf, "") if dtype == torch.float64 else (torch.finfo(torch.float32).max, " in float32")


def check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float | None,
) -> None:
    """Shapes, dtypes and devices; the head dimension has no upper limit here."""
    check_tensors(q, k, v)
    packed = cu_seqlens_q is not None
    only = "cu_seqlens_q" if packed else "cu_seqlens_k"
    require(
        packed == (cu_seqlens_k is not None),
        f"cu_seqlens_q and cu_seqlens_k go together; only {only} was given",
    )
    rank, axes = (
        (3, "(heads, tokens, dim) with cu_seqlens") if packed else (4, "(batch, heads, sequence, dim)")
    )
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        require(
            tensor.dim() == rank,
            f"{name} must have {rank} dimensions {axes}, got shape {tuple(tensor.shape)}",
        )
        require(
            tensor.dtype == q.dtype, f"{name} is {dtype_name(tensor.dtype)} but q is {dtype_name(q.dtype)}"
        )
        require(tensor.device == q.device, f"{name} is on {tensor.device}, q is on {q.device}")
    require(
        q.dtype in FAST_DTYPES or q.dtype == torch.float64,
        f"q, k and v must be float32, bfloat16, float16 or float64, got {dtype_name(q.dtype)}",
    )
    if not packed:
        require(k.shape[0] == q.shape[0], f"k has batch {k.shape[0]}, q has {q.shape[0]}")
        require(v.shape[0] == q.shape[0], f"v has batch {v.shape[0]}, q has {q.shape[0]}")
    heads_q, heads_kv = q.shape[-3], k.shape[-3]
    require(v.shape[-3] == heads_kv, f"v has {v.shape[-3]} heads, k has {heads_kv}")
    require(v.shape[-2] == k.shape[-2], f"v has {v.shape[-2]} keys, k has {k.shape[-2]}")
    require(k.shape[-1] == q.shape[-1], f"k has head dim {k.shape[-1]}, q has {q.shape[-1]}")
    divides = heads_q % heads_kv == 0 if heads_kv > 0 else heads_q == 0
    require(divides, f"k has {heads_kv} heads, which does not divide q's {heads_q}")
    require(q.shape[-1] >= 1, "q has head dim 0, expected at least 1")
    require(v.shape[-1] >= 1, "v has head dim 0, expected at least 1")
    if isinstance(scale, float):
        most, where = largest_factor(q.dtype)
        require(math.isfinite(scale) and abs(scale) <= most, f"scale must be finite{where}, got {scale}")
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return
    for name, offsets in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if not isinstance(offsets, Tensor):
            raise TypeError(f"attention: {name} must be a tensor, got {type(offsets).__name__}")
        require(offsets.dtype == torch.int32, f"{name} must be int32, got {dtype_name(offsets.dtype)}")
        require(
            offsets.dim() == 1 and offsets.shape[0] >= 1,
            f"{name} must have shape (sequences + 1,), got {tuple(offsets.shape)}",
        )
        require(offsets.device == q.device, f"{name} is on {offsets.device}, q is on {q.device}")
    sequences_q, sequences_k = cu_seqlens_q.shape[0] - 1, cu_seqlens_k.shape[0] - 1
    require(
        sequences_q == sequences_k,
        f"cu_seqlens_q has {sequences_q} sequences, cu_seqlens_k has {sequences_k}",
    )


def check_offsets(name: str, offsets: Tensor, tokens: int) -> int:
    """The values of cu_seqlens, read from whatever device they live on. Returns the longest sequence."""
    values = offsets.tolist()
    require(values[0] == 0, f"{name} must start at 0, got {values[0]}")
    for i in range(1, len(values)):
        require(
            values[i] >= values[i - 1],
            f"{name} must not decrease, got {values[i - 1]} then {values[i]} at position {i}",
        )
    require(values[-1] == tokens, f"{name} must end at the number of tokens {tokens}, got {values[-1]}")
    return max((values[i] - values[i - 1] for i in range(1, len(values))), default=0)
