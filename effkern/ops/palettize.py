"""Weights as indices into a short table: packing clustered weights, and the palette that holds them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from effkern.ops import _palette_layout as layout
from effkern.ops._cluster_checks import DIMS, check_clusters, check_groups, check_weight, require
from effkern.ops._dispatch import FAST_DTYPES, dtype_name, require_dense

__all__ = ["Palette", "palettize"]

NAME = "palettize"
_KEYS = {"indices", "layout", "lut", "shape"}
_AT_ONCE = 1 << 20  # distances


@dataclass(frozen=True, eq=False)
class Palette:
    """A weight as packed indices into a table of its values; made by `effkern.palettize`.

    An index has as few bits of 1, 2, 3, 4, 6 and 8 as the clusters need. Every row is packed on its own: blocks of 16
    lanes of 32-bit words, three words a lane for 3 and 6 bits, else one; index 16 f + l of a block is field f of lane
    l, so that one shift unpacks a vector of indices. 512, 256, 512, 128, 256 or 64 indices are a block; the last one of
    a row has as few lanes as it needs. `effkern/ops/_palette_layout.py` has the details.

    Attributes:
        indices: (rows, bytes), uint8.
        lut: the table: the centroids in the weight's dtype, (k), (groups, k), (k, dim) or (groups, k, dim).
        shape: of the weight.
        bits: of an index.
        groups: how many tables; the rows share them in order.
        dim: how many neighbours along the last axis one index stands for.
    """

    indices: Tensor
    lut: Tensor
    shape: tuple[int, ...]
    bits: int
    groups: int = 1
    dim: int = 1

    @property
    def bits_per_weight(self) -> float:
        """Indices and tables, padding included, over the number of weights."""
        stored = self.indices.numel() + self.lut.numel() * self.lut.element_size()
        return 8 * stored / math.prod(self.shape)

    def to_dense(self) -> Tensor:
        """The weight, in the dtype of the table, differentiable in it."""
        rows, count = _grid(self.shape, self.groups, self.dim)
        tables = self.lut.reshape(self.groups, -1, self.dim)
        each = rows // self.groups
        parts = []
        for group, packed in enumerate(self.indices.split(each)):
            codes = layout.unpack(packed, count, self.bits)
            parts.append(tables[group][codes.int()])
        return torch.cat(parts).reshape(self.shape)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors only: indices, lut, shape, and layout, which is (bits, groups, dim)."""
        return {
            "indices": self.indices.detach(),
            "lut": self.lut.detach(),
            "shape": torch.tensor(self.shape, dtype=torch.int64),
            "layout": torch.tensor([self.bits, self.groups, self.dim], dtype=torch.int64),
        }

    @staticmethod
    def from_state_dict(state: Mapping[str, Tensor]) -> Palette:
        """The inverse of `state_dict`. ValueError where something is missing, truncated or does not fit together."""

        def need(condition: bool, message: str) -> None:
            require("Palette.from_state_dict", condition, message, ValueError)

        need(set(state) == _KEYS, f"expected the entries {sorted(_KEYS)}, got {sorted(state)}")
        for key in sorted(_KEYS):
            kind = type(state[key]).__name__
            need(isinstance(state[key], Tensor), f"{key} must be a tensor, got {kind}")
        indices, lut = state["indices"], state["lut"]
        for key in ("shape", "layout"):
            integers = state[key].dtype == torch.int64 and state[key].dim() == 1
            need(integers, f"{key} must be a vector of int64, got {state[key].dtype}")
        shape = tuple(state["shape"].tolist())
        need(len(shape) >= 1 and min(shape) >= 1, f"shape must be positive, got {shape}")
        need(
            state["layout"].numel() == 3,
            f"layout must be (bits, groups, dim), got {state['layout'].tolist()}",
        )
        bits, groups, dim = state["layout"].tolist()
        need(bits in layout.BITS, f"bits must be one of {layout.BITS}, got {bits}")
        need(dim in DIMS and shape[-1] % dim == 0, f"dim {dim} does not fit shape {shape}")
        need(
            groups >= 1 and shape[0] % groups == 0,
            f"groups {groups} does not divide the rows of shape {shape}",
        )
        allowed = (*FAST_DTYPES, torch.float64)
        need(lut.dtype in allowed, f"lut must be floating, got {dtype_name(lut.dtype)}")
        outer, inner = ([groups] if groups > 1 else []), ([dim] if dim > 1 else [])
        clusters = lut.shape[len(outer)] if lut.dim() > len(outer) else 0
        need(
            list(lut.shape) == [*outer, clusters, *inner] and 1 <= clusters <= 2**bits,
            f"lut has shape {tuple(lut.shape)}, which does not fit {groups} groups, dim {dim} and {bits} bits",
        )
        need(bool(lut.isfinite().all()), "lut has entries that are not finite")
        rows, count = _grid(shape, groups, dim)
        expected = (rows, layout.row_bytes(count, bits))
        need(indices.dtype == torch.uint8, f"indices must be uint8, got {dtype_name(indices.dtype)}")
        need(
            tuple(indices.shape) == expected,
            f"indices has shape {tuple(indices.shape)}, expected {expected}: truncated, or of another weight",
        )
        if clusters < 2**bits:
            largest = int(layout.unpack(indices, count, bits).max())
            need(largest < clusters, f"indices is corrupt: index {largest} of a table of {clusters}")
        return Palette(indices, lut, shape, bits, groups, dim)


def _flatten(palette: Palette) -> tuple[list[Tensor], tuple[tuple[int, ...], int, int, int]]:
    return [palette.indices, palette.lut], (palette.shape, palette.bits, palette.groups, palette.dim)


def _unflatten(tensors: Iterable[Tensor], context: tuple[tuple[int, ...], int, int, int]) -> Palette:
    indices, lut = tensors
    return Palette(indices, lut, *context)


# Transformations of PyTorch then reach the two tensors.
torch.utils._pytree.register_pytree_node(
    Palette, _flatten, _unflatten, serialized_type_name="effkern.Palette"
)


def _grid(shape: tuple[int, ...], groups: int, dim: int) -> tuple[int, int]:
    """Rows that are packed, and indices of each. A vector has as many rows as tables."""
    rows = shape[0] if len(shape) > 1 else groups
    return rows, math.prod(shape) // rows // dim


def palettize(
    weight: Tensor, centroids: Tensor, *, groups: int | None = None, dim: int | None = None
) -> Palette:
    """Packs a weight as indices of its nearest centroids.

        index_i = argmin_j |w_i - c_j|^2, the lower j where two are equally near

    Args:
        weight: (rows, ...), rows are outputs, as in torch.nn.Linear. float32, bfloat16, float16 or float64. Any
            strides; detached.
        centroids: k of them, at most 256: (k), with groups (groups, k), for vectors (k, dim) or (groups, k, dim). Any
            floating dtype; rounded to the weight's dtype before distances are taken.
        groups: how many tables. It divides the rows, which share the tables in order. None: as the shape of the
            centroids says.
        dim: 1, 2 or 4, the neighbours along the last axis that share an index. None: as the shape of the centroids
            says; two axes that could be either (groups, k) or (k, dim) need one of the two arguments.

    Returns:
        A `Palette`: `.indices`, `.lut` (k), with groups above 1 (groups, k), with dim above 1 (k, dim) or (groups, k,
        dim), `.shape`, `.bits`, `.bits_per_weight`, `.to_dense()`, `.state_dict()` and `Palette.from_state_dict`.
        Palettising `.to_dense()` with the same centroids changes nothing.

    Raises:
        TypeError: weight or centroids is not a tensor of floating numbers.
        ValueError: more than 256 centroids, a shape that does not fit weight, groups or dim or could be two things,
            groups or dim that does not divide.
        RuntimeError: weight or centroids has entries that are not finite (or that overflow the weight's dtype), weight
            is empty, or devices differ; the message names the argument.

    Numerics:
        Distances in float64. An entry -0 of the centroids stays -0 in the table; for distances it is 0.

    Cost:
        A binary search a weight; for vectors k distances each. The table takes 16 bits an entry for 16-bit weights:
        4096 x 4096 weights at 3 bits take 3.0000 bits each with one table and 3.002 with one for every 16 rows (3.004
        in float32).

    Source:
        Cho et al. 2022 (DKM: Differentiable k-means clustering layer for neural network compression), section 3.
    """
    check_weight(NAME, weight)
    kind = type(centroids).__name__
    require(NAME, isinstance(centroids, Tensor), f"centroids must be a tensor, got {kind}", TypeError)
    require_dense(NAME, weight=weight, centroids=centroids)
    floating = centroids.is_floating_point()
    require(NAME, floating, f"centroids must be floating, got {dtype_name(centroids.dtype)}", TypeError)
    require(NAME, centroids.device == weight.device, "centroids is on another device than weight")
    groups, clusters, dim = _reading(weight, centroids, groups, dim)
    check_clusters(NAME, clusters, "clusters of centroids")
    check_groups(NAME, weight, groups, dim)
    with torch.no_grad():
        lut = centroids.detach().to(weight.dtype, copy=True)
        _require_finite(weight, "weight has entries that are not finite")
        _require_finite(lut, f"centroids has entries that are not finite in {dtype_name(weight.dtype)}")
        shape = tuple(weight.shape)
        rows, count = _grid(shape, groups, dim)
        vectors = weight.detach().reshape(groups, -1, dim)
        tables = lut.reshape(groups, clusters, dim)
        lut = tables.reshape([groups] * (groups > 1) + [clusters] + [dim] * (dim > 1))
        nearest = torch.stack([_nearest(vectors[g], tables[g]) for g in range(groups)]).view(rows, count)
        bits = layout.bits_for(clusters)
        return Palette(layout.pack(nearest, bits), lut.contiguous(), shape, bits, groups, dim)


def _require_finite(tensor: Tensor, message: str) -> None:
    """In a compiled graph the check is part of the graph, which goes on without waiting for the answer; there the error
    comes when the graph runs, on a GPU as a failed device assertion."""
    if tensor.is_meta:  # no numbers to look at
        return
    finite = tensor.isfinite().all()
    if torch.compiler.is_compiling():
        torch.ops.aten._assert_async.msg(finite, f"{NAME}: {message}")
    else:
        require(NAME, bool(finite), message)


def _reading(weight: Tensor, centroids: Tensor, groups: int | None, dim: int | None) -> tuple[int, int, int]:
    """groups, clusters and dim that the shape of the centroids and the arguments stand for."""

    def need(condition: bool, message: str) -> None:
        require(NAME, condition, message, ValueError)

    shape = tuple(centroids.shape)
    known = 1 <= len(shape) <= 3 and min(shape) >= 1
    need(known, f"centroids must have shape (k), (groups, k), (k, dim) or (groups, k, dim), got {shape}")
    if len(shape) == 1:
        found = 1, shape[0], 1
    elif len(shape) == 3:
        found = shape[0], shape[1], shape[2]
    elif groups is None and dim is None:
        tables = weight.shape[0] % shape[0] == 0
        vectors = shape[1] in DIMS[1:] and weight.shape[-1] % shape[1] == 0
        need(
            not (tables and vectors),
            f"centroids {shape} could be (groups, k) or (k, dim): give groups or dim",
        )
        found = (1, shape[0], shape[1]) if vectors else (shape[0], shape[1], 1)
    else:
        vectors = groups == 1 or (dim or 1) > 1
        found = (1, shape[0], shape[1]) if vectors else (shape[0], shape[1], 1)
    fits = groups in (None, found[0]) and dim in (None, found[2])
    need(fits, f"centroids has shape {shape}, which does not fit groups {groups} and dim {dim}")
    return found


def _nearest(vectors: Tensor, table: Tensor) -> Tensor:
    """(n, dim) and (k, dim) to (n) indices, uint8."""
    if table.shape[1] > 1:
        step = max(1, _AT_ONCE // table.numel())
        wide = table.double()
        found = [
            (part[:, None].double() - wide).square().sum(-1).argmin(-1).to(torch.uint8)
            for part in vectors.split(step)
        ]
        return torch.cat(found)
    values, order = table[:, 0].double().sort(stable=True)
    # Of equal entries the lowest index comes first, and stands for all of them. No entry is dropped: how many there are
    # would depend on their values, which a compiler cannot follow.
    order = order[torch.searchsorted(values, values)].to(torch.uint8)
    last, found = len(values) - 1, []
    for part in vectors[:, 0].split(_AT_ONCE):
        wide = part.double()
        above = torch.searchsorted(values, wide).clamp(max=last)
        below = (above - 1).clamp(min=0)
        # Not by the middle of the two, which in float64 may round onto one of them.
        down, up = wide - values[below], (values[above] - wide).abs()
        lower, upper = order[below], order[above]
        nearer = torch.where(down < up, lower, upper)
        found.append(torch.where(down == up, torch.minimum(lower, upper), nearer))
    return torch.cat(found)
