"""Layers that train with clustered weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effkern.nn._clustering import ClusteredWeight


class ClusteredLinear(ClusteredWeight):
    """torch.nn.Linear that trains with the weights it will have once they are palettised: x (..., in_features) ->
    (..., out_features).

        in training    out = x dkm(weight, centroids)^T + bias
        otherwise      out = x nearest(weight, centroids)^T + bias

    Args:
        in_features: the width of the input.
        out_features: the width of the output.
        bits: of an index, 1, 2, 3, 4, 6 or 8; there are 2^bits centroids.
        bias: whether there is a bias.
        groups: how many parts of consecutive rows have centroids of their own. Must divide out_features.
        dim: 1, 2 or 4: an index stands for so many neighbours of a row. Must divide in_features.
        temperature: as in `effkern.dkm`, where the layer starts; None: a tenth of the squared distance of neighbouring
            centroids, by the median.
        iterations: as in `effkern.dkm`.
        tolerance: as in `effkern.dkm`.
        backend: as in `effkern.dkm`.

    Parameters: `weight` (out_features, in_features), `bias` (out_features) or None. Buffers: `centroids`, where the
    next forward starts, and `latest`, where the last one in training ended: (2^bits), with groups (groups, 2^bits),
    with dim (2^bits, dim) or (groups, 2^bits, dim), float32. The state_dict has both, and the temperature.

    After every optimizer step `update_centroids()` lets the next clustering start where the last one ended, for all
    layers of a model `TemperatureSchedule.step()`. Without it every step starts from the same centroids.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int = 3,
        bias: bool = True,
        *,
        groups: int = 1,
        dim: int = 1,
        temperature: float | None = None,
        iterations: int = 3,
        tolerance: float = 0.0,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            (out_features, in_features),
            bits,
            groups=groups,
            dim=dim,
            temperature=temperature,
            iterations=iterations,
            tolerance=tolerance,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Those of a fresh torch.nn.Linear."""
        bound = self.in_features**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        self.reset_centroids()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise RuntimeError(
                f"ClusteredLinear: x must have {self.in_features} features, got shape {tuple(x.shape)}"
            )
        return F.linear(x, self.effective_weight(), self.bias)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, bits: int = 3, *, importance: Tensor | None = None, **options: Any
    ) -> ClusteredLinear:
        """A layer on the Parameters of `linear` themselves: an optimizer and ties to other layers keep them.

        Args:
            linear: left as it is.
            bits: as in the constructor.
            importance: (out_features, in_features), how much an error of each weight counts where the centroids start.
            options: groups, dim, temperature, iterations, tolerance, backend.
        """
        made = cls(
            linear.in_features, linear.out_features, bits, linear.bias is not None, device="meta", **options
        )
        made.weight = linear.weight  # type: ignore[assignment]
        made.bias = linear.bias
        made.reset_centroids(importance)
        return made.train(linear.training)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self._settings()}"
        )


class ClusteredEmbedding(ClusteredWeight):
    """torch.nn.Embedding that trains with the weights it will have once they are palettised: indices (...) ->
    (..., embedding_dim).

    Args:
        num_embeddings: rows.
        embedding_dim: the width of a row. dim must divide it.
        bits: as in `ClusteredLinear`, like all that follow.

    Parameter: `weight` (num_embeddings, embedding_dim). Buffers and state as in `ClusteredLinear`. A padding row, a
    maximal norm and sparse gradients have no place here: the clustering gives every row a gradient.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bits: int = 3,
        *,
        groups: int = 1,
        dim: int = 1,
        temperature: float | None = None,
        iterations: int = 3,
        tolerance: float = 0.0,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            (num_embeddings, embedding_dim),
            bits,
            groups=groups,
            dim=dim,
            temperature=temperature,
            iterations=iterations,
            tolerance=tolerance,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Those of a fresh torch.nn.Embedding."""
        nn.init.normal_(self.weight)
        self.reset_centroids()

    def forward(self, indices: Tensor) -> Tensor:
        """indices (...), int32 or int64 -> (..., embedding_dim)."""
        return F.embedding(indices, self.effective_weight())

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, bits: int = 3, *, importance: Tensor | None = None, **options: Any
    ) -> ClusteredEmbedding:
        """As `ClusteredLinear.from_linear`. ValueError where the embedding has what `refusal` names."""
        reason = refusal(embedding)
        if reason is not None:
            raise ValueError(f"ClusteredEmbedding: {reason}")
        made = cls(embedding.num_embeddings, embedding.embedding_dim, bits, device="meta", **options)
        made.weight = embedding.weight  # type: ignore[assignment]
        made.reset_centroids(importance)
        return made.train(embedding.training)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self._settings()}"


def refusal(embedding: nn.Embedding) -> str | None:
    """Why an embedding cannot be clustered, None when it can."""
    if embedding.padding_idx is not None:
        return "it has a padding row, which must stay as it is"
    if embedding.max_norm is not None:
        return "it has a maximal norm"
    if embedding.sparse or embedding.scale_grad_by_freq:
        return "its gradients are sparse or scaled by frequency"
    return None
