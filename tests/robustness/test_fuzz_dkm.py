"""Fuzzing clustered weights: valid calls against oracles, calls with faults, corrupt palettes and state_dicts."""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable
from typing import Any

import dkm_oracle
import pytest
import safetensors
import safetensors.torch
import test_palettized_linear
import torch
from hypothesis import strategies as st
from robust_faults import Arguments
from robust_fuzz import Plan, Target, faulty_call, valid_call
from robust_states import corrupted, corrupted_load
from robust_tally import attempt, survived
from test_dkm import spread, unit_of
from test_palettized_linear import DTYPES, make_palette
from torch import nn

import effkern
from effkern.nn import ClusteredLinear, PalettizedEmbedding, PalettizedLinear
from effkern.ops.palettize import Palette

# What safetensors and torch.load may raise at bytes that are no file.
READING = (
    *(TypeError, ValueError, RuntimeError, safetensors.SafetensorError, pickle.UnpicklingError, struct.error),
    *(AssertionError, EOFError, LookupError, AttributeError, OSError, MemoryError, ArithmeticError),
)
Draw = Callable[..., Any]
AREA = "dkm"


def clustering(draw: Draw) -> Arguments:
    groups, dim = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4]))
    shape = groups * draw(st.integers(1, 4)), dim * draw(st.one_of(st.integers(1, 9), st.integers(1, 90)))
    dtype, clusters = draw(st.sampled_from(DTYPES)), draw(st.one_of(st.integers(1, 9), st.integers(1, 33)))
    return {
        "weight": torch.randn(shape).to(dtype),
        "centroids": spread(clusters, groups, dim),
        "temperature": draw(st.sampled_from([0.05, 0.3, 3.0])),
        "iterations": draw(st.integers(1, 3)),
        "tolerance": draw(st.sampled_from([0.0, 1e6])),
        "groups": groups,
        "dim": dim,
    }


def test_valid_clustering(plan: Plan) -> None:
    def body(data: st.DataObject) -> None:
        torch.manual_seed(data.draw(st.integers(0, 2**31)))
        call = clustering(data.draw)

        def check(level: str) -> None:
            dkm_oracle.check(f"{unit_of(level)}/stream", **call)

        valid_call(data, AREA, check)

    plan.run(body, examples=20, seconds=18)


def test_valid_palettized_products(plan: Plan) -> None:
    def body(data: st.DataObject) -> None:
        draw = data.draw
        torch.manual_seed(draw(st.integers(0, 2**31)))
        groups, dim = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4]))
        clusters = draw(st.sampled_from([1, 2, 4, 7, 8, 13, 16, 40, 64, 256]))
        rows, columns = groups * draw(st.integers(1, 40)), dim * draw(st.integers(1, 280))
        palette = make_palette(rows, columns, clusters, groups, dim, draw(st.sampled_from(DTYPES)))
        x = torch.randn(draw(st.one_of(st.integers(0, 9), st.integers(0, 70))), columns).to(
            draw(st.sampled_from(DTYPES))
        )
        bias = torch.randn(rows) if draw(st.booleans()) else None
        valid_call(data, AREA, lambda level: test_palettized_linear.check(level, x, palette, bias))

    plan.run(body, examples=15, seconds=18)


def importance_call(draw: Draw) -> Arguments:
    call = {name: value for name, value in clustering(draw).items() if name in ("weight", "groups", "dim")}
    call["clusters"] = draw(st.integers(1, 12))
    if draw(st.booleans()):
        call["importance"] = torch.rand(call["weight"].shape)
    return call


def palettize_call(draw: Draw) -> Arguments:
    return {
        name: value
        for name, value in clustering(draw).items()
        if name in ("weight", "centroids", "groups", "dim")
    }


def product_call(draw: Draw) -> Arguments:
    dim, rows = draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 20))
    columns, dtype = dim * draw(st.integers(1, 60)), draw(st.sampled_from(DTYPES))
    arguments: Arguments = {
        "x": torch.randn(draw(st.integers(1, 9)), columns).to(dtype),
        "palette": make_palette(
            rows, columns, draw(st.integers(1, 70)), 1, dim, draw(st.sampled_from(DTYPES))
        ),
    }
    if draw(st.booleans()):
        arguments["bias"] = torch.randn(rows)
    if draw(st.booleans()):
        arguments |= {"A": torch.randn(2, columns), "B": torch.randn(rows, 2)}
    return arguments


def in_pair(arguments: Arguments) -> Arguments:
    rest = {name: t for name, t in arguments.items() if name not in ("A", "B")}
    return {**rest, "low_rank": (arguments["A"], arguments["B"])} if "A" in arguments else rest


TARGETS = {
    "dkm": (clustering, Target("dkm"), 18, 50),
    # Equally good centroids exist; palettes of 16-bit and of float64 numbers may differ where two are equally near.
    "kmeans_init": (importance_call, Target("kmeans_init", values=False), 9, 40),
    "palettize": (palettize_call, Target("palettize", reference=False, values=False), 9, 40),
    "palettized_linear": (product_call, Target("palettized_linear", unit=64.0, build=in_pair), 18, 50),
}


@pytest.mark.parametrize("name", TARGETS)
def test_faulty_calls(name: str, plan: Plan) -> None:
    make_call, target, seconds, examples = TARGETS[name]

    def body(data: st.DataObject) -> None:
        torch.manual_seed(data.draw(st.integers(0, 2**31)))
        faulty_call(data, AREA, target, make_call(data.draw))

    plan.run(body, examples, seconds)


def any_palette(draw: Draw) -> Palette:
    groups, dim = draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 4]))
    rows, clusters = groups * draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 5, 8, 17, 64]))
    return make_palette(rows, dim * 9, clusters, groups, dim)


def usable(palette: Palette) -> None:
    """What a palette that was let in must be good for: it unpacks, multiplies, and both agree."""
    dense = palette.to_dense()
    assert dense.shape == palette.shape and dense.isfinite().all()
    if len(palette.shape) == 2:
        x = torch.eye(palette.shape[1])
        product = effkern.palettized_linear(x, palette)
        assert torch.equal(product, dense.mT.float())


def load(state: Any, fault: str) -> None:
    attempt(AREA, fault)
    try:
        palette = Palette.from_state_dict(state)
    except ValueError as error:
        assert "Palette.from_state_dict: " in str(error)
        survived(AREA, fault, refused=True)
        return
    usable(palette)
    survived(AREA, fault)


def test_corrupt_palettes(plan: Plan) -> None:
    """Refused with a ValueError, or a palette that is one."""

    def body(data: st.DataObject) -> None:
        torch.manual_seed(data.draw(st.integers(0, 2**31)))
        kind, state = corrupted(data.draw, any_palette(data.draw).state_dict())
        load(state, f"palette: {kind}")

    plan.run(body, examples=80, seconds=14)


def test_corrupt_files(plan: Plan) -> None:
    """Bytes of a saved palette flipped or cut off: the reader refuses the file, or the palette is checked."""

    def body(data: st.DataObject) -> None:
        draw = data.draw
        torch.manual_seed(draw(st.integers(0, 2**31)))
        state = {name: t.contiguous() for name, t in any_palette(draw).state_dict().items()}
        kind = draw(st.sampled_from(["safetensors", "torch.save"]), label="format")
        if kind == "safetensors":
            content = bytearray(safetensors.torch.save(state))
        else:
            file = io.BytesIO()
            torch.save(state, file)
            content = bytearray(file.getvalue())
        for place in draw(st.lists(st.integers(0, len(content) - 1), max_size=4), label="places"):
            content[place] ^= 1 << draw(st.integers(0, 7))
        if draw(st.booleans(), label="cut"):
            del content[draw(st.integers(0, len(content))) :]
        fault = f"file: {kind}, bits flipped or cut off"
        try:
            if kind == "safetensors":
                found = safetensors.torch.load(bytes(content))
            else:
                found = torch.load(io.BytesIO(content), weights_only=True)
        except READING:
            attempt(AREA, fault)
            survived(AREA, fault, refused=True)
            return
        if isinstance(found, dict):
            load(found, fault)

    plan.run(body, examples=60, seconds=9)


def test_palettes_made_by_hand(plan: Plan) -> None:
    """A Palette can be constructed around any bytes: indices beyond the table never read outside of it."""

    def body(data: st.DataObject) -> None:
        draw = data.draw
        torch.manual_seed(draw(st.integers(0, 2**31)))
        good = any_palette(draw)
        noise = torch.randint(256, good.indices.shape, dtype=torch.uint8)
        made = Palette(noise, good.lut, good.shape, good.bits, good.groups, good.dim)
        fault = "palette: random bytes as indices"
        attempt(AREA, fault)
        out = effkern.palettized_linear(torch.eye(good.shape[1]), made)
        entries = {*good.lut.flatten().tolist(), 0.0}
        assert set(out.flatten().tolist()) <= entries, "a number that is in no table"
        survived(AREA, fault)

    plan.run(body, examples=30, seconds=4)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "PalettizedLinear": lambda: PalettizedLinear.from_linear(nn.Linear(24, 6), bits=3, groups=2, rank=2),
    "PalettizedEmbedding": lambda: PalettizedEmbedding.from_embedding(nn.Embedding(24, 6), bits=2),
    "ClusteredLinear": lambda: ClusteredLinear(24, 6, bits=2),
}


@pytest.mark.parametrize("name", LAYERS)
def test_corrupt_state_dicts(name: str, plan: Plan) -> None:
    tokens, x = torch.arange(24), torch.randn(3, 24)

    def body(data: st.DataObject) -> None:
        torch.manual_seed(0)
        given = tokens if name == "PalettizedEmbedding" else x
        corrupted_load(data, AREA, LAYERS[name](), lambda layer: layer(given))

    plan.run(body, examples=30, seconds=4)
