"""The Triton long convolutions against float64: under the interpreter everywhere, on the GPU where there is one.

The interpreted cases run in a process of their own (tests/interpreted.py), in fp32.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from interpreted import every_dtype, needs_device, needs_interpreter, needs_triton, report, settle
from long_conv_oracle import Inputs, random_inputs, results
from long_conv_oracle import check as check_inputs
from torch import Tensor

import effkern

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RAN = "long_conv_backward:triton"

VARIANTS = list(product((True, False), repeat=2))  # causal or not, with gates and skip or without

# Shapes are (B, H, L, Lk).
CASES: dict[str, dict[str, Any]] = {
    "one position": dict(shape=(1, 1, 1, 1)),
    "short": dict(shape=(3, 2, 20, 7)),
    "smallest ring": dict(shape=(2, 3, 256, 256)),
    "one position more": dict(shape=(2, 2, 257, 257)),
    "odd": dict(shape=(1, 3, 601, 5)),
    "ring of 1024": dict(shape=(2, 1, 1024, 1024)),
    "ring of 2048": dict(shape=(1, 1, 1999, 1500)),
    "largest ring": dict(shape=(1, 2, 4096, 4096)),
    "three passes": dict(shape=(2, 1, 8192, 8192), variants=VARIANTS[::3]),
    "three passes, not to the end": dict(shape=(1, 1, 9000, 4097), variants=VARIANTS[1:3]),
    "three passes, few taps": dict(shape=(2, 1, 300, 5), ring=(16, 256), variants=VARIANTS[1:3]),
    "three passes, largest rows": dict(shape=(1, 1, 65536, 65536), variants=VARIANTS[:1]),
    "no batch": dict(shape=(0, 2, 20, 20)),
    "no channels": dict(shape=(2, 0, 20, 20)),
    "no positions": dict(shape=(2, 2, 0, 20)),
    "positions apart": dict(shape=(2, 3, 40, 40), layout="positions apart"),
    "rows apart": dict(shape=(2, 3, 40, 40), layout="rows apart"),
    "weights in float32": dict(shape=(2, 3, 300, 300), float_weights=True),
}
# What a real grid needs on top: several shares of the batch, many channels.
DEVICE_CASES: dict[str, dict[str, Any]] = {
    "many channels": dict(shape=(3, 700, 1000, 1000)),
    "large batch": dict(shape=(530, 2, 513, 100)),
    "three passes, 256 columns": dict(shape=(2, 2, 70_001, 70_001)),
    "three passes, many of both": dict(shape=(9, 130, 16384, 16384)),
    "three passes, 512K": dict(shape=(2, 3, 500_000, 500_000)),
    "three passes, 1M": dict(shape=(2, 2, 1 << 20, 1 << 20)),
    "many of both": dict(shape=(9, 130, 4096, 4096)),
}


def apart(t: Tensor, layout: str) -> Tensor:
    if layout == "positions apart":
        return t.movedim(-1, 0).contiguous().movedim(0, -1)
    if layout == "rows apart":
        return torch.nn.functional.pad(t, (2, 3))[..., 2:-3]
    return t


@contextmanager
def settings(**values: Any) -> Iterator[None]:
    """Names of the launchers' modules set to other values. `ring=(columns, row)`: what every length takes."""
    from effkern._triton import long_conv as launcher
    from effkern._triton import long_conv_passes as passes

    if "ring" in values:
        columns, row = values.pop("ring")
        (ring,) = (r for r in launcher._RINGS if r.size == row)
        values["ring_of"] = lambda length: (columns, ring)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            modules = [m for m in (launcher, passes) if hasattr(m, name)]
            assert modules
            for module in modules:
                patch.setattr(module, name, value)
        yield


def check(case: dict[str, Any], dtype: torch.dtype, device: str) -> None:
    """Output and every gradient against the oracle, with and without gates and skip, both directions; on the GPU twice,
    for equal bits."""
    torch.manual_seed(0)
    for causal, full in case.get("variants", VARIANTS):
        made = random_inputs(
            *case["shape"],
            dtype,
            causal=causal,
            skip=full,
            gates=full,
            float_weights=case.get("float_weights", False),
        )
        inputs = made.map(lambda t: apart(t.to(device), case.get("layout", "plain")))
        grad = apart(torch.randn(inputs.u.shape, dtype=torch.float64), case.get("layout", "plain"))
        ring = {"ring": case["ring"]} if "ring" in case else {}
        with effkern.testing.nan_filled_empty(), settings(**ring):
            check_inputs(inputs, grad=grad, causal=causal, backend="triton")
            assert effkern.backends.last() == RAN
            if device == "cuda":
                once, again = (
                    results(effkern.long_conv, inputs, causal=causal, backend="triton") for _ in range(2)
                )
                assert all(torch.equal(value, again[name]) for name, value in once.items())


def check_parts(dtype: torch.dtype, device: str) -> None:
    """Any cuts: the oracle sees the input whole. A prepared kernel gives what the kernel gives."""
    for cuts, taps, state in (((7,), 30, False), ((1, 2, 250, 299), 17, True), ((150,), 300, True)):
        made = random_inputs(2, 3, 300, taps, dtype, skip=True, gates=True, state=state)
        inputs = made.map(lambda t: t.to(device))
        check_inputs(inputs, cuts, backend="triton")
        check_inputs(inputs, cuts, prepared=300 + taps, backend="triton")
        assert effkern.backends.last() == RAN


def check_parts_in_passes(dtype: torch.dtype, device: str) -> None:
    with settings(ring=(16, 256)):
        inputs = random_inputs(1, 1, 300, 17, dtype, skip=True, gates=True, state=True)
        check_inputs(inputs.map(lambda t: t.to(device)), (250,), backend="triton")


def check_groups(dtype: torch.dtype, device: str) -> None:
    """Three passes over single channels and sequences. On the GPU the bits are those of all at once, gradients of
    kernels included, since one sequence is added after the other either way."""
    inputs = random_inputs(2, 2, 300, 300, dtype, skip=True, gates=True).map(lambda t: t.to(device))
    with settings(ring=(16, 256)), effkern.testing.nan_filled_empty():
        with settings(_BYTES=5 * 8 * 16 * 256):
            check_inputs(inputs, backend="triton")
            grouped = results(effkern.long_conv, inputs, backend="triton") if device == "cuda" else {}
        whole = results(effkern.long_conv, inputs, backend="triton") if device == "cuda" else {}
    assert all(torch.equal(value, whole[name]) for name, value in grouped.items())


def check_columns(dtype: torch.dtype, device: str) -> None:
    """First pass of 256 columns: rows as their formula in float64 has them; third: 256 times what went in."""
    from effkern._triton import long_conv as launcher
    from effkern._triton.long_conv_passes import Passes

    size = row = 256
    u = torch.randn(1, 1, 60_000, device=device)
    with settings(ring=(size, row)):
        passes = Passes(launcher._Problem(u, u[0], None, None, None, 0, True))
    found = passes.down(u, None, 0)
    p, r = torch.arange(size).double()[:, None], torch.arange(row).double()
    wave = torch.polar(torch.ones(size, size).double(), 2 * torch.pi * (0.25 - p) * p.mT / size)
    turn = 2 * torch.pi * ((0.25 - p) / size - 0.25) * r / row
    line = torch.nn.functional.pad(u[0, 0].cpu().double(), (0, size * row - 60_000)).view(size, row)
    wanted = (wave @ line.to(wave)) * torch.polar(torch.ones_like(turn), turn)
    torch.testing.assert_close(
        found[0, 0].cpu().double(), torch.view_as_real(wanted).movedim(-1, 0), atol=1e-4, rtol=0
    )
    out = torch.empty_like(u)
    passes.up(found, 0, out, None)
    torch.testing.assert_close(out, size * u, atol=1e-3, rtol=0)


def check_nan_in_passes(dtype: torch.dtype, device: str) -> None:
    with settings(ring=(16, 256)):
        check_nan(dtype, device)


def check_needs_in_passes(dtype: torch.dtype, device: str) -> None:
    with settings(ring=(16, 256)):
        check_needs(dtype, device)


def check_surplus_taps(dtype: torch.dtype, device: str) -> None:
    """Taps that no input meets count for nothing and have zero gradients."""
    op = torch.ops.effkern
    for causal in (True, False):
        inputs = random_inputs(2, 3, 20, 50, dtype, causal=causal).map(lambda t: t.to(device))
        grad = torch.randn(2, 3, 20).to(inputs.u)
        out = op.long_conv_triton(inputs.u, inputs.k, causal=causal)
        assert torch.equal(out, op.long_conv_triton(inputs.u, inputs.k[..., :20], causal=causal))
        grad_k = op.long_conv_triton_backward(grad, inputs.u, inputs.k, causal=causal)[1]
        fewer = op.long_conv_triton_backward(grad, inputs.u, inputs.k[..., :20], causal=causal)[1]
        assert torch.equal(grad_k[..., :20], fewer) and not grad_k[..., 20:].any()


def check_needs(dtype: torch.dtype, device: str) -> None:
    """A gradient that is not needed is empty, and the others do not depend on it."""
    inputs = random_inputs(3, 2, 50, 50, dtype, skip=True, gates=True).map(lambda t: t.to(device))
    given = inputs.u, inputs.k, None, inputs.skip, inputs.pre_gate, inputs.post_gate, 0, True
    op = torch.ops.effkern.long_conv_triton_backward
    grad = torch.randn(3, 2, 50).to(inputs.u)
    whole = op(grad, *given)
    for needs in product((True, False), repeat=5):
        if device == "cpu" and sum(needs) in (2, 3):
            continue  # the interpreter is slow: none, each alone, all but one, all
        for found, full, need in zip(op(grad, *given, *needs), whole, needs):
            assert found.dtype == dtype
            if need:
                torch.testing.assert_close(found, full)
            else:
                assert found.shape == (0,)


def check_shares(dtype: torch.dtype, device: str) -> None:
    """Shares of the batch, as if a GPU were full with so few programs, the last one smaller: an output row is the same
    in any, gradients add up."""
    inputs = random_inputs(7, 2, 40, 40, dtype, skip=True, gates=True).map(lambda t: t.to(device))
    alone = results(effkern.long_conv, inputs, backend="triton")
    for count in (1, 4, 6):
        with settings(_PROGRAMS=count):
            check_inputs(inputs, backend="triton")
            shared = results(effkern.long_conv, inputs, backend="triton")
        for name, value in shared.items():
            if name not in ("k", "skip"):
                assert torch.equal(value, alone[name]), name


def check_nan(dtype: torch.dtype, device: str) -> None:
    """A NaN stays in its row, in gradients of k and skip in its channel; the gradient of u does not look at u."""
    inputs = random_inputs(3, 4, 300, 300, dtype, skip=True, gates=True).map(lambda t: t.to(device))
    u = inputs.u.clone()
    u[1, 2, 17] = torch.nan
    spoiled = Inputs(u, inputs.k, inputs.skip, inputs.pre_gate, inputs.post_gate)
    with settings(_PROGRAMS=4):
        clean, dirty = (results(effkern.long_conv, i, backend="triton") for i in (inputs, spoiled))
    row = torch.zeros(3, 4, dtype=torch.bool, device=device)
    row[1, 2] = True
    for name, value in dirty.items():
        touched = row if value.dim() == 3 else row.any(0)
        assert torch.equal(value[~touched], clean[name][~touched]), name
    assert dirty["out"][1, 2, 17].isnan() and dirty["k"][2].isnan().any() and dirty["skip"][2].isnan()
    assert torch.equal(dirty["u"], clean["u"])


def check_refusal(dtype: torch.dtype, device: str) -> None:
    """Inputs that no ring holds, their state included, are refused by name, forward and backward."""
    u, k = (torch.zeros(shape, dtype=dtype, device=device) for shape in ((1, 1, (1 << 20) + 1), (1, 2)))
    backward = torch.ops.effkern.long_conv_triton_backward
    for call in (
        lambda: effkern.long_conv(u, k, backend="triton"),
        lambda: effkern.long_conv(u[..., 1:], k, state=u[..., :1], backend="triton"),
        lambda: backward(u, u, k),
    ):
        with pytest.raises(effkern.backends.Unavailable, match=r"up to 1048576 positions.* not 1048577"):
            call()


EXTRA = {
    "in parts": check_parts,
    "in parts, three passes": check_parts_in_passes,
    "groups": check_groups,
    "256 columns": check_columns,
    "surplus taps": check_surplus_taps,
    "needs": check_needs,
    "shares of the batch": check_shares,
    "nan": check_nan,
    "refusal": check_refusal,
}
# What takes the interpreter too long.
DEVICE_EXTRA = {
    "needs, three passes": check_needs_in_passes,
    "nan, three passes": check_nan_in_passes,
}


@needs_interpreter
@pytest.mark.parametrize("name", [*CASES, *EXTRA])
def test_interpreter(name: str, verdicts: dict[str, str]) -> None:
    settle(verdicts[name])


@needs_device
@every_dtype
@pytest.mark.parametrize("name", [*CASES, *DEVICE_CASES])
def test_device(name: str, dtype: torch.dtype) -> None:
    check({**CASES, **DEVICE_CASES}[name], dtype, "cuda")


@needs_device
@every_dtype
@pytest.mark.parametrize("name", [*EXTRA, *DEVICE_EXTRA])
def test_device_extra(name: str, dtype: torch.dtype) -> None:
    {**EXTRA, **DEVICE_EXTRA}[name](dtype, "cuda")


@needs_triton
def test_supports_names_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from effkern._triton import long_conv as launcher

    cpu = torch.device("cpu")
    reason = launcher.supports(cpu, torch.float32, {})
    assert os.environ.get("TRITON_INTERPRET") == "1" or (reason is not None and "interpreter" in reason)
    monkeypatch.setattr(launcher, "_device_supports", lambda *request: None)
    assert launcher.supports(cpu, torch.float32, {"positions": 1 << 20}) is None
    assert "1048576" in str(launcher.supports(cpu, torch.float32, {"positions": (1 << 20) + 1}))


@needs_triton
def test_rings_are_the_smallest_powers_of_two() -> None:
    from effkern._triton import long_conv as launcher

    for exponent in range(8, 21):
        for length in (2**exponent, 2**exponent - 1, 2 ** (exponent - 1) + 1):
            columns, ring = launcher.ring_of(length)
            assert columns * ring.size == 2**exponent and (columns == 1) == (exponent <= 12)


@needs_triton
@pytest.mark.parametrize(("columns", "row"), [(16, 512), (16, 4096), (256, 512), (256, 4096)])
def test_groups_stay_within_their_memory(columns: int, row: int) -> None:
    """And cover every channel and sequence once."""
    from types import SimpleNamespace

    from effkern._triton import long_conv_passes as launcher

    passes = launcher.Passes.__new__(launcher.Passes)
    passes.size, passes.row = columns, row
    for batches, channels, buffers in ((1, 1, 1), (1, 5000, 2), (70_000, 3, 1), (64, 768, 2)):
        passes.problem = SimpleNamespace(batches=batches, channels=channels)
        seen, sequences = 0, 0
        for group, cuts in passes.groups(buffers):
            assert group.start == seen and [c.stop for c in cuts[:-1]] == [c.start for c in cuts[1:]]
            most = max(c.stop - c.start for c in cuts)
            assert (most + 1) * (group.stop - group.start) * buffers * 8 * columns * row <= launcher._BYTES
            assert (group.stop - group.start) * most < 65536  # programs along the second axis of a grid
            seen, sequences = group.stop, cuts[-1].stop
            assert cuts[0].start == 0 and sequences == batches
        assert seen == channels


@needs_triton
@pytest.mark.parametrize("size", [256, 512, 1024, 2048, 4096])
def test_tables_are_the_transform(size: int) -> None:
    """Their three steps on w x, in float64 and from rounded numbers, give every frequency of the twisted FFT once."""
    from effkern._triton import long_conv as launcher

    radix, last = 16, size // 256
    numbers = launcher._tables(size, torch.device("cpu")).double()
    shapes = [(radix, radix), (radix, size // radix), (radix, radix), (radix, last), (radix, radix)]
    planes = numbers.split([2 * rows * columns for rows, columns in shapes])
    one, twist, two, late, three = (
        torch.complex(*p.view(2, *shape)) for p, shape in zip(planes, shapes, strict=True)
    )
    x = torch.randn(size, dtype=torch.float64)
    step = (one @ x.to(torch.complex128).view(radix, -1)) * twist
    step = two @ step.mT.reshape(radix, -1)
    if last > 1:
        step = three @ (step * late.repeat_interleave(radix, 1)).mT.reshape(radix, -1)
    turn = torch.arange(size, dtype=torch.float64) * (torch.pi / (2 * size))
    wanted = torch.fft.fft(torch.polar(torch.ones_like(turn), turn) * x)
    found = step.flatten()
    order = (found[:, None] - wanted).abs().argmin(1)
    assert order.unique().numel() == size
    torch.testing.assert_close(found, wanted[order], atol=1e-5, rtol=1e-5)


if __name__ == "__main__":
    every = {name: partial(check, case, torch.float32, "cpu") for name, case in CASES.items()}
    report(every | {name: partial(case, torch.float32, "cpu") for name, case in EXTRA.items()})
