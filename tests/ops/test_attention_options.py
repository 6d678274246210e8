"""Attention with masks, score terms and dropout against the reference in float64, on every path of the machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_oracle import DTYPES, Case, Inputs, check, differentiate, make, with_lse
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import effkern
from effkern.masks import BlockSparse, Dense, Document, Lambda, Mask, ShiftedGroups, SlidingWindow
from effkern.reference import attention as reference
from effkern.testing import errors


@pytest.fixture(autouse=True)
def _plain_kernels_have_no_options(request: pytest.FixtureRequest) -> None:
    if "route" in request.fixturenames and request.getfixturevalue("route").unit == "cuda":
        pytest.skip("the CUDA C++ forward takes no mask besides causal, no terms and no dropout")


SHAPE = Case(b=2, hq=4, hkv=2, sq=150, sk=200, d=24, dv=40)
PACKED = ((33, 40), (0, 5), (1, 1), (70, 64), (4, 0), (90, 129))


def layout(
    case: Case, block: int, density: float, per_batch: bool = True, per_head: bool = True
) -> BlockSparse:
    b, h, sq, sk = case.table_sizes
    generator = torch.Generator().manual_seed(block)
    shape = (b if per_batch else 1, h if per_head else 1, -(-sq // block), -(-sk // block))
    return BlockSparse(torch.rand(shape, generator=generator) < density, block)


def documents(case: Case, sorted_ids: bool = True) -> Document:
    generator = torch.Generator().manual_seed(1)
    if case.lengths is not None:
        return Document(torch.randint(-2, 2, (sum(k for _, k in case.lengths),), generator=generator))
    ids = torch.randint(-3, 3, (case.b, case.sk), generator=generator)
    return Document(ids.sort(1)[0] if sorted_ids else ids)


def table(case: Case, axes: tuple[bool, bool, bool, bool], density: float = 0.6) -> Dense:
    sizes = [n if full else 1 for n, full in zip(case.table_sizes, axes, strict=True)]
    return Dense(torch.rand(sizes, generator=torch.Generator().manual_seed(2)) < density)


MASKS: dict[str, Callable[[Case], Mask]] = {
    "window": lambda case: SlidingWindow(30, 10),
    "window, open left": lambda case: SlidingWindow(None, 5),
    "window of one": lambda case: SlidingWindow(0, 0),
    "lambda": lambda case: Lambda(sink=5, window=70),
    "lambda, sinks beyond a tile": lambda case: Lambda(sink=100, window=3),
    "groups": lambda case: ShiftedGroups(50),
    "groups of one": lambda case: ShiftedGroups(1),
    "blocks of 16": lambda case: layout(case, 16, 0.3),
    "blocks of 48, shared": lambda case: layout(case, 48, 0.5, False, False),
    "blocks of 64": lambda case: layout(case, 64, 0.5, per_batch=False),
    "blocks of 128": lambda case: layout(case, 128, 0.7, per_head=False),
    "documents": lambda case: documents(case),
    "documents, unsorted": lambda case: documents(case, False),
    "dense": lambda case: table(case, (True, True, True, True)),
    "dense, keys only": lambda case: table(case, (True, False, False, True)),
    "dense, rows only": lambda case: table(case, (False, False, True, False)),
    "two windows": lambda case: SlidingWindow(60, 60) & Lambda(3, 40),
    "two lambdas": lambda case: Lambda(20, 30) & Lambda(3, 90),
    "window and blocks": lambda case: SlidingWindow(60, None) & layout(case, 32, 0.6),
    "blocks of two sizes": lambda case: layout(case, 32, 0.7) & layout(case, 48, 0.8),
    "groups and documents": lambda case: ShiftedGroups(64) & documents(case),
    "everything": lambda case: (
        Lambda(9, 80) & ShiftedGroups(150) & layout(case, 16, 0.8) & documents(case)
        & table(case, (False, False, False, True), 0.9)
    ),
}  # fmt: skip


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str, dtype: torch.dtype, route: Any) -> None:
    case = replace(
        SHAPE, causal=len(name) % 2 == 0, align="top_left" if len(name) % 3 == 0 else "bottom_right"
    )
    check(replace(case, mask=MASKS[name](case)), dtype, route)


@pytest.mark.sanitize
@pytest.mark.parametrize("name", MASKS)
def test_packed_masks(name: str, route: Any, threads: Callable[[int], None]) -> None:
    threads(2)
    case = replace(SHAPE, lengths=PACKED, causal=len(name) % 2 == 1)
    check(replace(case, mask=MASKS[name](case)), torch.float32, route)


TERMS: dict[str, dict[str, Any]] = {
    "bias": {"bias": (True, True, True, True)},
    "bias, relative positions": {"bias": (False, True, True, True)},
    "bias of all heads": {"bias": (True, False, True, True)},
    "bias of every pair": {"bias": (False, False, True, True)},
    "bias of keys": {"bias": (True, True, False, True)},
    "bias of keys, shared": {"bias": (False, False, False, True)},
    "bias of queries": {"bias": (True, True, True, False)},
    "bias of heads": {"bias": (False, True, False, False)},
    "bias in float32": {"bias": (False, True, True, True), "bias_float": True},
    "bias that hides": {"bias": (True, True, True, True), "hidden_bias": 0.3},
    "softcap": {"softcap": 2.0},
    "large softcap": {"softcap": 50.0},
    "sinks": {"sinks": True},
    "alibi": {"alibi": True},
    "all": {"bias": (False, True, True, True), "softcap": 3.0, "sinks": True, "alibi": True},
    "all, negative scale": {"bias": (True, False, False, True), "softcap": 1.0, "sinks": True, "scale": -0.4},
    "no scale": {"bias": (True, True, True, True), "sinks": True, "scale": 0.0},
}


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TERMS)
def test_terms(name: str, dtype: torch.dtype, route: Any) -> None:
    check(replace(SHAPE, causal=len(name) % 2 == 0, **TERMS[name]), dtype, route)


@pytest.mark.sanitize
@pytest.mark.parametrize("name", TERMS)
def test_packed_terms(name: str, route: Any, threads: Callable[[int], None]) -> None:
    threads(2)
    check(replace(SHAPE, lengths=PACKED, causal=True, **TERMS[name]), torch.float32, route)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    hkv, length = draw(st.integers(1, 2)), st.integers(0, 90)
    packed = draw(st.booleans()) and draw(st.booleans())
    lengths = tuple(draw(st.lists(st.tuples(length, length), min_size=1, max_size=3))) if packed else None
    case = Case(
        b=draw(st.integers(1, 2)),
        hq=hkv * draw(st.integers(1, 3)),
        hkv=hkv,
        sq=draw(st.integers(1, 170)),
        sk=draw(st.integers(1, 260)),
        d=draw(st.sampled_from([8, 16, 33, 64])),
        dv=draw(st.sampled_from([8, 20, 64])),
        causal=draw(st.booleans()),
        align=draw(st.sampled_from(["bottom_right", "top_left"])),
        scale=draw(st.sampled_from([None, None, -0.2])),
        lengths=lengths,
        bias=draw(st.sampled_from([None, None])) if packed else draw(
            st.one_of(st.none(), st.tuples(*[st.booleans()] * 4))
        ),
        bias_float=draw(st.booleans()),
        softcap=draw(st.sampled_from([0.0, 0.0, 2.0, 30.0])),
        sinks=draw(st.booleans()),
        alibi=draw(st.booleans()),
    )  # fmt: skip
    near = st.one_of(st.none(), st.integers(0, 100))
    parts: list[Mask] = []
    kinds = st.lists(
        st.sampled_from(["window", "lambda", "groups", "blocks", "documents", "dense"]), max_size=3
    )
    for kind in draw(kinds):
        if kind == "window":
            parts.append(SlidingWindow(draw(near), draw(near)))
        elif kind == "lambda":
            parts.append(Lambda(draw(st.integers(0, 80)), draw(st.integers(1, 100))))
        elif kind == "groups":
            parts.append(ShiftedGroups(draw(st.integers(1, 120))))
        elif kind == "blocks":
            parts.append(
                layout(case, draw(st.sampled_from([16, 32, 48, 64, 80, 128])), 0.6, draw(st.booleans()))
            )
        elif kind == "documents":
            parts.append(documents(case, draw(st.booleans())))
        elif min(case.table_sizes) > 0:
            parts.append(table(case, draw(st.tuples(*[st.booleans()] * 4)), 0.8))
    mask = None
    for part in parts:
        mask = part if mask is None else mask & part
    return replace(case, mask=mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(case=cases(), seed=st.integers(0, 2**31), count=st.sampled_from([1, 1, 2]))
def test_any_combination(
    case: Case, seed: int, count: int, dtype: torch.dtype, route: Any, threads: Callable[[int], None]
) -> None:
    torch.manual_seed(seed)
    threads(count)
    check(case, dtype, route)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [None, PACKED])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout(p: float, lengths: Any, dtype: torch.dtype, route: Any) -> None:
    """The same weights fall in the op and in the oracle, and in the backward pass."""
    case = replace(SHAPE, lengths=lengths, causal=True, softcap=5.0, bias=(False, True, False, True))
    inputs, options = make(case, dtype, route.device), case.options(route.device)
    torch.manual_seed(5)
    ours = differentiate(with_lse, inputs, dropout_p=p, **options)
    route.check("attention_backward" if route.unit != "cuda" else "attention", dtype)
    torch.manual_seed(5)
    oracle = differentiate(reference.attention, inputs.double(), dropout_p=p, **options)
    for name, result in ours.items():
        limit = 1e-5 if dtype == torch.float32 else 2e-2
        assert errors(result, oracle[name], name).relative_l2 < limit


def test_dropout_rate_and_seed(device: str) -> None:
    """Identity values show the weights themselves: a share of p falls, what stays has weight 1 / (1 - p)."""
    q = torch.zeros(4, 8, 128, 16, device=device)
    v = torch.eye(128, device=device).expand(4, 8, 128, 128)
    torch.manual_seed(1)
    first = effkern.attention(q, q, v, dropout_p=0.3)
    second = effkern.attention(q, q, v, dropout_p=0.3)
    torch.manual_seed(1)
    assert torch.equal(first, effkern.attention(q, q, v, dropout_p=0.3))
    assert not torch.equal(first, second)
    kept = first != 0
    assert torch.allclose(first[kept], torch.tensor(1 / (128 * 0.7), device=device))
    count, total = int(kept.sum()), kept.numel()
    assert abs(count / total - 0.7) < 5 * (0.21 / total) ** 0.5
    rows = kept.flatten(0, 2).float()  # no row and no column is like its neighbour
    assert (rows[1:] == rows[:-1]).float().mean().item() == pytest.approx(0.58, abs=0.01)
    assert (rows[:, 1:] == rows[:, :-1]).float().mean().item() == pytest.approx(0.58, abs=0.01)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "bias", [(False, True, True, True), (True, True, False, True), (False, False, True, True)]
)
def test_same_bits_every_time(
    bias: Any, dtype: torch.dtype, route: Any, threads: Callable[[int], None]
) -> None:
    case = replace(SHAPE, b=3, bias=bias, softcap=9.0, sinks=True)
    case = replace(case, mask=ShiftedGroups(100) & layout(case, 32, 0.7))
    inputs = make(case, dtype, route.device)
    first: dict[str, torch.Tensor] | None = None
    for count in (1, 2, 2, 2, 2, 2, 1):
        threads(count)
        torch.manual_seed(3)
        results = differentiate(with_lse, inputs, dropout_p=0.2, **case.options(route.device))
        first = first or results
        for name, result in results.items():
            assert torch.equal(result, first[name]), f"{name} differs with {count} threads"


def test_keys_outside_the_list_are_never_read(route: Any) -> None:
    """NaN in every key and value that no query sees, whole tiles away from those that are seen."""
    case = Case(b=1, hq=2, hkv=1, sq=64, sk=1024, d=16, dv=16, causal=True, mask=Lambda(16, 64))
    inputs = make(case, torch.float32, route.device)
    for tensor in (inputs.k, inputs.v):
        tensor[:, :, 256:768] = torch.nan
    results = differentiate(with_lse, inputs, **case.options(route.device))
    assert all(result.isfinite().all() for result in results.values())


def test_a_bias_that_was_expanded_is_not_copied(route: Any) -> None:
    """A broadcast bias costs its own size, however it was made wide."""
    case = replace(SHAPE, bias=(False, True, True, True))
    inputs = make(case, torch.float32, route.device)
    assert inputs.bias is not None
    wide = Inputs(
        *(getattr(inputs, n) for n in ("q", "k", "v", "grad_out", "grad_lse")),
        bias=inputs.bias.expand(2, 4, 150, 200),
    )
    narrow_results = differentiate(with_lse, inputs, **case.options(route.device))
    wide_results = differentiate(with_lse, wide, **case.options(route.device))
    assert torch.equal(narrow_results["out"], wide_results["out"])
    torch.testing.assert_close(narrow_results["grad_bias"], wide_results["grad_bias"].sum(0, keepdim=True))


MEMORY = """
import resource, torch, effkern
torch.set_num_threads(1)
q, k, v = (torch.randn(1, 1, 32768, 64, requires_grad=True) for _ in range(3))
options = dict(causal=True, mask=effkern.masks.{mask}, softcap=20.0, sink_logits=torch.zeros(1))
small = [t[:, :, :64].detach().requires_grad_() for t in (q, k, v)]
effkern.attention(*small, **options).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
effkern.attention(q, k, v, **options).sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("mask", ["Lambda(16, 512)", "ShiftedGroups(512)"])
def test_no_square_of_the_sequence_in_memory(mask: str, tmp_path: Path) -> None:
    """32k tokens, forward and backward: one byte a pair would be a gigabyte; results and packed queries are 100 MB."""
    script = (
        tmp_path / "memory.py"
    )  # a file, so that the package under test is imported and not the current folder
    script.write_text(MEMORY.format(mask=mask))
    package = str(Path(effkern.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": package}
    result = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=True
    )
    assert int(result.stdout) * 1024 < 200 * 2**20
