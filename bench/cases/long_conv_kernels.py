"""Generators of convolution kernels: sums of exponentials against the einsum that builds them all, and companion
matrices against repeated squaring."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import effkern
from effkern.ops.companion_kernel import companion_bytes, companion_flops
from effkern.ops.long_conv_kernels import vandermonde_bytes, vandermonde_flops
from effkern.reference import long_conv_kernels as reference

from . import Baseline, Call, Case, Oracle

# Building the graph of a backward pass alone would keep a gigabyte of the einsum alive for every set of inputs.
PASSES = ("forward", "both")


def _directions(pass_: str) -> list[bool]:
    return {"forward": [False], "both": [False, True]}[pass_]


def _results(
    kernel: Callable[..., Tensor], inputs: Sequence[Tensor], grad_out: Tensor | None, dtype: torch.dtype
) -> list[Tensor]:
    """The kernel, or the gradients of its inputs, computed in `dtype`."""
    leaves = [t.detach().to(dtype).requires_grad_(grad_out is not None) for t in inputs]
    out = kernel(*leaves)
    return [out] if grad_out is None else list(torch.autograd.grad(out, leaves, grad_out.to(dtype)))


@dataclass(frozen=True)
class VandermondeCase(Case):
    """The kernel of an S4D layer; complex parameters as pairs of real ones, as such layers keep them."""

    channels: int = 256
    states: int = 32
    length: int = 8192

    family = "long_conv"
    op = "vandermonde_kernel"

    @property
    def shape(self) -> str:
        return f"{self.channels} channels, {self.states} states, L {self.length}"

    def inputs(self, device: torch.device, seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        shape = self.channels, self.states
        output = torch.randn(*shape, 2, generator=generator)
        poles = torch.stack([torch.full(shape, -0.5), math.pi * torch.arange(self.states).expand(shape)], -1)
        steps = 10 ** (-3 + 2 * torch.rand(self.channels, generator=generator))
        return tuple(t.to(device, self.dtype) for t in (output, poles, steps))

    def _call(self, kernel: Callable[..., Tensor], C: Tensor, A: Tensor, dt: Tensor) -> Tensor:
        return kernel(torch.view_as_complex(C), torch.view_as_complex(A), dt, self.length)

    def ours(self, backend: str | None) -> Call:
        # Whatever the backend: it is a composition, and there is one.
        return functools.partial(self._call, effkern.vandermonde_kernel)

    def baselines(self, device: torch.device, pass_: str, full: bool) -> dict[str, Baseline]:
        return {"einsum": Baseline(functools.partial(self._call, reference.vandermonde_kernel))}

    def oracle(self, inputs: Sequence[Tensor], grad_out: Tensor | None) -> Oracle:
        few = 2  # all channels in float64 would take gigabytes

        def results(dtype: torch.dtype) -> list[Tensor]:
            call = functools.partial(self._call, reference.vandermonde_kernel)
            grad = None if grad_out is None else grad_out[:few]
            return _results(call, [t[:few] for t in inputs], grad, dtype)

        return Oracle(
            lambda tensors: [t.detach()[:few] for t in tensors],
            results(torch.float64),
            results(self.dtype),
            f"the first {few} channels",
        )

    def _meta(self) -> tuple[Tensor, Tensor, Tensor]:
        parameter = torch.empty(self.channels, self.states, dtype=torch.complex64, device="meta")
        return parameter, parameter, torch.empty(self.channels, dtype=self.dtype, device="meta")

    def flops(self, pass_: str) -> float:
        return sum(vandermonde_flops(*self._meta(), self.length, backward=b) for b in _directions(pass_))

    def bytes(self, pass_: str) -> float:
        return sum(vandermonde_bytes(*self._meta(), self.length, backward=b) for b in _directions(pass_))

    def tiny(self) -> VandermondeCase:
        return VandermondeCase("tiny-s4d", self.dtype, self.passes, (), channels=3, states=4, length=40)


@dataclass(frozen=True)
class CompanionCase(Case):
    """The kernel of a SpaceTime layer, its last columns scaled as the paper does."""

    channels: int = 64
    order: int = 64
    length: int = 4096

    family = "long_conv"
    op = "companion_kernel"

    @property
    def shape(self) -> str:
        return f"{self.channels} channels, order {self.order}, L {self.length}"

    def inputs(self, device: torch.device, seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        a, b, c = (torch.randn(self.channels, self.order, generator=generator) for _ in range(3))
        a = 0.99 * a / a.abs().sum(1, keepdim=True)
        return tuple(t.to(device, self.dtype) for t in (a, b, c))

    def ours(self, backend: str | None) -> Call:
        return functools.partial(effkern.companion_kernel, length=self.length, backend=backend)

    def baselines(self, device: torch.device, pass_: str, full: bool) -> dict[str, Baseline]:
        return {"squaring": Baseline(functools.partial(_by_squaring, length=self.length))}

    def oracle(self, inputs: Sequence[Tensor], grad_out: Tensor | None) -> Oracle:
        call = functools.partial(reference.companion_kernel, length=self.length)
        exact, plain = (_results(call, inputs, grad_out, dtype) for dtype in (torch.float64, self.dtype))
        return Oracle(lambda tensors: [t.detach() for t in tensors], exact, plain, "all")

    def _meta(self) -> tuple[Tensor, Tensor, Tensor]:
        parameter = torch.empty(self.channels, self.order, dtype=self.dtype, device="meta")
        return parameter, parameter, parameter

    def flops(self, pass_: str) -> float:
        return sum(companion_flops(*self._meta(), self.length, backward=b) for b in _directions(pass_))

    def bytes(self, pass_: str) -> float:
        return sum(companion_bytes(*self._meta(), self.length, backward=b) for b in _directions(pass_))

    def tiny(self) -> CompanionCase:
        return CompanionCase("tiny-spacetime", self.dtype, self.passes, (), channels=3, order=4, length=40)


def _by_squaring(a: Tensor, b: Tensor, c: Tensor, length: int) -> Tensor:
    """All states A^l b by doubling their number, with A, A^2, A^4 ... as dense matrices."""
    order = a.shape[1]
    shift = torch.diag(torch.ones(order - 1, dtype=a.dtype, device=a.device), -1)
    power = shift + torch.nn.functional.pad(a[..., None], (order - 1, 0))
    states = b[..., None]
    while states.shape[2] < length:
        states = torch.cat([states, power @ states], 2)
        if states.shape[2] < length:
            power = power @ power
    return (c[:, None] @ states)[:, 0, :length]


def cases() -> list[Case]:
    fp32 = torch.float32
    return [
        VandermondeCase("s4d/256x32/8192/fp32", fp32, PASSES, PASSES),
        VandermondeCase("sashimi/64x32/64000/fp32", fp32, PASSES, (), channels=64, length=64000),
        CompanionCase("spacetime/64x64/4096/fp32", fp32, PASSES, PASSES),
        CompanionCase("spacetime/128x64/1000/fp32", fp32, PASSES, (), channels=128, length=1000),
    ]
