"""The Triton Monarch kernels against float64: under the interpreter everywhere, on the GPU where there is one.

The interpreted cases run in a process of their own (tests/interpreted.py), in fp32.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import pytest
import torch
from interpreted import every_dtype, needs_device, needs_interpreter, needs_triton, report, settle
from torch import Tensor

import effkern
from effkern.testing import assert_close_to_oracle

# Sizes are (k, q, p, l, s), r = k * q / l; tiles of the interpreter are 16 in every direction.
CASES: dict[str, dict[str, Any]] = {
    "whole tiles": dict(sizes=(4, 16, 16, 4, 16), tokens=32),
    "ragged": dict(sizes=(3, 12, 21, 3, 19), tokens=21),
    "more l than k": dict(sizes=(4, 24, 12, 12, 5), tokens=17),
    "more k than l": dict(sizes=(6, 4, 7, 2, 18), tokens=9),
    "l does not divide q": dict(sizes=(3, 10, 5, 6, 7), tokens=19),
    "q below l": dict(sizes=(6, 3, 4, 9, 4), tokens=5),
    "many rows an l block": dict(sizes=(2, 70, 18, 2, 8), tokens=5),
    "many rows, l does not divide q": dict(sizes=(4, 33, 40, 3, 9), tokens=5),
    "p of 1": dict(sizes=(2, 3, 1, 3, 2), tokens=7),
    "one block": dict(sizes=(1, 5, 20, 1, 3), tokens=33),
    "all of 1": dict(sizes=(1, 1, 1, 1, 1), tokens=1),
    "one token": dict(sizes=(4, 8, 16, 4, 8), tokens=1),
    "no token": dict(sizes=(4, 8, 16, 4, 8), tokens=0),
    "nothing in between": dict(sizes=(2, 0, 3, 2, 4), tokens=5),
    "rows apart": dict(sizes=(4, 8, 6, 4, 9), tokens=18, layout="rows apart"),
    "columns apart": dict(sizes=(4, 8, 6, 4, 9), tokens=18, layout="columns apart"),
    "one row for all": dict(sizes=(4, 8, 6, 4, 9), tokens=18, layout="expanded"),
    "weights transposed": dict(sizes=(4, 8, 6, 4, 9), tokens=18, layout="weights"),
}

# What real tiles need on top: several of them each way, several chunks and spans of tokens.
DEVICE_CASES: dict[str, dict[str, Any]] = {
    "d 1024, 8 blocks": dict(sizes=(8, 128, 128, 8, 128), tokens=2050),
    "d 2048, 8 blocks": dict(sizes=(8, 256, 256, 8, 256), tokens=8192),
    "d 4096, 16 blocks": dict(sizes=(16, 256, 256, 16, 256), tokens=9000),
    "d 4096, 16 tokens": dict(sizes=(16, 256, 256, 16, 256), tokens=16),
    "768 to 384": dict(sizes=(8, 192, 96, 24, 16), tokens=777),
    "wide blocks": dict(sizes=(2, 520, 700, 2, 530), tokens=300),
}

Results = dict[str, Tensor]


def build(
    sizes: tuple[int, ...], tokens: int, layout: str, dtype: torch.dtype, device: str
) -> tuple[Tensor, ...]:
    """x, w1, w2, bias and the gradient of the output, the last two in the order of the output."""
    k, q, p, l, s = sizes
    r = k * q // l
    x = torch.randn(tokens, k * p)
    if layout == "rows apart":
        x = torch.randn(tokens, 2 * k * p)[:, : k * p]
    elif layout == "columns apart":
        x = torch.randn(k * p, tokens).t()
    elif layout == "expanded":
        x = torch.randn(1, k * p).expand(tokens, -1)
    w1, w2 = torch.randn(k, q, p) * p**-0.5, torch.randn(l, s, r) * max(r, 1) ** -0.5
    if layout == "weights":
        w1, w2 = (w.mT.contiguous().mT for w in (w1, w2))
    made = (x, w1, w2, torch.randn(l * s), torch.randn(tokens, l * s))
    # Moved as memory, not as numbers: the layout is part of the case.
    return tuple(t.to(device=device, dtype=dtype, memory_format=torch.preserve_format) for t in made)


def composition(x: Tensor, w1: Tensor, w2: Tensor, bias: Tensor | None, l_major: bool) -> Tensor:
    """The two factors as batched products in the dtype of the inputs."""
    k, _, p = w1.shape
    l, s, r = w2.shape
    rows = x.reshape(-1, k, p).transpose(0, 1)  # (k, tokens, p)
    mid = (rows @ w1.mT).transpose(0, 1).reshape(rows.size(1), r, l)
    blocks = mid.permute(2, 0, 1) @ w2.mT  # (l, tokens, s)
    out = blocks.permute(*((1, 0, 2) if l_major else (1, 2, 0))).reshape(*x.shape[:-1], l * s)
    return out if bias is None else out + bias


def differentiate(tensors: tuple[Tensor, ...], l_major: bool) -> Results:
    inputs = [t.detach().requires_grad_() for t in tensors[:4]]
    x, w1, w2, bias = inputs
    out = composition(x, w1, w2, bias, l_major)
    grads = torch.autograd.grad(out, inputs, tensors[4], materialize_grads=True)
    return dict(zip(("fused", "staged", "grad_x", "grad_w1", "grad_w2", "grad_bias"), (out, out, *grads)))


def launch(tensors: tuple[Tensor, ...], l_major: bool) -> Results:
    """Both ways forward, and the backward."""
    from effkern._triton import monarch as launcher

    x, w1, w2, bias, grad_out = tensors
    outs = [launcher.monarch_matmul(x, w1, w2, bias, l_major, fused=fused) for fused in (True, False)]
    grads = launcher.monarch_matmul_backward(grad_out, x, w1, w2, l_major, need_bias=True)
    return dict(zip(("fused", "staged", "grad_x", "grad_w1", "grad_w2", "grad_bias"), (*outs, *grads)))


def check(case: dict[str, Any], dtype: torch.dtype, device: str) -> None:
    """Outputs of both ways and every gradient against the oracle; on the GPU twice, for equal bits."""
    torch.manual_seed(0)
    tensors = build(case["sizes"], case["tokens"], case.get("layout", "plain"), dtype, device)
    for l_major in (False, True):
        baseline = differentiate(tensors, l_major)
        oracle = differentiate(tuple(t.double() for t in tensors), l_major)
        with effkern.testing.nan_filled_empty():
            ours = launch(tensors, l_major)
            again = launch(tensors, l_major) if device == "cuda" else ours
        for name, value in ours.items():
            assert value.dtype == dtype
            assert torch.equal(value, again[name]), f"{name} changed between two runs"
            assert_close_to_oracle(value, baseline[name], oracle[name], f"{name}, l_major {l_major}")


def check_needs(dtype: torch.dtype, device: str) -> None:
    """A gradient that is not needed is empty, and the others do not depend on it."""
    from effkern._triton import monarch as launcher

    x, w1, w2, _, grad_out = build((2, 4, 6, 2, 9), 18, "plain", dtype, device)
    whole = launcher.monarch_matmul_backward(grad_out, x, w1, w2, need_bias=True)
    for bits in (0, 1, 2, 4, 6, 8, 13):
        needs = [bool(bits >> i & 1) for i in range(4)]
        for tokens in (18, 0):
            part = launcher.monarch_matmul_backward(
                grad_out[:tokens], x[:tokens], w1, w2, False, needs[0], needs[1], needs[2], needs[3]
            )
            for grad, full, need in zip(part, whole, needs):
                if not need:
                    assert grad.shape == (0,) and grad.dtype == dtype
                elif tokens:
                    assert torch.equal(grad, full)
                else:
                    assert grad.shape[1:] == full.shape[1:] and not grad.any()


def check_chunks(dtype: torch.dtype, device: str) -> None:
    """Chunks and spans of tokens: an output row is the same whatever the chunk it falls in, gradients add up."""
    from effkern._triton import monarch as launcher

    names = {"_STAGED_BYTES": 0, "_BACKWARD_BYTES": 0, "_LEAST_TOKENS": 128, "_LEAST_SPAN": 48}
    before = {name: getattr(launcher, name) for name in names}
    # Chunks of 128, 128 and 14 tokens, of two spans each; the second span of the last is empty.
    tensors = build((2, 4, 3, 2, 3), 270, "plain", dtype, device)
    whole = launch(tensors, False)
    try:
        vars(launcher).update(names)
        parts = launch(tensors, False)
    finally:
        vars(launcher).update(before)
    baseline = differentiate(tensors, False)
    oracle = differentiate(tuple(t.double() for t in tensors), False)
    for name in whole:
        assert_close_to_oracle(parts[name], baseline[name], oracle[name], f"{name}, in chunks")
        assert_close_to_oracle(whole[name], baseline[name], oracle[name], name)
    assert torch.equal(parts["staged"], whole["staged"]) and torch.equal(parts["grad_x"], whole["grad_x"])


def check_shapes(dtype: torch.dtype, device: str) -> None:
    """Leading dimensions are kept, none at all included; a NaN token spoils its own row only."""
    from effkern._triton import monarch as launcher

    x, w1, w2, bias, _ = build((2, 4, 6, 2, 9), 20, "plain", dtype, device)
    for fused in (None, True, False):
        expected = launcher.monarch_matmul(x, w1, w2, bias, fused=fused)
        assert torch.equal(
            launcher.monarch_matmul(x.view(2, 10, -1), w1, w2, bias, fused=fused), expected.view(2, 10, -1)
        )
        assert launcher.monarch_matmul(x[3], w1, w2, fused=fused).shape == (18,)
        spoiled = x.clone()
        spoiled[7, 5] = torch.nan
        out = launcher.monarch_matmul(spoiled, w1, w2, bias, fused=fused)
        assert out.isnan().any(1).nonzero().flatten().tolist() == [7]


def check_real_tiles(dtype: torch.dtype, device: str) -> None:
    """The tiles of 16-bit numbers on 9.0, whose padding is larger and whose groups of l blocks are, in fp32."""
    from effkern._triton import monarch as launcher

    patched: dict[str, Any] = {
        "architecture": lambda device: 90,
        "precision": lambda arch, dtype: "ieee",
        "_TABLE": {key: {4: tiles[2]} for key, tiles in launcher._TABLE.items()},
    }
    before, group = {name: getattr(launcher, name) for name in patched}, launcher._Problem.group
    try:
        vars(launcher).update(patched)
        launcher._Problem.group = lambda problem: 8
        for sizes in ((3, 50, 40, 6, 33), (2, 80, 270, 10, 70)):
            check(dict(sizes=sizes, tokens=70), dtype, device)
    finally:
        vars(launcher).update(before)
        launcher._Problem.group = group


EXTRA = {"needs": check_needs, "chunks": check_chunks, "shapes": check_shapes}
INTERPRETED = {**EXTRA, "real tiles": check_real_tiles}


@needs_interpreter
@pytest.mark.parametrize("name", [*CASES, *INTERPRETED])
def test_interpreter(name: str, verdicts: dict[str, str]) -> None:
    settle(verdicts[name])


@needs_device
@every_dtype
@pytest.mark.parametrize("name", [*CASES, *DEVICE_CASES])
def test_device(name: str, dtype: torch.dtype) -> None:
    check({**CASES, **DEVICE_CASES}[name], dtype, "cuda")


@needs_device
@every_dtype
@pytest.mark.parametrize("name", EXTRA)
def test_device_extra(name: str, dtype: torch.dtype) -> None:
    EXTRA[name](dtype, "cuda")


@needs_triton
def test_supports_names_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from effkern._triton import monarch as launcher

    reason = launcher.supports(torch.device("cpu"), torch.float32, {})
    assert os.environ.get("TRITON_INTERPRET") == "1" or (reason is not None and "interpreter" in reason)
    monkeypatch.setattr(launcher, "_device_supports", lambda *request: None)
    cpu = torch.device("cpu")
    assert launcher.supports(cpu, torch.float32, {"k": 4, "q": 8, "p": 8}) is None
    assert "2^31" in str(launcher.supports(cpu, torch.float32, {"q": 1 << 16, "p": 1 << 16}))
    assert "2^31" in str(launcher.supports(cpu, torch.float32, {"l": 1 << 20, "s": 1 << 11}))


@needs_triton
def test_way_forward_follows_the_traffic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens, or few l blocks, take the fused kernel; many of both go through the middle in memory."""
    from effkern._triton import monarch as launcher

    monkeypatch.setattr(launcher, "architecture", lambda device: 90)

    def fused(tokens: int, nblocks: int, width: int, l_major: bool = False) -> bool:
        x = torch.empty(1, nblocks * width, dtype=torch.bfloat16).expand(tokens, -1)
        w = torch.empty(nblocks, width, width, dtype=torch.bfloat16)
        return launcher._Problem(x, w, w).fused_moves_less(l_major)

    assert fused(16, 16, 256) and fused(16, 8, 256) and fused(256, 8, 128)
    assert fused(8192, 2, 128, True)
    assert not fused(8192, 8, 256) and not fused(8192, 16, 256)


if __name__ == "__main__":
    every = {name: partial(check, case, torch.float32, "cpu") for name, case in CASES.items()}
    report(every | {name: partial(case, torch.float32, "cpu") for name, case in INTERPRETED.items()})
