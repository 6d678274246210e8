"""Fuzzing the Monarch products: valid calls against the oracle, and calls with faults."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from robust_faults import Arguments
from robust_fuzz import Plan, Target, faulty_call, valid_call
from test_monarch import DTYPES, check, factors

Draw = Callable[..., Any]
AREA = "monarch"


def test_valid_products(plan: Plan) -> None:
    def body(data: st.DataObject) -> None:
        draw = data.draw
        torch.manual_seed(draw(st.integers(0, 2**31)))
        dtype, tokens = draw(st.sampled_from(DTYPES)), draw(st.one_of(st.integers(0, 9), st.integers(0, 230)))
        if draw(st.booleans(), label="one factor"):
            w = torch.randn([draw(st.integers(1, n)) for n in (12, 60, 60)]).to(dtype)
            x = torch.randn(tokens, w.shape[0] * w.shape[2]).to(dtype)
            valid_call(data, AREA, lambda level: check(level, "block_diag_matmul", [x, w]))
            return
        l, r = draw(st.integers(1, 20)), draw(st.integers(1, 40))
        k = draw(st.sampled_from([n for n in range(1, 21) if l * r % n == 0]))
        w1, w2 = factors(k, l * r // k, draw(st.integers(1, 70)), l, draw(st.integers(1, 40)), dtype)
        x = torch.randn(tokens, k * w1.shape[2]).to(dtype)
        bias = torch.randn(l * w2.shape[1]).to(dtype) if draw(st.booleans()) else None
        order = draw(st.sampled_from(["s_major", "l_major"]))
        given = [x, w1, w2, bias]
        valid_call(data, AREA, lambda level: check(level, "monarch_matmul", given, output_order=order))

    plan.run(body, examples=60, seconds=31)


def product_call(draw: Draw) -> Arguments:
    l, r = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    k = draw(st.sampled_from([n for n in range(1, 7) if l * r % n == 0]))
    dtype = draw(st.sampled_from(DTYPES))
    w1, w2 = factors(k, l * r // k, draw(st.integers(1, 20)), l, draw(st.integers(1, 20)), dtype)
    tokens = draw(st.lists(st.integers(1, 7), max_size=2))
    arguments: Arguments = {
        "x": torch.randn(*tokens, k * w1.shape[2]).to(dtype),
        "w1": w1,
        "w2": w2,
        "output_order": draw(st.sampled_from(["s_major", "l_major"])),
    }
    if draw(st.booleans()):
        arguments["bias"] = torch.randn(l * w2.shape[1]).to(dtype)
    return arguments


def block_call(draw: Draw) -> Arguments:
    dtype = draw(st.sampled_from(DTYPES))
    w = torch.randn([draw(st.integers(1, n)) for n in (6, 20, 20)]).to(dtype)
    return {"x": torch.randn(draw(st.integers(1, 9)), w.shape[0] * w.shape[2]).to(dtype), "w": w}


def project_call(draw: Draw) -> Arguments:
    blocks, rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 6)), draw(st.integers(1, 6))
    weight = torch.randn(blocks * rows, blocks * columns).to(draw(st.sampled_from(DTYPES)))
    return {"weight": weight, "nblocks": blocks, "rank": 1}


def dense_call(draw: Draw) -> Arguments:
    return {name: t for name, t in product_call(draw).items() if name in ("w1", "w2")}


TARGETS = {
    "monarch_matmul": (product_call, Target("monarch_matmul"), 27, 60),
    "block_diag_matmul": (block_call, Target("block_diag_matmul"), 18, 40),
    # Singular vectors have arbitrary signs: only finite numbers are asked for.
    "monarch_project": (project_call, Target("monarch_project", reference=False, values=False), 7, 40),
    "monarch_dense": (dense_call, Target("monarch_dense", reference=False), 7, 30),
}


@pytest.mark.parametrize("name", TARGETS)
def test_faulty_calls(name: str, plan: Plan) -> None:
    make_call, target, seconds, examples = TARGETS[name]

    def body(data: st.DataObject) -> None:
        torch.manual_seed(data.draw(st.integers(0, 2**31)))
        faulty_call(data, AREA, target, make_call(data.draw))

    plan.run(body, examples, seconds)
