"""How long convolutions are judged: calls, whole or in parts, and the comparison with the float64 oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

import effkern
from effkern.reference.long_conv import long_conv as reference
from effkern.testing import errors

Convolution = Callable[..., Any]


@dataclass(frozen=True)
class Inputs:
    """The tensors of a call; those that are there become leaves."""

    u: Tensor
    k: Tensor
    skip: Tensor | None = None
    pre_gate: Tensor | None = None
    post_gate: Tensor | None = None
    state: Tensor | None = None

    @property
    def given(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: t for name, t in values.items() if t is not None}

    def map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        return replace(self, **{name: function(t) for name, t in self.given.items()})


def random_inputs(
    batch: int,
    channels: int,
    length: int,
    taps: int,
    dtype: torch.dtype = torch.float32,
    *,
    causal: bool = True,
    skip: bool = False,
    gates: bool = False,
    state: bool = False,
    float_weights: bool = False,
) -> Inputs:
    def make(*shape: int, scale: float = 1.0, weight: bool = False) -> Tensor:
        numbers = torch.randn(shape, dtype=torch.float64) * scale
        return numbers.to(torch.float32 if weight and float_weights else dtype)

    kernel = (channels, taps) if causal else (channels, 2, taps)
    row = (batch, channels, length)
    return Inputs(
        make(*row),
        make(*kernel, scale=taps**-0.5, weight=True),
        make(channels, weight=True) if skip else None,
        make(*row) if gates else None,
        make(*row) if gates else None,
        make(batch, channels, taps - 1) if state else None,
    )


def apply(convolution: Convolution, inputs: Inputs, cuts: tuple[int, ...] = (), **options: Any) -> Tensor:
    """The convolution in one call, or part after part, each with the state of the one before; `cuts` are where parts
    end. An option `prepared` puts a spectrum of k for that many positions in its place."""
    prepared = options.pop("prepared", 0)
    k: Any = inputs.k
    if prepared:
        k = effkern.long_conv_prepare(k, prepared, causal=options.get("causal", True))
    gates = {"pre_gate": inputs.pre_gate, "post_gate": inputs.post_gate}
    if not cuts:
        return convolution(inputs.u, k, skip=inputs.skip, state=inputs.state, **gates, **options)
    state, outs = inputs.state, []
    for begin, end in zip((0, *cuts), (*cuts, inputs.u.shape[2]), strict=True):
        part = {name: None if g is None else g[..., begin:end] for name, g in gates.items()}
        u = inputs.u[..., begin:end]
        out, state = convolution(u, k, skip=inputs.skip, state=state, return_state=True, **part, **options)
        outs.append(out)
    return torch.cat(outs, 2)


def results(
    convolution: Convolution, inputs: Inputs, grad: Tensor | None = None, **options: Any
) -> dict[str, Tensor]:
    """The output and the gradient of every input."""
    leaves = inputs.map(lambda t: t.detach().requires_grad_())
    out = apply(convolution, leaves, **options)
    if grad is None:
        generator = torch.Generator().manual_seed(1)
        grad = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    given = leaves.given
    found = torch.autograd.grad(out, list(given.values()), grad.to(out), materialize_grads=True)
    return {"out": out.detach(), **dict(zip(given, found, strict=True))}


def check(
    inputs: Inputs,
    cuts: tuple[int, ...] = (),
    prepared: int = 0,
    grad: Tensor | None = None,
    backend: str | None = None,
    **options: Any,
) -> None:
    """Output and gradients have a relative error in L2 of at most twice that of torch.fft in the same dtype, plus four
    rounding steps of float32 at the size of the numbers that were summed."""
    ours = results(effkern.long_conv, inputs, grad, cuts=cuts, prepared=prepared, backend=backend, **options)
    plain = results(reference, inputs, grad, cuts=cuts, **options)
    exact = results(reference, inputs.map(lambda t: t.detach().double()), grad, **options)
    batch, _, length = inputs.u.shape
    for name, oracle in exact.items():
        assert ours[name].dtype == plain[name].dtype
        # Sums over the batch and all positions are large before what cancels has cancelled: two standard deviations.
        unit = 2.0 * (batch * length) ** 0.5 if name in ("k", "skip") else 1.0
        norm = oracle.norm().item()
        floor = 4 * torch.finfo(torch.float32).eps * max(norm, unit * oracle.numel() ** 0.5)
        allowed = 2 * (plain[name].double() - oracle).norm().item() + floor
        off = (ours[name].double() - oracle).norm().item()
        assert off <= allowed, (
            f"{name}: {errors(ours[name], oracle, name)}; {allowed / (norm or 1.0):.3g} allowed"
        )
