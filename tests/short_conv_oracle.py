"""How short convolutions are judged: results of a call, and the comparison with the float64 oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import effkern
from effkern.reference.short_conv import short_conv as reference
from effkern.testing import assert_close_to_oracle

NAMES = ("x", "weight", "bias", "state")


def composed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    state: Tensor | None = None,
    return_state: bool = False,
) -> tuple[Tensor, Tensor]:
    """What a user would write, every intermediate in x's dtype."""
    reach = weight.shape[1] - 1
    line = F.pad(x, (reach, 0)) if state is None else torch.cat((state.to(x.dtype), x), -1)
    narrow_bias = None if bias is None else bias.to(x.dtype)
    out = F.conv1d(line, weight.to(x.dtype)[:, None], narrow_bias, groups=weight.shape[0])
    return F.silu(out) if activation else out, line[..., line.shape[-1] - reach :]


def results(
    conv: Callable[..., Any], inputs: Sequence[Tensor | None], activation: str | None, **options: Any
) -> dict[str, Tensor]:
    """Output, new state, and the gradient of every input through both. What is sent back is exact in every dtype."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    x, weight, bias, state = leaves
    out, last = conv(x, weight, bias, activation=activation, state=state, return_state=True, **options)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randint(-64, 65, t.shape, generator=generator).to(t) / 32 for t in (out, last)]
    wanted = {name: leaf for name, leaf in zip(NAMES, leaves, strict=True) if leaf is not None}
    found = torch.autograd.grad((out, last), list(wanted.values()), grads, materialize_grads=True)
    named = {f"grad_{name}": g for name, g in zip(wanted, found, strict=True)}
    return {"out": out.detach(), "state": last.detach(), **named}


def check(
    inputs: Sequence[Tensor | None], activation: str | None = None, **options: Any
) -> dict[str, Tensor]:
    """The results of `effkern.short_conv`, held against the oracle and the composition in the same dtype."""
    ours = results(effkern.short_conv, inputs, activation, **options)
    x, weight = inputs[:2]
    assert x is not None and weight is not None
    # conv1d refuses empty inputs, the reference does not.
    plain = results(composed if x.numel() else reference, inputs, activation)
    exact = results(reference, [None if t is None else t.double() for t in inputs], activation)
    taps, rows = weight.shape[1], x.shape[0] * x.shape[2]
    for name, result in ours.items():
        # Sums over taps, and over all positions for the parameters: so large before what cancels has cancelled.
        unit_size = max(taps, rows if name in ("grad_weight", "grad_bias") else 1) ** 0.5
        assert_close_to_oracle(result, plain[name].to(result.dtype), exact[name], name, unit=4 * unit_size)
    assert ours["out"].is_contiguous() and ours["out"].dtype == x.dtype
    return ours
