"""A linear layer whose weight is a Monarch matrix."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effkern.ops.monarch import monarch_matmul
from effkern.ops.monarch_factors import monarch_dense, monarch_project


class MonarchLinear(nn.Module):
    """torch.nn.Linear with a Monarch matrix as weight: x (..., in_features) -> (..., out_features).

    A square layer has nblocks / 2 times fewer parameters and multiplications than a dense one.

    Args:
        in_features: n, the width of the input. Padded with zeros where nblocks does not divide it.
        out_features: m, the width of the output; a part of a wider one where nblocks does not divide it.
        nblocks: blocks of each factor. Useful: 4 to 8 at a width of 1024, 8 to 16 at 2048, 16 to 32 at 4096.
        bias: whether there is a bias.
        rank: rank of the slices of the weight (`effkern.monarch_project`); None makes the blocks of the smaller
            factor square, min(m, n) / nblocks^2 rounded up.
        backend: as in `effkern.monarch_matmul`.

    Parameters: `w1` (nblocks, nblocks rank, n / nblocks), `w2` (nblocks, m / nblocks, nblocks rank), `bias` (m) or
    None.
    Fresh weights give outputs the variance that a fresh torch.nn.Linear gives them.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        nblocks: int = 4,
        bias: bool = True,
        *,
        rank: int | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if in_features < 1 or out_features < 1 or nblocks < 1:
            raise ValueError(
                f"MonarchLinear: in_features, out_features and nblocks must be at least 1, got {in_features}, "
                f"{out_features} and {nblocks}"
            )
        columns, rows = -(-in_features // nblocks), -(-out_features // nblocks)
        rank = -(-min(columns, rows) // nblocks) if rank is None else rank
        if not 1 <= rank <= min(columns, rows):
            raise ValueError(f"MonarchLinear: rank must be between 1 and {min(columns, rows)}, got {rank}")
        self.in_features, self.out_features, self.nblocks, self.rank = (
            in_features,
            out_features,
            nblocks,
            rank,
        )
        self.backend = backend
        middle = nblocks * rank
        self.w1 = nn.Parameter(torch.empty(nblocks, middle, columns, device=device, dtype=dtype))
        self.w2 = nn.Parameter(torch.empty(nblocks, rows, middle, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        # Linear's weights have variance 1 / (3 n), which leaves a third of the input's variance: the square root of a
        # third in each factor. Padded inputs are zero and do not count.
        inputs = self.in_features / self.nblocks
        for weight, fan_in in ((self.w1, inputs), (self.w2, self.w2.shape[2])):
            bound = math.sqrt(3.0) * 3.0**-0.25 / math.sqrt(fan_in)
            nn.init.uniform_(weight, -bound, bound)
        if self.bias is not None:
            bound = self.in_features**-0.5
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise RuntimeError(
                f"MonarchLinear: x must have {self.in_features} features, got shape {tuple(x.shape)}"
            )
        missing = self.w1.shape[0] * self.w1.shape[2] - self.in_features
        if missing:
            x = F.pad(x, (0, missing))
        wider = self.w2.shape[0] * self.w2.shape[1] - self.out_features
        bias = self.bias if self.bias is None or not wider else F.pad(self.bias, (0, wider))
        out = monarch_matmul(x, self.w1, self.w2, bias, backend=self.backend)
        return out[..., : self.out_features] if wider else out

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, nblocks: int = 4, rank: int | None = None, *, backend: str | None = None
    ) -> MonarchLinear:
        """The layer closest to `linear`: its weight projected in float64, its bias copied, its dtype and device."""
        weight = linear.weight.detach()
        made = cls(
            linear.in_features,
            linear.out_features,
            nblocks,
            linear.bias is not None,
            rank=rank,
            backend=backend,
            device="meta",  # where no random numbers are drawn
            dtype=weight.dtype,
        ).to_empty(device=weight.device)
        missing = [
            made.w1.shape[2] * nblocks - linear.in_features,
            made.w2.shape[1] * nblocks - linear.out_features,
        ]
        w1, w2 = monarch_project(F.pad(weight, (0, missing[0], 0, missing[1])), nblocks, made.rank)
        with torch.no_grad():
            made.w1.copy_(w1)
            made.w2.copy_(w2)
            if made.bias is not None:
                made.bias.copy_(linear.bias)
        return made.train(linear.training)

    def dense_weight(self) -> Tensor:
        """(out_features, in_features): what a dense layer would hold; differentiable."""
        return monarch_dense(self.w1, self.w2)[: self.out_features, : self.in_features]

    def to_linear(self) -> nn.Linear:
        """The dense layer that computes the same (reverse sparsification)."""
        weight = self.dense_weight().detach()
        linear = nn.Linear(
            self.in_features,
            self.out_features,
            self.bias is not None,
            device=weight.device,
            dtype=weight.dtype,
        )
        with torch.no_grad():
            linear.weight.copy_(weight)
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, nblocks={self.nblocks}, "
            f"rank={self.rank}, bias={self.bias is not None}"
        )
