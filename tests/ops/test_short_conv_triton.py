"""The Triton short convolution against float64: under the interpreter everywhere, on the GPU where there is one.

The interpreted cases run in a process of their own (tests/interpreted.py), in fp32.
"""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from interpreted import every_dtype, needs_device, needs_interpreter, report, settle
from short_conv_oracle import check, results
from torch import Tensor

import effkern

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RAN = "short_conv_backward:triton"

# Shapes are (B, H, L, W).
CASES: dict[str, dict[str, Any]] = {
    "one number": dict(shape=(1, 1, 1, 1)),
    "decoding": dict(shape=(3, 70, 1, 4)),
    "fewer positions than taps": dict(shape=(2, 5, 3, 7)),
    "rows that share a tile": dict(shape=(3, 23, 33, 4)),
    "one tap": dict(shape=(2, 3, 40, 1)),
    "several tiles a row": dict(shape=(2, 3, 2500, 4)),
    "end on a seam": dict(shape=(1, 2, 1024, 3)),
    "several tiles of taps": dict(shape=(2, 2, 300, 37)),
    "most taps": dict(shape=(1, 1, 260, 256)),
    "no batch": dict(shape=(0, 4, 9, 4)),
    "no channels": dict(shape=(2, 0, 9, 4)),
    "no positions": dict(shape=(2, 4, 0, 3)),
    "channels last": dict(shape=(2, 6, 50, 4), layout="channels last"),
    "rows apart": dict(shape=(2, 6, 50, 4), layout="rows apart"),
    "parameters in float32": dict(shape=(2, 3, 100, 4), wide=True),
}
# What a real grid needs on top.
DEVICE_CASES: dict[str, dict[str, Any]] = {
    "Mamba": dict(shape=(2, 1536, 2048, 4)),
    "long": dict(shape=(1, 2, 1_000_003, 4)),
    "large batch": dict(shape=(70_000, 2, 5, 3)),
}


def apart(t: Tensor, layout: str) -> Tensor:
    if layout == "channels last":
        return t.mT.contiguous().mT
    if layout == "rows apart":
        return torch.nn.functional.pad(t, (2, 3))[..., 2:-3]
    return t


def make(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: str, layout: str = "", wide: bool = False
) -> list[Tensor | None]:
    """x, weight, bias, state."""
    batch, channels, length, taps = shape
    kind = torch.float32 if wide else dtype
    x = apart(torch.randn(batch, channels, length).to(dtype), layout)
    weight = torch.randn(channels, taps) / taps**0.5
    others = weight, torch.randn(channels), torch.randn(batch, channels, taps - 1)
    return [x.to(device), *(t.to(device, kind) for t in others)]


def check_case(case: dict[str, Any], dtype: torch.dtype, device: str) -> None:
    """Outputs and gradients against the oracle, with and without all that can be left out; on the GPU twice, for equal
    bits."""
    given = {key: value for key, value in case.items() if key != "shape"}
    for activation, full in product((None, "silu"), (True, False)):
        x, weight, bias, state = make(case["shape"], dtype, device, **given)
        inputs = [x, weight, bias, state] if full else [x, weight, None, None]
        with effkern.testing.nan_filled_empty():
            once = check(inputs, activation, backend="triton")
            assert effkern.backends.last() == RAN
            if device == "cuda":
                again = results(effkern.short_conv, inputs, activation, backend="triton")
                assert all(torch.equal(value, again[name]) for name, value in once.items())


def check_chunks(dtype: torch.dtype, device: str) -> None:
    """In chunks through the state as in one go, to the bit: a sum has the same order wherever its row is cut."""
    x, weight, bias, _ = make((2, 3, 120, 4), dtype, device)
    assert x is not None and weight is not None
    run = partial(effkern.short_conv, activation="silu", backend="triton", return_state=True)
    whole, last = run(x, weight, bias)
    state, outs = None, []
    for chunk in x.split([1, 1, 38, 2, 78], 2):
        out, state = run(chunk, weight, bias, state=state)
        outs.append(out)
    assert torch.equal(torch.cat(outs, 2), whole) and state is not None and torch.equal(state, last)


def check_needs(dtype: torch.dtype, device: str) -> None:
    """A gradient that is not needed is empty, and the others do not depend on it."""
    inputs = make((2, 3, 50, 4), dtype, device)
    assert inputs[0] is not None
    grad = torch.randn(2, 3, 50).to(inputs[0])
    op = torch.ops.effkern.short_conv_triton_backward
    for silu in (False, True):
        whole = op(grad, *inputs, silu)
        for needs in product((True, False), repeat=4):
            for found, full, need in zip(op(grad, *inputs, silu, *needs), whole, needs):
                assert torch.equal(found, full) if need else found.shape == (0,)


def check_shares(dtype: torch.dtype, device: str) -> None:
    """Blocks of the batch and of the positions split among programs, the last share smaller: sums still are right."""
    from effkern._triton import short_conv as launcher

    before = launcher._PROGRAMS, launcher._SUMS
    inputs = make((5, 2, 300, 4), dtype, device)
    try:
        for count in (1, 6, 14):
            launcher._PROGRAMS, launcher._SUMS = count, 512
            check(inputs, "silu", backend="triton")
    finally:
        launcher._PROGRAMS, launcher._SUMS = before


def check_nan(dtype: torch.dtype, device: str) -> None:
    """A NaN reaches as far as the taps do, in gradients of the parameters its channel."""
    inputs = make((3, 4, 60, 4), dtype, device)
    assert inputs[0] is not None
    spoiled = [inputs[0].clone(), *inputs[1:]]
    spoiled[0][1, 2, 17] = torch.nan
    clean, dirty = (results(effkern.short_conv, i, "silu", backend="triton") for i in (inputs, spoiled))
    for name, value in dirty.items():
        touched = torch.zeros_like(value, dtype=torch.bool)
        if name == "out":
            touched[1, 2, 17:21] = True
        elif name == "grad_x":
            touched[1, 2, 14:21] = True
        elif name in ("grad_weight", "grad_bias"):
            touched[2] = True
        assert torch.equal(value.isnan(), touched), name
        assert torch.equal(value[~touched], clean[name][~touched]), name


EXTRA = {
    "in chunks": check_chunks,
    "needs": check_needs,
    "shares": check_shares,
    "nan": check_nan,
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


if __name__ == "__main__":
    every = {name: partial(check_case, case, torch.float32, "cpu") for name, case in CASES.items()}
    report(every | {name: partial(case, torch.float32, "cpu") for name, case in EXTRA.items()})
