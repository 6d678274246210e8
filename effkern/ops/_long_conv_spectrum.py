"""A kernel that has been transformed beforehand."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from effkern import _host


@dataclass(frozen=True, eq=False)
class Spectrum:
    """What `effkern.long_conv_prepare` makes of a kernel, taken by `effkern.long_conv` in place of it.

    Attributes:
        k: the kernel itself; gradients go to it.
        length: the longest input it serves, state included.
        data: the transform, in an order of the backend's own; None where the reference runs, which does its own.
        level: the CPU level whose order that is; "" on other devices.
        version: how often k had been changed in place by then, and where its numbers were; None where nobody counts.

    Both are unknown, "" and None, where a compiled graph prepares. Changes through `k.data` and those of an inference
    tensor are not counted: nobody can notice them.
    """

    k: Tensor
    length: int
    data: Tensor | None
    level: str
    version: tuple[int, int] | None

    @classmethod
    def of(cls, k: Tensor, length: int, data: Tensor | None) -> Spectrum:
        if torch.compiler.is_compiling():
            return cls(k, length, data, "", None)
        return cls(k, length, data, _host.isa_active() if k.device.type == "cpu" else "", _version(k))

    def check(self, positions: int) -> None:
        """RuntimeError unless it is long enough and still belongs to its kernel."""
        if positions > self.length:
            raise RuntimeError(
                f"long_conv: the spectrum serves up to {self.length} positions, state included, got {positions}"
            )
        if not torch.compiler.is_compiling() and self.version not in (None, _version(self.k)):
            raise RuntimeError(
                "long_conv: k was changed in place after long_conv_prepare had made its spectrum; prepare it again"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> Spectrum:
        k = copy.deepcopy(self.k, memo)
        fresh = self.version == _version(self.k)
        version = _version(k) if fresh else self.version
        return Spectrum(k, self.length, copy.deepcopy(self.data, memo), self.level, version)

    def current(self) -> Tensor | None:
        """The transform, or None where k has to be transformed again."""
        if torch.compiler.is_compiling():
            # A graph cannot ask whether k has changed since, and training changes it all the time.
            trains = torch.is_grad_enabled() and self.k.requires_grad
            return None if trains and self.version is not None else self.data
        return self.data if self.level in ("", _host.isa_active()) else None


def _version(k: Tensor) -> tuple[int, int] | None:
    return None if k.is_inference() or isinstance(k, FakeTensor) else (k._version, k.data_ptr())
