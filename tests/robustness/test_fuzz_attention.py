"""Fuzzing attention: valid calls of any form against the oracle, and the same calls with faults."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import test_attention_decode
import torch
from attention_oracle import DTYPES, LAYOUTS, check, make
from conftest import Route
from hypothesis import strategies as st
from robust_faults import Arguments
from robust_fuzz import Plan, Target, faulty_call, valid_call
from test_attention_decode import MASKS, paged
from test_attention_options import cases

Draw = Callable[..., Any]
AREA = "attention"


def test_valid_attention(plan: Plan) -> None:
    def body(data: st.DataObject) -> None:
        draw = data.draw
        torch.manual_seed(draw(st.integers(0, 2**31)))
        case = replace(draw(cases()), layout=tuple(draw(st.sampled_from(LAYOUTS)) for _ in range(4)))
        dtype = draw(st.sampled_from(DTYPES))
        valid_call(data, AREA, lambda level: check(case, dtype, Route("cpu", level)))

    plan.run(body, examples=20, seconds=31)


def test_valid_decode(plan: Plan) -> None:
    dims = st.sampled_from([1, 8, 20, 64, 100])

    def body(data: st.DataObject) -> None:
        draw = data.draw
        torch.manual_seed(draw(st.integers(0, 2**31)))
        hkv, capacity = draw(st.integers(1, 3)), draw(st.integers(1, 900))
        lengths = draw(st.lists(st.integers(0, capacity), min_size=1, max_size=3))
        shape = (
            hkv * draw(st.integers(1, 5)),
            hkv,
            draw(st.integers(1, 4)),
            capacity,
            draw(dims),
            draw(dims),
        )
        dtype, page = draw(st.sampled_from(DTYPES)), draw(st.one_of(st.none(), st.integers(1, 70)))
        options = draw(st.sampled_from(MASKS)), draw(st.sampled_from([0.0, 3.0])), draw(st.booleans())
        valid_call(
            data, AREA, lambda level: test_attention_decode.check(shape, lengths, dtype, page, *options)
        )

    plan.run(body, examples=12, seconds=9)


def attention_call(draw: Draw) -> Arguments:
    case = draw(cases())
    inputs = make(case, draw(st.sampled_from(DTYPES)), "cpu")
    return {"softcap": 0.0, "dropout_p": 0.0, **inputs.leaves, **case.options("cpu"), "return_lse": True}


def decode_call(draw: Draw) -> Arguments:
    hkv, capacity, batch = draw(st.integers(1, 2)), draw(st.integers(1, 90)), draw(st.integers(1, 3))
    heads, queries, dtype = (
        hkv * draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
        draw(st.sampled_from(DTYPES)),
    )
    d, dv = draw(st.sampled_from([8, 20])), draw(st.sampled_from([8, 33]))
    arguments: Arguments = {
        "q": torch.randn(batch, heads, queries, d).to(dtype),
        "k_cache": torch.randn(batch, hkv, capacity, d).to(dtype),
        "v_cache": torch.randn(batch, hkv, capacity, dv).to(dtype),
        "cache_seqlens": torch.randint(0, capacity + 1, (batch,), dtype=torch.int32),
        "mask": draw(st.sampled_from(MASKS)),
        "scale": None,
        "softcap": 0.0,
        "return_lse": True,
    }
    if draw(st.booleans()):
        arguments["sink_logits"] = torch.randn(heads)
    if draw(st.booleans()):
        page = draw(st.integers(1, 40))
        seed = draw(st.integers(0, 9))
        for name in ("k_cache", "v_cache"):
            torch.manual_seed(seed)
            arguments[name], arguments["page_table"] = paged(arguments[name], page)
    return arguments


def merge_call(draw: Draw) -> Arguments:
    shape = (*draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)), draw(st.integers(1, 40)))
    dtype, count = draw(st.sampled_from(DTYPES)), draw(st.integers(1, 4))
    parts: Arguments = {f"out {i}": torch.randn(shape).to(dtype) for i in range(count)}
    return parts | {f"lse {i}": 3 * torch.randn(shape[:-1]) for i in range(count)}


def in_lists(parts: Arguments) -> Arguments:
    outs, lses = ([part for name, part in parts.items() if name.startswith(kind)] for kind in ("out", "lse"))
    return {"outs": outs, "lses": lses}


TARGETS = {
    "attention": (attention_call, Target("attention"), 31, 70),
    "attention_decode": (decode_call, Target("attention_decode"), 11, 40),
    "attention_merge": (merge_call, Target("attention_merge", build=in_lists), 7, 40),
}


@pytest.mark.parametrize("name", TARGETS)
def test_faulty_calls(name: str, plan: Plan) -> None:
    make_call, target, seconds, examples = TARGETS[name]

    def body(data: st.DataObject) -> None:
        torch.manual_seed(data.draw(st.integers(0, 2**31)))
        faulty_call(data, AREA, target, make_call(data.draw))

    plan.run(body, examples, seconds)
