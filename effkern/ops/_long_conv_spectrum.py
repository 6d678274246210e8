"""A kernel that has been transformed beforehand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effkern import _host


@dataclass(frozen=True, eq=False)
class Spectrum:
    """What `effkern.long_conv_prepare` makes of a kernel, taken by `effkern.long_conv` in place of it.

    Attributes:
        k: the kernel itself; gradients go to it.
        length: the longest input it serves, state included.
        causal: whether it was made for a causal convolution.
        data: the transform, in an order of the backend's own; None where there is nothing to gain from one.
        level: the CPU level whose order that is; "" on other devices, and where a compiler made it.
        version: how often k had been changed in place by then; None where PyTorch does not count it.
    """

    k: Tensor
    length: int
    causal: bool
    data: Tensor | None
    level: str
    version: int | None

    def check(self, positions: int, causal: bool) -> None:
        """RuntimeError unless the spectrum still belongs to its kernel and to a convolution of this kind."""
        if positions > self.length:
            raise RuntimeError(
                f"long_conv: the spectrum serves up to {self.length} positions, state included, got {positions}"
            )
        if causal != self.causal:
            raise RuntimeError(
                f"long_conv: the spectrum was made for causal={self.causal}, got causal={causal}"
            )
        if self.version != version_of(self.k):
            raise RuntimeError(
                "long_conv: k was changed in place after long_conv_prepare had made its spectrum; make it again"
            )

    def current(self) -> Tensor | None:
        """The transform, unless another CPU level has been forced since: then k has to be transformed again."""
        # A compiled graph belongs to one level; asking for it would break the graph.
        if torch.compiler.is_compiling() or self.level in ("", _host.isa_active()):
            return self.data
        return None


def version_of(k: Tensor) -> int | None:
    return None if k.is_inference() else k._version


def level_of(k: Tensor) -> str:
    """The CPU level in force for a tensor."""
    return "" if torch.compiler.is_compiling() or k.device.type != "cpu" else _host.isa_active()
