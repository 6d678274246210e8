"""Argument checks that the ops on clustered weights share."""

from __future__ import annotations

import torch
from torch import Tensor

from effkern.ops._dispatch import FAST_DTYPES, dtype_name

MOST_CLUSTERS = 256
DIMS = (1, 2, 4)


def require(op: str, condition: bool, message: str, error: type[Exception] = RuntimeError) -> None:
    if not condition:
        raise error(f"{op}: {message}")


def check_weight(op: str, weight: Tensor) -> None:
    require(
        op, isinstance(weight, Tensor), f"weight must be a tensor, got {type(weight).__name__}", TypeError
    )
    check_form(op, weight)
    shape = tuple(weight.shape)
    require(op, all(n > 0 for n in shape), f"weight must not be empty, got shape {shape}")


def check_form(op: str, weight: Tensor) -> None:
    found = dtype_name(weight.dtype)
    allowed = weight.dtype in (*FAST_DTYPES, torch.float64)
    require(op, allowed, f"weight must be float32, bfloat16, float16 or float64, got {found}")
    require(op, weight.dim() >= 1, "weight must have at least one axis, got shape ()")


# Messages with sizes are put together where they are needed only: a compiler may not know the sizes yet.
def check_clusters(op: str, clusters: int, argument: str = "clusters") -> None:
    if not 1 <= clusters <= MOST_CLUSTERS:
        raise ValueError(f"{op}: {argument} must be between 1 and {MOST_CLUSTERS}, got {clusters}")


def check_groups(op: str, weight: Tensor, groups: int, dim: int) -> None:
    rows, columns = weight.shape[0], weight.shape[-1]
    if dim not in DIMS:
        raise ValueError(f"{op}: dim must be 1, 2 or 4, got {dim}")
    if groups < 1 or rows % groups:
        raise ValueError(f"{op}: groups {groups} does not divide the {rows} rows of weight")
    # Of a vector the last axis is the first one too: no run of neighbours crosses a group.
    run = columns if weight.dim() > 1 else columns // groups
    if run % dim:
        raise ValueError(f"{op}: dim {dim} does not divide the last axis of weight, of size {columns}")
