"""Fuzzing couplings and reversible stacks: bits against PyTorch's, calls with faults, corrupt state_dicts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from reversible_nets import WIDTH, assert_same, blocks, gradients, stored
from robust_faults import FAULTS, Arguments
from robust_fuzz import DOCUMENTED, Plan, Target, faulty_call, valid_call
from robust_states import corrupted_load
from robust_tally import attempt, survived
from test_coupling import DTYPES, WAYS, check, make

from effkern.nn import DualResidualBlock, ReversibleSequence

Draw = Callable[..., Any]
AREA = "reversible"


def shapes(draw: Draw) -> tuple[int, ...]:
    return tuple(draw(st.lists(st.integers(0, 40), max_size=3), label="shape"))


def test_valid_couplings(plan: Plan) -> None:
    def body(data: st.DataObject) -> None:
        draw = data.draw
        torch.manual_seed(draw(st.integers(0, 2**31)))
        names, how = WAYS[draw(st.sampled_from(sorted(WAYS)))]
        given = make(names, shapes(draw), draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES)))
        valid_call(data, AREA, lambda level: check(*given, **how))  # type: ignore[arg-type]

    plan.run(body, examples=60, seconds=18)


def test_valid_stacks(plan: Plan) -> None:
    """Stacks of any depth and couplings, in float64: outputs and all gradients as with everything stored."""

    def body(data: st.DataObject) -> None:
        draw = data.draw
        torch.manual_seed(draw(st.integers(0, 2**31)))
        parts = blocks(draw(st.integers(1, 4)))
        if draw(st.booleans()):
            parts.insert(draw(st.integers(0, len(parts))), DualResidualBlock(blocks(1)[0].f))
        net = ReversibleSequence(parts, overlap=draw(st.booleans())).double()
        inputs = [torch.randn(draw(st.integers(1, 5)), WIDTH, dtype=torch.float64)] * 2

        def same(level: str) -> None:
            outs, grads = gradients(net, net, inputs)
            expected, wanted = gradients(lambda *x: stored(net.blocks, *x), net, inputs)
            assert_same(outs, expected, 1e-6)
            assert_same(grads, wanted, 1e-6)

        valid_call(data, AREA, same)

    plan.run(body, examples=12, seconds=18)


def coupling_call(draw: Draw) -> Arguments:
    names, how = WAYS[draw(st.sampled_from(sorted(WAYS)))]
    given = make(names, shapes(draw), draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES)))
    named = {name: t for name, t in zip("fyx", given, strict=True) if t is not None}
    return {**named, **how}


def test_faulty_couplings(plan: Plan) -> None:
    def body(data: st.DataObject) -> None:
        torch.manual_seed(data.draw(st.integers(0, 2**31)))
        faulty_call(data, AREA, Target("coupling"), coupling_call(data.draw))

    plan.run(body, examples=60, seconds=22)


def test_faulty_streams(plan: Plan) -> None:
    """Inputs of a stack with a fault: refused in words of the stack or of one of its layers, or finite results."""
    net = ReversibleSequence(blocks(2))

    def body(data: st.DataObject) -> None:
        draw = data.draw
        torch.manual_seed(draw(st.integers(0, 2**31)))
        given = {name: torch.randn(3, WIDTH) for name in ("x1", "x2")}
        kind = draw(
            st.sampled_from(sorted(set(FAULTS) - {"NaN", "infinity", "an inference tensor"})), label="fault"
        )
        name = draw(st.sampled_from(["x1", "x2"]))
        given[name] = FAULTS[kind](draw, given[name])
        attempt(AREA, kind)
        try:
            outs = net(**given)
        except DOCUMENTED as error:
            assert str(error)
            survived(AREA, kind, refused=True)
            return
        assert all(out.is_meta or out.isfinite().all() for out in outs)
        survived(AREA, kind)

    plan.run(body, examples=40, seconds=14)


def test_corrupt_state_dicts(plan: Plan) -> None:
    x = torch.randn(3, WIDTH)

    def body(data: st.DataObject) -> None:
        torch.manual_seed(0)
        corrupted_load(data, AREA, ReversibleSequence(blocks(2)), lambda net: sum(net(x)))

    plan.run(body, examples=30, seconds=14)
