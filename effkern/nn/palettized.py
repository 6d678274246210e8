"""Layers whose weights are palettes: what clustered layers become once they are trained."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from effkern.ops import _palette_layout as layout
from effkern.ops.kmeans_init import kmeans_init
from effkern.ops.palettize import Palette, palettize
from effkern.ops.palettized_linear import eora_factors, palettized_linear

_ENTRIES = ("indices", "lut", "shape", "layout")
_FACTORS = ("low_rank_a", "low_rank_b")


class PalettizedWeight(nn.Module):
    """A palette as a module: it moves, casts and is saved with its layer, and layers with tied weights share one.

    Parameter: `lut`, the table, which can be trained on. Buffer: `indices`. The state_dict has the entries of
    `Palette.state_dict()`; loading one puts the palette of the file in place of this one, whatever its bits and groups.
    """

    indices: Tensor
    lut: nn.Parameter

    def __init__(self, palette: Palette) -> None:
        super().__init__()
        self._take(palette)

    def _take(self, palette: Palette) -> None:
        self.shape, self.bits = palette.shape, palette.bits
        self.groups, self.dim = palette.groups, palette.dim
        trained = "lut" not in self._parameters or self.lut.requires_grad
        # In memory of its own: layers that are to train one table share a module, not a Palette.
        self.lut = nn.Parameter(palette.lut.detach().clone(), requires_grad=trained)
        self.register_buffer("indices", palette.indices)

    def palette(self) -> Palette:
        return Palette(self.indices, self.lut, self.shape, self.bits, self.groups, self.dim)

    def rows(self, wanted: Tensor) -> Tensor:
        """The rows of the dense weight with the given numbers (...), (..., columns): only these are unpacked."""
        flat = wanted.reshape(-1).long()
        columns = math.prod(self.shape[1:])
        packed = self.indices.index_select(
            0, flat
        )  # unlike indexing it refuses negative numbers, as F.embedding does
        codes = layout.unpack(packed, columns // self.dim, self.bits).int()
        tables = self.lut.reshape(self.groups, -1, self.dim)
        table = flat // (self.shape[0] // self.groups)
        return tables[table[:, None], codes].reshape(*wanted.shape, columns)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        sizes = self.palette().state_dict()
        destination.update({prefix + name: sizes[name] for name in ("shape", "layout")})

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        missing = [prefix + name for name in _ENTRIES if prefix + name not in state_dict]
        if missing:
            missing_keys.extend(missing)
            return
        try:
            found = Palette.from_state_dict({name: state_dict[prefix + name] for name in _ENTRIES})
        except (TypeError, ValueError) as error:
            error_msgs.append(f"{prefix}{error}")
            return
        if found.shape != self.shape:
            error_msgs.append(f"{prefix}shape is {found.shape}, the layer's weight has {self.shape}")
            return
        device = found.indices.device if self.indices.is_meta else self.indices.device
        indices, lut = found.indices.detach().to(device, copy=True), found.lut.detach().to(device)
        before = self.lut
        self._take(Palette(indices, lut, found.shape, found.bits, found.groups, found.dim))
        if before.shape == lut.shape and not before.is_meta:
            # As any Parameter: its identity, which an optimizer may hold, and its dtype stay.
            with torch.no_grad():
                before.copy_(lut)
            self.lut = before

    def extra_repr(self) -> str:
        return (
            f"shape={self.shape}, bits={self.bits}, groups={self.groups}, dim={self.dim}, "
            f"bits_per_weight={self.palette().bits_per_weight:.4f}"
        )


class PalettizedLinear(nn.Module):
    """torch.nn.Linear with a palette as weight: x (..., in_features) -> (..., out_features).

        out = x W^T + bias  [+ (x A^T) B^T]

    Args:
        palette: of a weight (out_features, in_features), or a `PalettizedWeight` that other layers have too.
        bias: (out_features) or None. A Parameter is taken as it is, of another tensor a copy, like of the table.
        low_rank: (A, B), A (r, in_features) and B (out_features, r), any floating dtype: a correction of the weight by
            B A, such as `effkern.eora_factors` gives. Parameters are taken as they are.
        backend: as in `effkern.palettized_linear`.

    Parameters: `weight_palette.lut`, `bias`, and with low_rank `low_rank_a` and `low_rank_b`; buffer:
    `weight_palette.indices`. The state_dict holds tensors only; loading one that has a correction puts it in place,
    whatever its rank.
    """

    bias: nn.Parameter | None
    low_rank_a: nn.Parameter | None
    low_rank_b: nn.Parameter | None

    def __init__(
        self,
        palette: Palette | PalettizedWeight,
        bias: Tensor | None = None,
        *,
        low_rank: tuple[Tensor, Tensor] | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.weight_palette = _module(palette)
        shape = self.weight_palette.shape
        if len(shape) != 2:
            raise ValueError(f"PalettizedLinear: palette must be of a matrix, not of shape {shape}")
        self.out_features, self.in_features = shape
        if bias is not None and tuple(bias.shape) != shape[:1]:
            raise ValueError(f"PalettizedLinear: bias must have shape {shape[:1]}, got {tuple(bias.shape)}")
        self.bias = None if bias is None else _parameter(bias)
        if low_rank is not None and not self._fits(*low_rank):
            raise ValueError(f"PalettizedLinear: low_rank must be {self._wanted(*low_rank)}")
        for name, factor in zip(_FACTORS, low_rank or (None, None), strict=True):
            self.register_parameter(name, None if factor is None else _parameter(factor))
        self.backend = backend

    @property
    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """The correction (A, B), None where there is none."""
        if self.low_rank_a is None or self.low_rank_b is None:
            return None
        return self.low_rank_a, self.low_rank_b

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        palette = self.weight_palette.palette()
        return palettized_linear(x, palette, self.bias, low_rank=self.low_rank, backend=self.backend)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        bits: int = 3,
        *,
        groups: int = 1,
        dim: int = 1,
        importance: Tensor | None = None,
        rank: int = 0,
        covariance: Tensor | None = None,
        backend: str | None = None,
    ) -> PalettizedLinear:
        """Palettises without training: the weight is rounded to its k-means centroids (`effkern.kmeans_init`), the bias
        is linear's own.

        Args:
            linear: left as it is.
            bits: of an index, 1, 2, 3, 4, 6 or 8.
            groups: as in `ClusteredLinear`.
            dim: as in `ClusteredLinear`.
            importance: (out_features, in_features), how much an error of each weight counts.
            rank: of a low-rank correction by `effkern.eora_factors`, in the weight's dtype; 0 for none.
            covariance: (in_features, in_features), of the inputs, for the correction; None takes all directions as
                equal.
            backend: as in `effkern.palettized_linear`.
        """
        weight = linear.weight.detach()
        palette = _rounded(weight, bits, groups, dim, importance)
        factors = None
        if rank:
            seen = torch.eye(weight.shape[1], device=weight.device) if covariance is None else covariance
            first, second = eora_factors(weight, palette, seen, rank)
            factors = first.to(weight.dtype), second.to(weight.dtype)
        return cls(palette, linear.bias, low_rank=factors, backend=backend).train(linear.training)

    def to_linear(self) -> nn.Linear:
        """The dense layer that computes the same, the correction added to its weight."""
        weight = self.weight_palette.palette().to_dense().detach()
        if self.low_rank is not None:
            first, second = (factor.detach().float() for factor in self.low_rank)
            weight = (weight.float() + second @ first).to(weight.dtype)
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta", dtype=weight.dtype
        )
        linear.weight = nn.Parameter(weight)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone())
        return linear.train(self.training)

    def _fits(self, first: Tensor, second: Tensor) -> bool:
        matrices = first.dim() == second.dim() == 2 and first.shape[0] == second.shape[1] >= 1
        outer = (*second.shape[:1], *first.shape[1:]) == (self.out_features, self.in_features)
        return matrices and outer and first.is_floating_point() and second.is_floating_point()

    def _wanted(self, first: Tensor, second: Tensor) -> str:
        return (
            f"floating matrices (r, {self.in_features}) and ({self.out_features}, r), got {first.dtype} of shape "
            f"{tuple(first.shape)} and {second.dtype} of shape {tuple(second.shape)}"
        )

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        found = [state_dict.get(prefix + name) for name in _FACTORS]
        if all(isinstance(factor, Tensor) for factor in found):
            if not self._fits(*found):  # type: ignore[arg-type]
                error_msgs.append(f"{prefix}low_rank must be {self._wanted(*found)}")  # type: ignore[arg-type]
                return
            for name, factor in zip(_FACTORS, found, strict=True):
                held = self._parameters[name]
                if held is None or held.shape != factor.shape:  # type: ignore[union-attr]
                    like = self.weight_palette.lut
                    room = torch.empty_like(factor, device=like.device)  # type: ignore[arg-type]
                    setattr(self, name, nn.Parameter(room, requires_grad=like.requires_grad))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        rank = f", rank={len(self.low_rank_a)}" if self.low_rank_a is not None else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}{rank}"
        )


class PalettizedEmbedding(nn.Module):
    """torch.nn.Embedding with a palette as weight: indices (...) -> (..., embedding_dim). Only the rows that are asked
    for are unpacked.

    Args:
        palette: of a weight (num_embeddings, embedding_dim), or a `PalettizedWeight` that other layers have too.

    Parameters and buffers as in `PalettizedLinear`.
    """

    def __init__(self, palette: Palette | PalettizedWeight) -> None:
        super().__init__()
        self.weight_palette = _module(palette)
        shape = self.weight_palette.shape
        if len(shape) != 2:
            raise ValueError(f"PalettizedEmbedding: palette must be of a matrix, not of shape {shape}")
        self.num_embeddings, self.embedding_dim = shape

    def forward(self, indices: Tensor) -> Tensor:
        """indices (...), int32 or int64 -> (..., embedding_dim), in the dtype of the table."""
        if indices.dtype not in (torch.int32, torch.int64):
            raise RuntimeError(f"PalettizedEmbedding: indices must be int32 or int64, got {indices.dtype}")
        return self.weight_palette.rows(indices)

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        bits: int = 3,
        *,
        groups: int = 1,
        dim: int = 1,
        importance: Tensor | None = None,
    ) -> PalettizedEmbedding:
        """As `PalettizedLinear.from_linear`."""
        weight = embedding.weight.detach()
        return cls(_rounded(weight, bits, groups, dim, importance)).train(embedding.training)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


def _parameter(tensor: Tensor) -> nn.Parameter:
    if isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor.detach().clone(memory_format=torch.contiguous_format))


def _module(palette: Palette | PalettizedWeight) -> PalettizedWeight:
    return palette if isinstance(palette, PalettizedWeight) else PalettizedWeight(palette)


def _rounded(weight: Tensor, bits: int, groups: int, dim: int, importance: Tensor | None) -> Palette:
    if bits not in layout.BITS:
        raise ValueError(f"bits must be one of {', '.join(map(str, layout.BITS))}, got {bits}")
    centroids = kmeans_init(weight, 2**bits, groups=groups, dim=dim, importance=importance)
    return palettize(weight, centroids, groups=groups, dim=dim)
