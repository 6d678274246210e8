"""Verification of one (case, pass): every candidate's error against the float64 oracle, before any timing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from effkern import testing

from .cases import Baseline, Case, Oracle
from .timing import timed_ms


@dataclass(frozen=True)
class Verified:
    verdict: str  # pass | fail
    error: float | None  # None: it raised
    first_call_ms: float | None
    reason: str = ""


@dataclass
class Problem:
    """The inputs of a pass, its exact results, and how to run a candidate on it."""

    case: Case
    pass_: str
    device: torch.device
    inputs: tuple[Tensor, ...]
    grad_out: Tensor | None
    oracle: Oracle

    @classmethod
    def build(cls, case: Case, pass_: str, device: torch.device, seed: int = 0) -> Problem:
        # Forward cases are inference: FlexAttention on the CPU refuses inputs that require gradients.
        inputs = tuple(t.requires_grad_(pass_ != "forward") for t in case.inputs(device, seed))
        grad_out = None
        if pass_ != "forward":
            with torch.no_grad():
                calls = [*case.baselines(device, "forward", False).values(), case.candidate(None)]
                out = calls[0].call(*inputs)
            generator = torch.Generator().manual_seed(seed + 1)
            grad_out = torch.randn(out.shape, generator=generator).to(out)
        return cls(case, pass_, device, inputs, grad_out, case.oracle(inputs, grad_out))

    def thunk(self, candidate: Baseline, inputs: Sequence[Tensor]) -> Callable[[], object]:
        """What gets timed: the forward call, the backward of a graph that is built here, once, or both."""
        call = candidate.call
        if candidate.prepare is not None:
            inputs = candidate.prepare(*inputs)
        if self.grad_out is None:
            return functools.partial(call, *inputs)
        gradients: Callable[..., object] = accumulated if candidate.accumulates else torch.autograd.grad
        if self.pass_ == "both":
            return lambda: gradients(call(*inputs), inputs, self.grad_out)
        out = call(*inputs)
        return functools.partial(gradients, out, inputs, self.grad_out, retain_graph=True)

    def sets(self, count: int) -> list[tuple[Tensor, ...]]:
        """Input sets of equal values in memory of their own."""

        def copy() -> tuple[Tensor, ...]:
            return tuple(t.detach().clone().requires_grad_(t.requires_grad) for t in self.inputs)

        return [self.inputs, *(copy() for _ in range(count - 1))]

    def set_bytes(self) -> int:
        tensors = [*self.inputs, *([] if self.grad_out is None else [self.grad_out])]
        return sum(t.numel() * t.element_size() for t in tensors)

    def verify(self, baseline: Baseline) -> Verified:
        """Run the candidate once on the full problem and measure the part the oracle knows."""
        with torch.set_grad_enabled(self.grad_out is not None), baseline.context():
            thunk = self.thunk(baseline, self.inputs)
            first_ms, result = timed_ms(thunk, self.device)
        tensors = [result] if isinstance(result, Tensor) else list(result)  # type: ignore[call-overload]
        if not all(bool(torch.isfinite(t).all()) for t in tensors):
            return Verified("fail", None, first_ms, "the result is not finite")
        error, reason = 0.0, ""
        found: list[Tensor | None] = [*self.oracle.select(tensors)]
        if self.grad_out is not None and baseline.results is not None:
            given = dict(zip(baseline.results, found, strict=True))
            found = [given.get(i) for i in range(len(self.oracle.exact))]
        known = zip(found, self.oracle.exact, self.oracle.composition, strict=True)
        for i, (mine, exact, plain) in enumerate(known):
            if mine is None:
                continue
            scale = exact.abs().max().item() or 1.0
            off = testing.errors(mine, exact).max_abs
            allowed = testing.tolerance(plain, exact, self.case.dtype)
            error = max(error, off / scale)
            if not off <= allowed:
                reason = f"result {i} is off by {off:.2e}; {allowed:.2e} is allowed"
        return Verified("fail" if reason else "pass", error, first_ms, reason)


def accumulated(
    out: Tensor, inputs: Sequence[Tensor], grad_out: Tensor | None, *, retain_graph: bool = False
) -> tuple[Tensor, ...]:
    """The gradients that `backward()` leaves in `.grad`, taken out of there."""
    try:
        torch.autograd.backward(out, grad_out, retain_graph=retain_graph)
        found = tuple(t.grad for t in inputs if t.grad is not None)
    finally:
        for t in inputs:
            t.grad = None
    if len(found) < len(inputs):
        raise RuntimeError(f"{len(inputs) - len(found)} of {len(inputs)} inputs got no gradient")
    return found
