"""Error measures and the rule by which effkern judges its own ops, for its tests, its harness and yours.

The oracle is the reference in float64. An op passes when its largest error is at most twice that of the same
computation written in PyTorch in the same dtype, plus a floor: one rounding step at the largest value, and four steps
of float32 at the size of the numbers that were summed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

FACTOR = 2.0


@dataclass(frozen=True)
class Errors:
    """How far a result is from the oracle; non-finite entries that agree count as exact."""

    max_abs: float
    relative_l2: float
    max_ulp: float  # in units of the last place of the result's dtype
    worst: tuple[int, ...]  # where max_abs is
    actual: float  # and the two values there
    expected: float

    def __str__(self) -> str:
        place = (
            f"at {self.worst}: {self.actual:.9g}, expected {self.expected:.9g}"
            if self.worst
            else "everywhere"
        )
        return f"max {self.max_abs:.3g} ({self.max_ulp:.3g} ulp), relative l2 {self.relative_l2:.3g}, worst {place}"


def _same_non_finite(actual: Tensor, expected: Tensor, what: str) -> None:
    for kind, found, wanted in (
        ("NaN", actual.isnan(), expected.isnan()),
        ("inf", actual == torch.inf, expected == torch.inf),
        ("-inf", actual == -torch.inf, expected == -torch.inf),
    ):
        differs = (found != wanted).nonzero()
        if len(differs):
            place = tuple(differs[0].tolist())
            raise AssertionError(
                f"{what}: {len(differs)} entries differ in being {kind}, the first at {place}: "
                f"{actual[place].item()}, expected {expected[place].item()}"
            )


def _ulp(expected: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance between neighbouring numbers of `dtype` around each entry."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(expected.abs().clamp(min=info.tiny))
    return torch.ldexp(torch.full_like(expected, info.eps), exponent - 1)


def errors(actual: Tensor, oracle: Tensor, what: str = "result") -> Errors:
    """Measures `actual` against `oracle` (float64); AssertionError where shapes or non-finite entries differ."""
    if actual.shape != oracle.shape:
        raise AssertionError(f"{what}: shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}")
    dtype = actual.dtype
    actual, oracle = actual.detach().to("cpu", torch.float64), oracle.detach().to("cpu", torch.float64)
    _same_non_finite(actual, oracle, what)
    finite = oracle.isfinite()
    difference = torch.where(finite, actual - oracle, 0.0).abs()
    if difference.numel() == 0:
        return Errors(0.0, 0.0, 0.0, (), 0.0, 0.0)
    norm = torch.where(finite, oracle, 0.0).norm().item()
    worst = tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
    return Errors(
        max_abs=difference.max().item(),
        relative_l2=difference.norm().item() / norm if norm > 0 else difference.norm().item(),
        max_ulp=(difference / _ulp(torch.where(finite, oracle, 0.0), dtype)).max().item(),
        worst=worst,
        actual=actual[worst].item(),
        expected=oracle[worst].item(),
    )


def floor(oracle: Tensor, dtype: torch.dtype, unit: float = 1.0) -> float:
    """One rounding step of `dtype` at the oracle's largest finite value, four of float32 at that value or `unit`."""
    values = oracle.detach().abs()
    values = values[values.isfinite()]
    largest = values.max().item() if values.numel() else 0.0
    return torch.finfo(dtype).eps * largest + 4 * torch.finfo(torch.float32).eps * max(largest, unit)


def tolerance(
    baseline: Tensor, oracle: Tensor, dtype: torch.dtype, factor: float = FACTOR, unit: float = 1.0
) -> float:
    """`factor` times the largest error of `baseline`, a same-dtype PyTorch composition, plus `floor`."""
    return factor * errors(baseline, oracle, "baseline").max_abs + floor(oracle, dtype, unit)


def assert_close_to_oracle(
    actual: Tensor,
    baseline: Tensor,
    oracle: Tensor,
    what: str = "result",
    factor: float = FACTOR,
    unit: float = 1.0,
) -> Errors:
    """Applies the rule and returns the errors of `actual`.

    Args:
        actual: what the op returned.
        baseline: the same quantity from a PyTorch composition in the same dtype.
        oracle: the same quantity from the reference in float64.
        what: name of the quantity in messages.
        factor: how much larger than the baseline's the error may be.
        unit: size of the intermediate numbers, accumulated in float32, that the quantity is a difference of.
    """
    found = errors(actual, oracle, what)
    allowed = tolerance(baseline, oracle, actual.dtype, factor, unit)
    if not found.max_abs <= allowed:
        raise AssertionError(f"{what}: error {found}; allowed {allowed:.3g}")
    return found


@contextlib.contextmanager
def nan_filled_empty() -> Iterator[None]:
    """Fills the memory of torch.empty and its kin with NaN, also when C++ ops call them, so that gaps show."""
    mode = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
