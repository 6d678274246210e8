"""Triton's differentiable k-means against float64 autograd: under the interpreter everywhere, on the GPU where there is
one.

The interpreted cases run in a process of their own (tests/interpreted.py), in fp32.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from dkm_oracle import check, results
from interpreted import every_dtype, needs_device, needs_interpreter, needs_triton, report, settle
from test_dkm import spread
from torch import Tensor

import effkern

CASES: dict[str, dict[str, Any]] = {
    "one codebook": dict(shape=(6, 20), clusters=8),
    "odd sizes": dict(shape=(3, 7, 5), clusters=5, iterations=2),
    "sixteen clusters": dict(shape=(2, 300), clusters=16),
    "one cluster": dict(shape=(37,), clusters=1),
    "groups": dict(shape=(6, 35), clusters=4, groups=3, iterations=2),
    "many iterations": dict(shape=(50,), clusters=3, iterations=7),
    "stops at once": dict(shape=(4, 30), clusters=4, groups=2, tolerance=1e6),
    "stops on the way": dict(shape=(2, 60), clusters=3, groups=2, iterations=6, tolerance=0.02),
    "one weight": dict(shape=(1,), clusters=2),
    "no weight": dict(shape=(0, 5), clusters=2, tolerance=0.5),
    "transposed": dict(shape=(7, 9), clusters=4, layout="transposed"),
    "every other": dict(shape=(5, 11), clusters=4, layout="every other"),
    "few values": dict(shape=(4, 9), clusters=7, layout="few values"),
    "constant": dict(shape=(40,), clusters=3, layout="constant"),
    "warm": dict(shape=(3, 40), clusters=6, temperature=3.0),
    "cold": dict(shape=(3, 40), clusters=6, temperature=1e-3),
}

# What real chunks need on top.
DEVICE_CASES: dict[str, dict[str, Any]] = {
    "a layer": dict(shape=(1024, 4096), clusters=8),
    "a layer, sixteen clusters": dict(shape=(1024, 4099), clusters=16, iterations=2),
    "a table for 16 rows": dict(shape=(1024, 1024), clusters=8, groups=64, tolerance=1e-3),
}


def make(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> Tensor:
    weight = torch.randn(shape)
    if layout == "transposed":
        weight = torch.randn(shape[::-1]).mT
    elif layout == "every other":
        weight = torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]
    elif layout == "few values":
        weight = torch.randint(0, 2, shape) * 1.5 - 1.0
    elif layout == "constant":
        weight = torch.full(shape, 0.3)
    return weight.to(dtype=dtype, memory_format=torch.preserve_format)


def check_case(case: dict[str, Any], dtype: torch.dtype, device: str) -> None:
    options = {"temperature": 0.1, **case}
    weight = make(options.pop("shape"), options.pop("layout", "plain"), dtype).to(device)
    centroids = spread(options.pop("clusters"), options.get("groups", 1)).to(device)
    with effkern.testing.nan_filled_empty():
        ours = check("", weight, centroids, backend="triton", **options)
        again = results(effkern.dkm, weight, centroids, backend="triton", **options)
    assert all(torch.equal(ours[name], again[name]) for name in ours)


@contextmanager
def settings(**values: int) -> Iterator[None]:
    """Chunks as if other numbers of weights were worth one."""
    from effkern._triton import dkm as launcher

    before = {name: getattr(launcher, name) for name in values}
    try:
        for name, value in values.items():
            setattr(launcher, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(launcher, name, value)


def check_chunks(dtype: torch.dtype, device: str) -> None:
    """Several programs a group, the last one's chunk smaller."""
    with settings(_LEAST=64, _PROGRAMS=4, _INTERPRETED=64):
        check_case(dict(shape=(2, 215), clusters=5, iterations=2), dtype, device)
        check_case(dict(shape=(4, 131), clusters=4, groups=2, iterations=3, tolerance=0.02), dtype, device)


def check_hard(dtype: torch.dtype, device: str) -> None:
    """Everything but the nearest centroid underflows: k-means, in which a cluster without weights stays."""
    weight = torch.tensor([[-1.0, -1.5, 0.5, 0.75, 0.25, 4.0]]).to(device, dtype)
    centroids = torch.tensor([-1.0, 0.0, 100.0, 3.0]).to(device)
    for temperature in (1e-12, 1e-30, 1e-45):
        found = results(
            effkern.dkm, weight, centroids, temperature=temperature, iterations=2, backend="triton"
        )
        assert torch.equal(found["centroids"].cpu(), torch.tensor([-1.25, 0.5, 100.0, 4.0]))
        expected = torch.tensor([[-1.25, -1.25, 0.5, 0.5, 0.5, 4.0]]).to(dtype)
        assert torch.equal(found["clustered"].cpu(), expected)


def check_settled(dtype: torch.dtype, device: str) -> None:
    """A group that stands still has the result of as many iterations, to the bit, and its steps say so."""
    weight = torch.stack([torch.tensor([-1.0, 1.0]).repeat(40), torch.randn(80)]).to(device, dtype)
    centroids = torch.tensor([[-1.0, 1.0], [0.1, 0.2]]).to(device)
    options: dict[str, Any] = {"temperature": 0.02, "groups": 2, "backend": "triton"}
    *_, steps = torch.ops.effkern.dkm_triton(weight, centroids[..., None], 0.02, 9, 0.05, 2, 1)
    assert steps[0] == 1 and 1 < steps[1] < 9
    whole = results(effkern.dkm, weight, centroids, tolerance=0.05, iterations=9, **options)
    for group in range(2):
        alone = results(effkern.dkm, weight, centroids, iterations=int(steps[group]), **options)
        assert all(torch.equal(whole[name][group], alone[name][group]) for name in whole)


def check_nan(dtype: torch.dtype, device: str) -> None:
    """Values are not looked at: a NaN makes its group NaN, and leaves the others alone."""
    weight, centroids = torch.randn(4, 30).to(device, dtype), spread(3, 2).to(device)
    spoiled = weight.clone()
    spoiled[3, 7] = torch.nan
    clean, dirty = (
        results(effkern.dkm, w, centroids, temperature=0.1, groups=2, backend="triton")
        for w in (weight, spoiled)
    )
    assert torch.equal(dirty["centroids"][0], clean["centroids"][0])
    assert dirty["centroids"][1].isnan().all()
    for name in ("clustered", "grad"):
        assert torch.equal(dirty[name][:2], clean[name][:2]) and dirty[name][2:].isnan().all()


def check_refusals(dtype: torch.dtype, device: str) -> None:
    weight = torch.randn(4, 8).to(device, dtype)
    call = partial(effkern.dkm, temperature=0.1, backend="triton")
    with pytest.raises(effkern.backends.Unavailable, match="single numbers, not vectors of dim 2"):
        call(weight, spread(4, dim=2).to(device), dim=2)
    with pytest.raises(effkern.backends.Unavailable, match="up to 16 clusters, not 17"):
        call(weight, spread(17).to(device))
    if device == "cpu":
        with pytest.raises(effkern.backends.Unavailable, match="triton kernels take float32 on cpu"):
            call(weight.bfloat16(), spread(4))
    out, _ = call(weight.requires_grad_(), spread(4).to(device))
    (grad,) = torch.autograd.grad(out.sum(), weight, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        grad.sum().backward()


def check_dispatcher(dtype: torch.dtype, device: str) -> None:
    """What the CPU op says of arguments that do not fit, and of a backward's that no forward has made."""
    op, backward = torch.ops.effkern.dkm_triton, torch.ops.effkern.dkm_triton_backward
    weight, start = torch.randn(4, 8).to(device, dtype), spread(3).reshape(1, 3, 1).to(device)
    for change, match in (
        (dict(centroids=start[0]), r"centroids must have shape \(1, clusters, 1\), got \(3, 1\)"),
        (dict(centroids=start.double()), "centroids is float64, expected float32"),
        (dict(centroids=start[:, :0]), "clusters of centroids must be between 1 and 256, got 0"),
        (dict(groups=3), "groups 3 does not divide the 4 rows of weight"),
        (dict(iterations=0), "iterations must be at least 1"),
        (dict(tolerance=-1.0), "tolerance must be finite"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=match):
            op(**{"weight": weight, "centroids": start, "temperature": 0.1, **change})
    out, *saved = op(weight, start, 0.1)
    with pytest.raises(RuntimeError, match=r"grad_out has shape \(8,\)"):
        backward(out[0], weight, *saved, 0.1)
    with pytest.raises(RuntimeError, match="not those of a forward"):
        backward(out, weight, saved[0][:, 1:], *saved[1:], 0.1)


def check_last_chunk(dtype: torch.dtype, device: str) -> None:
    """Of the largest group: where it would end if it were whole is beyond int32."""
    from triton_probes import share_kernel

    vectors, chunk = 2**31 - 1024, 2_034_000
    chunks = -(-vectors // chunk)
    assert chunks * chunk >= 2**31
    found = torch.zeros(2, dtype=torch.int64, device=device)
    share_kernel[(1,)](found, chunks - 1, chunks, chunk, vectors)
    assert found.tolist() == [(chunks - 1) * chunk, vectors]


EXTRA = {
    "last chunk": check_last_chunk,
    "chunks": check_chunks,
    "hard": check_hard,
    "settled": check_settled,
    "nan": check_nan,
    "refusals": check_refusals,
    "dispatcher": check_dispatcher,
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
def test_supports_names_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from effkern._triton import dkm as launcher

    cpu = torch.device("cpu")
    reason = launcher.supports(cpu, torch.float32, {})
    assert os.environ.get("TRITON_INTERPRET") == "1" or (reason is not None and "interpreter" in reason)
    monkeypatch.setattr(launcher, "_device_supports", lambda *request: None)
    assert launcher.supports(cpu, torch.float32, {"clusters": 16, "dim": 1, "vectors": 2**31 - 1024}) is None
    assert "2147483647" in str(launcher.supports(cpu, torch.float32, {"vectors": 2**31 - 1}))


if __name__ == "__main__":
    every = {name: partial(check_case, case, torch.float32, "cpu") for name, case in CASES.items()}
    report(every | {name: partial(case, torch.float32, "cpu") for name, case in EXTRA.items()})
