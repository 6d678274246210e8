"""How far recovered states drift from the true ones, and which states to store so that they do not."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch

from effkern.nn._reversible_couplings import Coupling, Dual, Streamwise


def recovery_error(coupling: Coupling, errors: tuple[float, float], rounding: float) -> tuple[float, float]:
    """Errors of the two inputs of a block that is undone from outputs with `errors`, relative to states of size one.

    `rounding` is twice the unit roundoff: each stream is rounded once on the way and once on the way back.
    The slopes of the sub-blocks are left out: those of trained residual branches are small against the rest.
    """
    first, second = errors
    if isinstance(coupling, Dual):
        if coupling.beta == 0:
            return math.inf, math.inf
        x = second / abs(coupling.beta)
        return x + rounding, first + abs(coupling.alpha) * x + rounding
    return first + rounding, second + rounding


def predicted_error(alpha: float, beta: float, depth: int, dtype: torch.dtype) -> float:
    """Error of the recovered stack input after `depth` blocks, relative to states of size one."""
    errors = (0.0, 0.0)
    for _ in range(depth):
        errors = recovery_error(Dual(alpha, beta), errors, torch.finfo(dtype).eps)
    return max(errors)


@functools.lru_cache(maxsize=64)
def choose_anchors(couplings: tuple[Coupling, ...], dtype: torch.dtype, budget: float) -> frozenset[int]:
    """The blocks whose inputs to store, so that no recovered state is off by more than `budget`; as few as possible."""
    return frozenset(_over_budget(couplings, dtype, budget, frozenset()))


def check_anchors(
    owner: str,
    couplings: Sequence[Coupling],
    dtype: torch.dtype,
    budget: float,
    stored: frozenset[int],
    start: int = 0,
) -> None:
    """ValueError where states that are not `stored` would be recovered with a larger error than `budget`.

    The first of the couplings is that of block `start` of the stack.
    """
    over = _over_budget(couplings, dtype, budget, stored)
    if over:
        index, error = next(iter(over.items()))
        dual = couplings[index]
        assert isinstance(dual, Dual)
        raise ValueError(
            f"{owner}: the input of block {start + index} would be recovered with an error of {error:.2g} in {dtype}, "
            f"the budget is {budget:.2g}; its (alpha, beta) is ({dual.alpha:g}, {dual.beta:g}) and "
            f"{len(couplings) - index} blocks are undone. anchors='auto' stores some states; a larger beta or exact "
            "with beta = 1 needs none"
        )


def _over_budget(
    couplings: Sequence[Coupling], dtype: torch.dtype, budget: float, stored: frozenset[int]
) -> dict[int, float]:
    """The dual blocks, last first, whose recovered inputs exceed the budget, each being stored from there on."""
    over = {}
    errors = (0.0, 0.0)
    for index in range(len(couplings) - 1, -1, -1):
        coupling = couplings[index]
        if index in stored or isinstance(coupling, Streamwise):
            errors = (0.0, 0.0)
            continue
        errors = recovery_error(coupling, errors, torch.finfo(dtype).eps)
        if isinstance(coupling, Dual) and not (max(errors) <= budget and coupling.invertible):
            over[index] = max(errors)
            errors = (0.0, 0.0)
    return over


def check_exact(owner: str, couplings: Sequence[Coupling]) -> None:
    """ValueError where a block would leave the grid."""
    for index, coupling in enumerate(couplings):
        if isinstance(coupling, Dual) and coupling.beta != 1:
            raise ValueError(
                f"{owner}: exact needs beta = 1, block {index} has (alpha, beta) = ({coupling.alpha:g}, "
                f"{coupling.beta:g}); beta times a multiple of 2^-q is none"
            )
