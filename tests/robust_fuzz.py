"""How the fuzzers run and judge: rounds of hypothesis with seeds, and the one rule that every faulty call is held to.

A call either gives what the reference gives, within the tolerance of `effkern.testing`, or raises an error that names
the op. It never crashes, and never has NaN or infinity where the reference has none.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, note, seed, settings
from hypothesis import strategies as st
from robust_faults import FAULTS, OUT_OF_RANGE, SCALARS, Arguments
from robust_tally import attempt, survived
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

import effkern
from effkern import _host
from effkern.masks import Mask
from effkern.testing import tolerance

# Unavailable and NotImplementedError are RuntimeErrors.
DOCUMENTED = (TypeError, ValueError, RuntimeError)


@dataclass(frozen=True)
class Plan:
    """How long the robustness tests run. In ci every test has a fixed number of examples, so every run is the same."""

    nightly: bool
    seed: int
    scale: float = 1.0  # of the time that nightly fuzzing takes

    def run(self, body: Callable[[st.DataObject], None], examples: int, seconds: float) -> None:
        """`body` on random data: one round of `examples`, or, nightly, rounds until the seconds are over. Each round
        has a seed of its own, which a failure names."""
        end = time.monotonic() + self.scale * seconds
        number = self.seed
        while True:
            _round(body, number, 100 if self.nightly else examples)
            number += 1
            if not self.nightly or time.monotonic() > end:
                return


def _round(body: Callable[[st.DataObject], None], number: int, examples: int) -> None:
    def named(data: st.DataObject) -> None:
        note(f"repeat with --robustness-seed={number}")
        body(data)

    run = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )(given(data=st.data())(named))
    seed(number)(run)()


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def widened(arguments: Arguments) -> Arguments:
    """The same numbers in float64."""

    def wide(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
            return leaf
        return leaf.detach().to(torch.complex128 if leaf.is_complex() else torch.float64)

    return {name: arg if isinstance(arg, Mask) else tree_map(wide, arg) for name, arg in arguments.items()}


# Names under which an op may report what it hands on.
ALSO: dict[str, tuple[str, ...]] = {"attention_decode": ("attention",)}


def names_op(op: str, error: BaseException) -> bool:
    """Whether a message says which op refused; also in the words of the dispatcher, which checks kinds and layouts
    before an op sees them."""
    text = str(error)
    return f"effkern::{op}" in text or text.partition(":")[0] in (op, *ALSO.get(op, ()))


def agree(what: str, ours: Tensor, plain: Tensor, exact: Tensor, unit: float, slack: float) -> None:
    """Shapes and dtypes of the reference; finite where it is; as close to float64 as effkern.testing asks, or `slack`
    times that."""
    assert ours.shape == plain.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(plain.shape)}"
    assert ours.dtype == plain.dtype, f"{what}: {ours.dtype}, expected {plain.dtype}"
    if not ours.is_floating_point():
        assert torch.equal(ours, plain), what
        return
    most = torch.finfo(ours.dtype).max
    # Numbers near the largest of a dtype may or may not overflow on the way.
    kept = plain.isfinite() & exact.isfinite() & (exact.abs() < (most**0.5 if most > 1e6 else 0.9 * most))
    lost = kept & ~ours.isfinite()
    assert not lost.any(), (
        f"{what}: {int(lost.sum())} entries are not finite where those of the reference are"
    )
    values, baseline, oracle = (
        torch.where(kept, t.detach(), torch.zeros((), dtype=t.dtype)) for t in (ours, plain, exact)
    )
    if not values.numel():
        return
    allowed = slack * tolerance(baseline, oracle, ours.dtype, unit=unit)
    found = (values.double() - oracle).abs().max().item()
    assert found <= allowed, f"{what}: error {found:.3g}, allowed {allowed:.3g}"


def size_of(arguments: Arguments) -> float:
    """How much larger than with normal numbers the products of the arguments may be."""
    size = 1.0
    for tensor in tensors(list(arguments.values())):
        if tensor.is_floating_point() and tensor.layout == torch.strided and not tensor.is_meta:
            values = tensor.detach().float()
            values = values[values.isfinite()]
            if values.numel():
                size *= max(1.0, values.abs().max().item() / 8)
    return size


@dataclass(frozen=True)
class Target:
    """An op that faulty calls are made of, and how their results are judged.

    Attributes:
        op: name of the public function.
        unit: size of the numbers that results are sums of, with normal ones as arguments (`effkern.testing.floor`).
        slack: how many times the tolerance may be; above 1 where results are compared without a check of the family.
        reference: whether it has a backend "reference"; else it is a composition, held against itself in float64.
        values: whether results are compared at all; else they have to be finite (where equally good ones exist).
        build: makes the arguments of the call of those that the faults are put into.
    """

    op: str
    unit: float = 16.0
    slack: float = 4.0
    reference: bool = True
    values: bool = True
    build: Callable[[Arguments], Arguments] = dict

    def judge(self, given: Arguments, compare: bool = True) -> bool:
        """Whether the call was refused; AssertionError where it neither was, clearly, nor gave the right result."""
        public, arguments = getattr(effkern, self.op), self.build(given)
        reference = {"backend": "reference"} if self.reference else {}
        try:
            ours = tensors(public(**arguments))
        except DOCUMENTED as error:
            assert names_op(self.op, error), f"not named in {type(error).__name__}: {error}"
            if self.reference and compare:
                self._also_refused(arguments, error)
            return True
        if not compare or any(t.is_meta for t in ours):
            return False
        if not self.values:
            assert all(t.isfinite().all() for t in ours)
            return False
        exact = tensors(public(**widened(arguments), **reference))
        if self.reference:
            plain = tensors(public(**arguments, **reference))
        else:
            plain = [wide.to(t.dtype) for wide, t in zip(exact, ours, strict=True)]
        unit = self.unit * size_of(given)
        assert len(ours) == len(plain) == len(exact)
        for number, (a, b, c) in enumerate(zip(ours, plain, exact, strict=True)):
            agree(f"result {number} of {self.op}", a, b, c, unit, self.slack)
        return False

    def _also_refused(self, arguments: Arguments, error: BaseException) -> None:
        """What one backend refuses for the arguments' sake, all do."""
        try:
            getattr(effkern, self.op)(**arguments, backend="reference")
        except DOCUMENTED as other:
            assert names_op(self.op, other), f"not named by the reference in {type(other).__name__}: {other}"
            return
        raise AssertionError(f"{self.op} refuses what its reference takes: {error}")


def faulty_call(data: st.DataObject, area: str, target: Target, arguments: Arguments) -> None:
    """Puts one fault, or two, into the arguments of a valid call, makes the call and judges it."""
    draw = data.draw
    names = [name for name, arg in arguments.items() if isinstance(arg, Tensor)]
    numbers = [name for name in arguments if (target.op, name) in SCALARS]
    kinds = [*FAULTS, *([OUT_OF_RANGE] * (2 if numbers else 0))]
    done = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=2), label="faults")
    for fault in done:
        if fault == OUT_OF_RANGE:
            name = draw(st.sampled_from(numbers), label="argument")
            value = draw(st.sampled_from(SCALARS[target.op, name]), label="value")
        else:
            name = draw(st.sampled_from(names), label="argument")
            value = arguments[name]
            if (
                isinstance(value, Tensor) and value.layout == torch.strided
            ):  # else the first fault has taken it away
                value = FAULTS[fault](draw, value)
        arguments = {**arguments, name: value}
    label = done[0] if len(set(done)) == 1 else "two faults at once"
    attempt(area, label)
    # PyTorch itself refuses to save inference tensors for a backward: gradients come alone.
    with torch.set_grad_enabled(label == "requires a gradient"):
        refused = target.judge(arguments, compare="a sparse tensor" not in done)
    survived(area, label, refused=refused)


VALID = "none: any valid call, with gradients"


def valid_call(data: st.DataObject, area: str, check: Callable[[str], object]) -> None:
    """Counts a call that `check` holds against its oracle; it gets the CPU level, any that this machine has."""
    level = data.draw(st.sampled_from(_host.isa_levels()), label="level")
    threads = torch.get_num_threads()
    torch.set_num_threads(data.draw(st.sampled_from([1, 2, 3]), label="threads"))
    _host.isa_force(level)
    try:
        attempt(area, VALID)
        check(level)
        survived(area, VALID)
    finally:
        _host.isa_force(None)
        torch.set_num_threads(threads)
