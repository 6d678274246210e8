"""The Triton coupling against PyTorch, bit for bit: under the interpreter everywhere, on the GPU where there is one.

The interpreted cases run in a process of their own (tests/interpreted.py), in fp32.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from interpreted import every_dtype, needs_device, needs_interpreter, report, settle
from test_coupling import DTYPES, WAYS, composed, make, same_bits
from torch import Tensor

import effkern

SHAPES = [(1,), (3, 5), (1024,), (5, 7, 61), (0, 4), ()]


def check(args: list[Tensor | None], **how: object) -> None:
    found = effkern.coupling(*args, backend="triton", **how)  # type: ignore[arg-type]
    assert effkern.backends.last() == "coupling:triton"
    ours = list(found) if isinstance(found, tuple) else [found]
    # The oracle on the CPU: PyTorch's GPU kernels fuse some products.
    expected = composed(*(t if t is None else t.cpu() for t in args), **how)  # type: ignore[arg-type]
    assert len(ours) == len(expected)
    for a, e in zip(ours, expected):
        same_bits(a.cpu(), e)


def check_way(way: str, dtype: torch.dtype, streams: torch.dtype, device: str) -> None:
    names, how = WAYS[way]
    for shape in SHAPES:
        args = [None if t is None else t.to(device) for t in make(names, shape, dtype, streams)]
        with effkern.testing.nan_filled_empty():
            check(args, **how)
    if device == "cuda":
        args = [None if t is None else t.to(device) for t in make(names, (3_000_001,), dtype, streams)]
        check(args, **how)


def check_numbers(device: str) -> None:
    """Ties, subnormal numbers, zeros of both signs, infinities and NaN."""
    special = [0.0, -0.0, 0.5, -0.5, 1.5, 2.5, 8388607.5, -8388609.0, 3e38, -3e38, 1e-40, math.inf, -math.inf]
    f, y = (t.flatten().to(device) for t in torch.meshgrid(*[torch.tensor(special)] * 2, indexing="ij"))
    for q in (0, 3, 23):
        check([f, y, None], q=q)
        check([f, y, None], q=q, subtract=True)
    check([f, y, y], alpha=0.3, beta=0.7)
    check([f[: len(special)], None, None], q=0)


def check_largest(device: str) -> None:
    for value in (math.nan, math.inf, -1e30):
        for place in (0, 1023, 1024, 2999):
            f = torch.randn(3000)
            f[place] = value
            largest = effkern.coupling(
                f.to(device), torch.zeros(3000, device=device), q=10, backend="triton"
            )[1]
            torch.testing.assert_close(
                largest.cpu(), torch.tensor(abs(value)), equal_nan=True, rtol=1e-6, atol=0
            )


def check_strides(device: str) -> None:
    wide = torch.randn(6, 40, 9, device=device)
    check([wide.mT, wide[:, :, :1].expand(6, 40, 9).mT, wide.mT], alpha=0.3, keep=2.0)


EXTRA = {"numbers": check_numbers, "largest": check_largest, "strides": check_strides}


@needs_interpreter
@pytest.mark.parametrize("name", [*WAYS, *EXTRA])
def test_interpreter(name: str, verdicts: dict[str, str]) -> None:
    settle(verdicts[name])


@needs_device
@pytest.mark.parametrize("streams", DTYPES, ids=lambda d: str(d)[6:])
@every_dtype
@pytest.mark.parametrize("way", WAYS)
def test_device(way: str, dtype: torch.dtype, streams: torch.dtype) -> None:
    check_way(way, dtype, streams, "cuda")


@needs_device
@pytest.mark.parametrize("name", EXTRA)
def test_device_extra(name: str) -> None:
    EXTRA[name]("cuda")


if __name__ == "__main__":
    single = torch.float32
    every = {way: partial(check_way, way, single, single, "cpu") for way in WAYS}
    report(every | {name: partial(case, "cpu") for name, case in EXTRA.items()})
