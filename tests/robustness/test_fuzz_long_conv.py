"""Fuzzing the convolutions and the generators of their kernels: valid calls against oracles, and calls with faults."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import long_conv_oracle
import pytest
import short_conv_oracle
import torch
from hypothesis import strategies as st
from robust_faults import Arguments
from robust_fuzz import Plan, Target, faulty_call, valid_call

import effkern

Draw = Callable[..., Any]
AREA = "long_conv"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def test_valid_long_conv(plan: Plan) -> None:
    def body(data: st.DataObject) -> None:
        draw = data.draw
        torch.manual_seed(draw(st.integers(0, 2**31)))
        length = draw(st.one_of(st.integers(2, 40), st.integers(2, 900)))
        taps, state = draw(st.integers(1, length)), draw(st.booleans())
        causal = state or draw(st.booleans())
        inputs = long_conv_oracle.random_inputs(
            draw(st.integers(1, 4)),
            draw(st.integers(1, 5)),
            length,
            taps,
            draw(st.sampled_from(DTYPES)),
            causal=causal,
            state=state,
            skip=draw(st.booleans()),
            gates=draw(st.booleans()),
            float_weights=draw(st.booleans()),
        )
        cuts = tuple(sorted(draw(st.sets(st.integers(1, length - 1), max_size=4)))) if causal else ()
        prepared = draw(st.sampled_from([0, length + taps, 2 * length + taps + 5]))
        valid_call(
            data,
            AREA,
            lambda level: long_conv_oracle.check(inputs, cuts=cuts, prepared=prepared, causal=causal),
        )

    plan.run(body, examples=20, seconds=22)


def test_valid_short_conv(plan: Plan) -> None:
    def body(data: st.DataObject) -> None:
        draw = data.draw
        torch.manual_seed(draw(st.integers(0, 2**31)))
        batch, channels, length = draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 300))
        taps = draw(st.one_of(st.integers(1, 9), st.integers(1, 256)))
        dtype, activation = draw(st.sampled_from(DTYPES)), draw(st.sampled_from([None, "silu"]))
        shapes = (batch, channels, length), (channels, taps), (channels,), (batch, channels, taps - 1)
        inputs = [torch.randn(shape).to(dtype) for shape in shapes]
        given = [t if i < 2 or draw(st.booleans()) else None for i, t in enumerate(inputs)]
        valid_call(data, AREA, lambda level: short_conv_oracle.check(given, activation))

    plan.run(body, examples=12, seconds=14)


def long_conv_call(draw: Draw) -> Arguments:
    length = draw(st.integers(1, 90))
    taps, causal = draw(st.integers(1, length)), draw(st.booleans())
    optional = {
        "skip": draw(st.booleans()),
        "gates": draw(st.booleans()),
        "state": causal and draw(st.booleans()),
    }
    inputs = long_conv_oracle.random_inputs(
        draw(st.integers(1, 3)),
        draw(st.integers(1, 4)),
        length,
        taps,
        draw(st.sampled_from(DTYPES)),
        causal=causal,
        **optional,
    )
    return {**inputs.given, "causal": causal, "return_state": causal and draw(st.booleans())}


def short_conv_call(draw: Draw) -> Arguments:
    batch, channels, length = (draw(st.integers(1, n)) for n in (3, 5, 40))
    taps, dtype = draw(st.integers(1, 9)), draw(st.sampled_from(DTYPES))
    arguments: Arguments = {
        "x": torch.randn(batch, channels, length).to(dtype),
        "weight": torch.randn(channels, taps).to(dtype),
        "activation": draw(st.sampled_from([None, "silu"])),
        "return_state": draw(st.booleans()),
    }
    if draw(st.booleans()):
        arguments["bias"] = torch.randn(channels)
    if draw(st.booleans()):
        arguments["state"] = torch.randn(batch, channels, taps - 1).to(dtype)
    return arguments


def companion_call(draw: Draw) -> Arguments:
    shape = draw(st.integers(1, 9)), draw(st.integers(1, 12))
    a, b, c = (torch.randn(shape) for _ in range(3))
    dtype = draw(st.sampled_from(DTYPES))
    given = {"a": a / a.abs().sum(1, keepdim=True), "b": b, "c": c}
    return {**{name: t.to(dtype) for name, t in given.items()}, "length": draw(st.integers(1, 20))}


def smooth_call(draw: Draw) -> Arguments:
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    return {"k": torch.randn(shape).to(draw(st.sampled_from(DTYPES))), "squash": 0.1, "width": 3}


def vandermonde_call(draw: Draw) -> Arguments:
    shape = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    poles = torch.complex(-torch.rand(shape), torch.randn(shape))
    step = 0.01 + 0.1 * torch.rand(shape[0])
    weights = torch.randn(shape, dtype=torch.complex64)
    return {"C": weights, "A": poles, "dt": step, "length": draw(st.integers(1, 60))}


def accumulate_call(draw: Draw) -> Arguments:
    batch, channels, length, reach = (draw(st.integers(1, n)) for n in (3, 4, 20, 20))
    dtype = draw(st.sampled_from(DTYPES))
    shapes = {
        "tile": (batch, channels, length),
        "k_slice": (channels, length + reach - 1),
        "out": (batch, channels, reach),
    }
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def butterfly_call(draw: Draw) -> Arguments:
    batch, channels, length = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 40))
    return {
        "u": torch.randn(batch, channels, length).to(draw(st.sampled_from(DTYPES))),
        "k": torch.randn(channels, draw(st.integers(1, length))),
        "skip": torch.randn(channels),
        **{f"factor {n}": block for n, block in effkern.butterfly_factors(length=40, noise=0.01).items()},
        "length": 40,
    }


def in_mapping(arguments: Arguments) -> Arguments:
    blocks = {int(name.split()[1]): t for name, t in arguments.items() if name.startswith("factor")}
    rest = {name: t for name, t in arguments.items() if not name.startswith("factor")}
    return {**rest, "factors": blocks}


TARGETS = {
    "long_conv": (long_conv_call, Target("long_conv"), 22, 60),
    "short_conv": (short_conv_call, Target("short_conv"), 14, 50),
    "companion_kernel": (companion_call, Target("companion_kernel", slack=64.0), 4, 30),
    "smooth_kernel": (smooth_call, Target("smooth_kernel", reference=False), 4, 30),
    "vandermonde_kernel": (
        vandermonde_call,
        Target("vandermonde_kernel", slack=64.0, reference=False),
        4,
        30,
    ),
    "conv_accumulate": (accumulate_call, Target("conv_accumulate", reference=False), 4, 30),
    "butterfly_conv": (
        butterfly_call,
        Target("butterfly_conv", slack=64.0, reference=False, build=in_mapping),
        *(4, 30),
    ),
}


@pytest.mark.parametrize("name", TARGETS)
def test_faulty_calls(name: str, plan: Plan) -> None:
    make_call, target, seconds, examples = TARGETS[name]

    def body(data: st.DataObject) -> None:
        torch.manual_seed(data.draw(st.integers(0, 2**31)))
        faulty_call(data, AREA, target, make_call(data.draw))

    plan.run(body, examples, seconds)
