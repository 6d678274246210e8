"""Triton's palettised products against the reference in float64: under the interpreter everywhere, on the GPU where
there is one.

The interpreted cases run in a process of their own (tests/interpreted.py), in fp32.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import pytest
import torch
from interpreted import every_dtype, needs_device, needs_interpreter, needs_triton, report, settle
from test_palettized_linear import judge, make_palette
from torch import Tensor

import effkern
from effkern.ops.palettize import Palette

# shape is that of the weight; tiles of the interpreter are 16 tokens, 16 columns, 32 summed numbers. A block of indices
# is 512 columns at 1 and 3 bits, 256 at 2 and 6, 128 at 4, 64 at 8.
CASES: dict[str, dict[str, Any]] = {
    "one bit": dict(tokens=3, shape=(10, 30), clusters=2),
    "two bits": dict(tokens=2, shape=(5, 70), clusters=4),
    "three bits": dict(tokens=5, shape=(20, 44), clusters=8),
    "three bits, two blocks": dict(tokens=1, shape=(7, 530), clusters=8, bias=True),
    "three bits, whole block": dict(tokens=9, shape=(5, 512), clusters=8),
    "three bits, many tokens": dict(tokens=20, shape=(19, 550), clusters=8, bias=True),
    "four bits": dict(tokens=8, shape=(18, 140), clusters=16, bias=True),
    "four bits, many tokens": dict(tokens=17, shape=(33, 140), clusters=16, bias=True),
    "six bits": dict(tokens=2, shape=(6, 270), clusters=40),
    "six bits, many tokens": dict(tokens=9, shape=(17, 70), clusters=40),
    "eight bits": dict(tokens=3, shape=(4, 70), clusters=70),
    "eight bits, many tokens": dict(tokens=10, shape=(4, 70), clusters=70),
    "fewer entries than codes": dict(tokens=11, shape=(9, 50), clusters=5),
    "one entry": dict(tokens=3, shape=(5, 9), clusters=1),
    "a table for three rows": dict(tokens=4, shape=(12, 40), clusters=7, groups=4),
    "a table for 20 rows": dict(tokens=21, shape=(40, 40), clusters=16, groups=2),
    "low rank": dict(tokens=3, shape=(10, 40), clusters=8, bias=True, low_rank=3),
    "low rank, many tokens": dict(tokens=10, shape=(10, 40), clusters=8, low_rank=3),
    "one column": dict(tokens=9, shape=(5, 1), clusters=3),
    "rows apart": dict(tokens=10, shape=(6, 20), clusters=8, layout="rows apart"),
    "columns apart": dict(tokens=5, shape=(6, 20), clusters=8, layout="columns apart"),
    "no tokens": dict(tokens=0, shape=(4, 8), clusters=8),
}

# What real tiles need on top.
DEVICE_CASES: dict[str, dict[str, Any]] = {
    "4096, 3 bits, one token": dict(tokens=1, shape=(4096, 4096), clusters=8),
    "4096, 4 bits, 5 tokens": dict(tokens=5, shape=(4096, 4096), clusters=16, groups=256, bias=True),
    "4096, 3 bits, 300 tokens": dict(tokens=300, shape=(4096, 4096), clusters=8, groups=4),
    "ragged, 4 bits, 20 tokens": dict(tokens=20, shape=(1001, 1533), clusters=16, bias=True),
}

product = partial(effkern.palettized_linear, backend="triton")


def moved(palette: Palette, device: str) -> Palette:
    return torch.utils._pytree.tree_map(lambda t: t.to(device), palette)


def check_case(
    case: dict[str, Any], dtype: torch.dtype, device: str, table: torch.dtype | None = None
) -> None:
    tokens, (rows, columns) = case["tokens"], case["shape"]
    palette = moved(
        make_palette(rows, columns, case["clusters"], case.get("groups", 1), dtype=table or dtype), device
    )
    x = torch.randn(tokens, columns)
    if case.get("layout") == "rows apart":
        x = torch.randn(tokens, 2 * columns)[:, :columns]
    elif case.get("layout") == "columns apart":
        x = torch.randn(columns, tokens).mT
    x = x.to(device=device, dtype=dtype, memory_format=torch.preserve_format)
    bias = torch.randn(rows).to(device, dtype) if case.get("bias") else None
    rank = case.get("low_rank", 0)
    factors = (torch.randn(rank, columns).to(x), torch.randn(rows, rank).to(x)) if rank else None
    with effkern.testing.nan_filled_empty():
        ours = judge("triton", product, x, palette, bias, factors)
        again = judge("triton", product, x, palette, bias, factors) if device == "cuda" else ours
    assert all(torch.equal(ours[name], again[name]) for name in ours)


def check_needs(dtype: torch.dtype, device: str) -> None:
    """A gradient that is not needed is empty, and the others do not depend on it."""
    palette = moved(make_palette(6, 20, 8, dtype=dtype), device)
    x, sent = torch.randn(3, 20).to(device, dtype), torch.randn(3, 6).to(device, dtype)
    op = torch.ops.effkern.palettized_linear_triton_backward
    call = (sent, x, palette.indices, palette.lut, palette.bits, 1, 1)
    whole = op(*call)
    for needs in ((True, False), (False, True), (False, False)):
        for found, full, need in zip(op(*call, *needs), whole, needs):
            assert torch.equal(found, full) if need else found.shape == (0,)


def check_splits(dtype: torch.dtype, device: str) -> None:
    """A row in one piece and in several: the same sums, added in another order."""
    from effkern._triton import palettized_linear as launcher

    before = launcher._PROGRAMS
    palette = moved(make_palette(2, 500, 16, dtype=dtype), device)
    x = torch.randn(2, 500).to(device, dtype)
    try:
        for count in (1, 3, 100):
            launcher._PROGRAMS = count
            judge("triton", product, x, palette)
    finally:
        launcher._PROGRAMS = before


def check_alignment(dtype: torch.dtype, device: str) -> None:
    """Indices that do not begin at a whole word."""
    palette = moved(make_palette(6, 20, 8, dtype=dtype), device)
    room = torch.zeros(palette.indices.numel() + 1, dtype=torch.uint8, device=device)
    room[1:] = palette.indices.flatten()
    shifted = Palette(room[1:].view(palette.indices.shape), palette.lut, (6, 20), 3)
    for tokens in (2, 12):
        x = torch.randn(tokens, 20).to(device, dtype)
        assert torch.equal(product(x, shifted), product(x, palette))


def check_corrupt(dtype: torch.dtype, device: str) -> None:
    """Codes that the table does not have are read as 0, as on the CPU, and nothing behind the table is."""
    palette = moved(make_palette(5, 60, 8, dtype=dtype), device)
    lut = torch.full((9,), torch.nan).to(device, dtype)
    lut[:6] = palette.lut[:6]
    padded = torch.where(torch.arange(8, device=device) < 6, palette.lut, 0.0)
    for tokens in (2, 12):
        x = torch.randn(tokens, 60).to(device, dtype)
        found = product(x, Palette(palette.indices, lut[:6], (5, 60), 3))
        assert torch.equal(found, product(x, Palette(palette.indices, padded, (5, 60), 3)))


def check_nan(dtype: torch.dtype, device: str) -> None:
    """A NaN makes its token NaN, and no other."""
    palette = moved(make_palette(6, 40, 8, dtype=dtype), device)
    for tokens in (4, 20):
        x = torch.randn(tokens, 40).to(device, dtype)
        clean = product(x, palette)
        x[2, 31] = torch.nan
        dirty = product(x, palette)
        assert dirty[2].isnan().all()
        dirty[2] = clean[2]
        assert torch.equal(dirty, clean)


def check_refusals(dtype: torch.dtype, device: str) -> None:
    palette = moved(make_palette(4, 8, 4, dim=2, dtype=dtype), device)
    x = torch.randn(3, 8).to(device, dtype)
    with pytest.raises(effkern.backends.Unavailable, match="single numbers, not of vectors of dim 2"):
        product(x, palette)
    plain = moved(make_palette(4, 8, 8, dtype=dtype), device)
    if device == "cpu":
        with pytest.raises(effkern.backends.Unavailable, match="triton kernels take float32 on cpu"):
            product(x.half(), plain)
    with pytest.raises(RuntimeError, match="lut must be float32, bfloat16 or float16, got float64"):
        product(x, Palette(plain.indices, plain.lut.double(), (4, 8), 3))
    out = product(x.requires_grad_(), plain)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        grad.sum().backward()


def check_dispatcher(dtype: torch.dtype, device: str) -> None:
    """What the CPU op says of arguments that do not fit."""
    palette = moved(make_palette(10, 48, 8, dtype=dtype), device)
    x = torch.randn(2, 48).to(device, dtype)
    given: dict[str, Any] = {"indices": palette.indices, "lut": palette.lut, "bits": 3, "groups": 1, "dim": 1}

    def ones(*shape: int) -> Tensor:
        return torch.ones(shape, device=device, dtype=dtype)

    for change, match in (
        ({"bits": 5}, "bits must be 1, 2, 3, 4, 6 or 8, got 5"),
        ({"groups": 3}, "groups 3 does not divide the 10 rows"),
        ({"dim": 3}, "dim must be 1, 2 or 4, got 3"),
        ({"indices": palette.indices[:, 1:]}, "does not fit indices of shape"),
        ({"indices": palette.indices.int()}, "indices must be a uint8 matrix"),
        ({"lut": ones(9)}, "lut has shape"),
        ({"bias": ones(9)}, r"bias must be floating, of shape \(10,\), got \(9,\)"),
    ):
        with pytest.raises(RuntimeError, match=match):
            torch.ops.effkern.palettized_linear_triton(x, **{**given, **change})
    with pytest.raises(RuntimeError, match=r"grad_out has shape \(2, 9\)"):
        torch.ops.effkern.palettized_linear_triton_backward(ones(2, 9), x, **given)


def check_mixed(dtype: torch.dtype, device: str) -> None:
    """Tables of another dtype than x are multiplied as float32."""
    tables = (torch.float32, torch.bfloat16) if device == "cpu" else (torch.float32, torch.float16)
    for table in tables:
        for tokens in (3, 40):
            case = dict(tokens=tokens, shape=(20, 70), clusters=16, groups=2)
            check_case(case, dtype, device, table)


EXTRA = {
    "needs": check_needs,
    "splits": check_splits,
    "alignment": check_alignment,
    "corrupt": check_corrupt,
    "nan": check_nan,
    "refusals": check_refusals,
    "dispatcher": check_dispatcher,
    "mixed dtypes": check_mixed,
}


@needs_interpreter
@pytest.mark.parametrize("name", [*CASES, *EXTRA])
def test_interpreter(name: str, verdicts: dict[str, str]) -> None:
    settle(verdicts[name])


@needs_device
@every_dtype
@pytest.mark.parametrize("name", [*CASES, *DEVICE_CASES])
def test_device(name: str, dtype: torch.dtype) -> None:
    check_case({**CASES, **DEVICE_CASES}[name], dtype, "cuda")


@needs_device
@every_dtype
@pytest.mark.parametrize("name", EXTRA)
def test_device_extra(name: str, dtype: torch.dtype) -> None:
    EXTRA[name](dtype, "cuda")


@needs_triton
def test_supports_names_the_reason() -> None:
    from effkern._triton import palettized_linear as launcher

    reason = launcher.supports(torch.device("cpu"), torch.float32, {})
    assert os.environ.get("TRITON_INTERPRET") == "1" or (reason is not None and "interpreter" in reason)
    assert "not meta" in str(launcher.supports(torch.device("meta"), torch.float32, {}))


if __name__ == "__main__":
    every = {name: partial(check_case, case, torch.float32, "cpu") for name, case in CASES.items()}
    report(every | {name: partial(case, torch.float32, "cpu") for name, case in EXTRA.items()})
