"""The Triton kernels against the reference in float64: under the interpreter everywhere, on the GPU where there is one.

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
from effkern.reference import attention as reference
from effkern.testing import assert_close_to_oracle

# Shapes are (B, Hq, Hkv, Sq, Sk, D, Dv); tiles of the interpreter are 16 x 16.
CASES: dict[str, dict[str, Any]] = {
    "whole tiles": dict(shape=(1, 1, 1, 32, 48, 16, 16)),
    "ragged, odd D, Dv != D": dict(shape=(2, 2, 1, 21, 37, 7, 19)),
    "grouped heads": dict(shape=(2, 4, 2, 20, 33, 16, 16)),
    "causal": dict(shape=(1, 4, 1, 40, 40, 24, 16), causal=True),
    "causal, more keys": dict(shape=(1, 2, 2, 17, 50, 16, 8), causal=True),
    "causal, rows without keys": dict(shape=(1, 2, 1, 50, 19, 16, 16), causal=True),
    "causal, top left": dict(shape=(1, 2, 1, 19, 50, 16, 16), causal=True, align="top_left"),
    "causal, top left, more queries": dict(shape=(1, 2, 1, 50, 19, 12, 16), causal=True, align="top_left"),
    "one query": dict(shape=(1, 2, 1, 1, 35, 16, 16), causal=True),
    "no key": dict(shape=(1, 2, 1, 5, 0, 16, 16)),
    "no query": dict(shape=(1, 2, 1, 0, 5, 16, 16)),
    "negative scale": dict(shape=(1, 2, 1, 20, 20, 16, 16), scale=-0.4, causal=True),
    "scale 0": dict(shape=(1, 1, 1, 20, 20, 16, 16), scale=0.0),
    "heads last in memory": dict(shape=(2, 4, 2, 20, 33, 16, 16), layout="heads last"),
    "broadcast heads": dict(shape=(2, 4, 2, 20, 33, 16, 16), layout="broadcast"),
    "packed": dict(shape=(0, 2, 1, 0, 0, 16, 16), lengths=((20, 20), (0, 0), (3, 40), (33, 17))),
    "packed, causal, empty sides": dict(
        shape=(0, 4, 2, 0, 0, 16, 8), lengths=((0, 5), (18, 18), (7, 0), (16, 30), (20, 9)), causal=True
    ),
    "packed, causal, top left": dict(
        shape=(0, 2, 1, 0, 0, 16, 16), lengths=((5, 21), (30, 12)), causal=True, align="top_left"
    ),
}

# What real tiles need on top: several of them a side, every padded width, a share of work per multiprocessor.
DEVICE_CASES: dict[str, dict[str, Any]] = {
    "D 64": dict(shape=(2, 8, 2, 515, 640, 64, 64)),
    "D 64, causal": dict(shape=(2, 8, 2, 640, 640, 64, 64), causal=True),
    "D 128": dict(shape=(1, 8, 1, 512, 512, 128, 128)),
    "D 128, causal, ragged": dict(shape=(1, 8, 2, 333, 777, 128, 128), causal=True),
    "D 96, Dv 40": dict(shape=(1, 4, 2, 300, 257, 96, 40), causal=True),
    "D 256": dict(shape=(1, 2, 1, 257, 300, 256, 256), causal=True),
    "D 192, Dv 128, packed": dict(
        shape=(0, 4, 2, 0, 0, 192, 128), lengths=((300, 300), (0, 9), (1, 200), (129, 64)), causal=True
    ),
    "D 128, packed": dict(shape=(0, 8, 2, 0, 0, 128, 128), lengths=((512, 512), (130, 700), (64, 64))),
}

Results = dict[str, Tensor]


def build(
    shape: tuple[int, ...], layout: str, lengths: Any, dtype: torch.dtype, device: str
) -> tuple[list[Tensor], Any]:
    """q, k, v, the gradients of out and lse, and the cu_seqlens of a packed case."""
    b, hq, hkv, sq, sk, d, dv = shape
    packed = {}
    lead: tuple[int, ...] = (b,)
    if lengths is not None:
        lead = ()
        sq, sk = (sum(pair[side] for pair in lengths) for side in (0, 1))
        for side, name in enumerate(("cu_seqlens_q", "cu_seqlens_k")):
            ends = torch.tensor([0, *(pair[side] for pair in lengths)]).cumsum(0)
            packed[name] = ends.to(device, torch.int32)

    def random(h: int, s: int, d: int) -> Tensor:
        if layout == "heads last":
            return torch.randn(*lead, s, h, d).transpose(-3, -2)
        if layout == "broadcast":
            return torch.randn(*lead, 1, s, d).expand(*lead, h, s, d)
        return torch.randn(*lead, h, s, d)

    made = [random(hq, sq, d), random(hkv, sk, d), random(hkv, sk, dv), random(hq, sq, dv)]
    return [*(t.to(dtype).to(device) for t in made), torch.randn(*lead, hq, sq).to(device)], packed


def composition(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, align: str, scale: float | None, **packed: Tensor
) -> Any:
    """Attention as plain PyTorch in the dtype of the inputs."""
    if packed:
        edges = [packed[name].tolist() for name in ("cu_seqlens_q", "cu_seqlens_k")]
        parts = [
            composition(q[None, :, a:b], k[None, :, c:d], v[None, :, c:d], causal, align, scale)
            for a, b, c, d in zip(edges[0], edges[0][1:], edges[1], edges[1][1:])
        ]
        return torch.cat([out for out, _ in parts], 2)[0], torch.cat([lse for _, lse in parts], 2)[0]
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), 1) for x in (k, v))
    scores = q @ k.mT * (q.size(-1) ** -0.5 if scale is None else scale)
    if causal:
        position = torch.arange(q.size(2), device=q.device) + (
            k.size(2) - q.size(2) if align == "bottom_right" else 0
        )
        hidden = torch.arange(k.size(2), device=q.device) > position[:, None]
        scores = scores.masked_fill(hidden, -torch.inf)
    empty = (scores == -torch.inf).all(-1)
    scores = scores.masked_fill(empty[..., None], 0.0)
    out = torch.softmax(scores, -1).masked_fill(empty[..., None], 0.0) @ v
    return out, torch.logsumexp(scores.float(), -1).masked_fill(empty, -torch.inf)


def differentiate(
    attention: Any, q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, grad_lse: Tensor, **options: Any
) -> Results:
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    out, lse = attention(q, k, v, **options)
    grads = torch.autograd.grad(
        (out, lse),
        (q, k, v),
        (grad_out.to(out.dtype), torch.where(lse.isfinite(), grad_lse, 0.0).to(lse.dtype)),
        materialize_grads=True,
    )
    return dict(zip(("out", "lse", "grad_q", "grad_k", "grad_v"), (out, lse, *grads)))


def through_op(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    return effkern.attention(q, k, v, return_lse=True, backend="triton", **options)


def check(case: dict[str, Any], dtype: torch.dtype, device: str) -> None:
    """Outputs and every gradient against the oracle, and the path that ran; on the GPU twice, for equal bits."""
    torch.manual_seed(0)
    tensors, packed = build(case["shape"], case.get("layout", "plain"), case.get("lengths"), dtype, device)
    options = dict(
        causal=case.get("causal", False),
        align=case.get("align", "bottom_right"),
        scale=case.get("scale"),
        **packed,
    )
    with effkern.testing.nan_filled_empty():
        ours = differentiate(through_op, *tensors, **options)
        assert effkern.backends.last() == "attention_backward:triton", effkern.backends.last()
        again = differentiate(through_op, *tensors, **options) if device == "cuda" else ours
    baseline = differentiate(composition, *tensors, **options)
    oracle = differentiate(reference.attention, *(t.double() for t in tensors), **options)
    for name, value in ours.items():
        assert torch.equal(value, again[name]), f"{name} changed between two runs"
        assert_close_to_oracle(value, baseline[name], oracle[name], name)


def check_descriptors(dtype: torch.dtype, device: str) -> None:
    """Loads through descriptors (TMA on the GPU) and through pointers give the same bits, packed included: there a tile
    that runs into the next sequence, NaN here, must not see it."""
    from effkern._triton import attention as launcher

    for lengths, causal in (
        (None, False),
        (None, True),
        (((18, 20), (19, 20)), True),
        (((18, 20), (19, 20)), False),
    ):
        tensors, packed = build((1, 2, 1, 37, 40, 16, 16), "plain", lengths, dtype, device)
        q, k, v, grad_out, grad_lse = tensors
        if packed:
            for x, start in ((q, 18), (k, 20), (v, 20), (grad_out, 18)):
                x[:, start:] = torch.nan
        cu = packed.get("cu_seqlens_q"), packed.get("cu_seqlens_k")
        runs = []
        for use_descriptors in (False, True):
            out, lse = launcher.forward(q, k, v, *cu, 0.3, causal, False, use_descriptors=use_descriptors)
            grads = launcher.backward(
                grad_out,
                grad_lse,
                q,
                k,
                v,
                out,
                lse,
                *cu,
                0.3,
                causal,
                False,
                use_descriptors=use_descriptors,
            )
            runs.append((out, lse, *grads))
        for one, other in zip(*runs):
            assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
        if packed:
            starts = (18, 18, 18, 20, 20)
            assert all(x[:, :start].isfinite().all() for x, start in zip(runs[1], starts))


def check_nan_rows(dtype: torch.dtype, device: str) -> None:
    """A NaN query row makes its own row of out, lse and dQ NaN, and no other."""
    for causal in (False, True):
        tensors, _ = build((1, 2, 1, 40, 40, 16, 16), "plain", None, dtype, device)
        tensors[0][0, 1, 22] = torch.nan
        got = differentiate(through_op, *tensors, causal=causal)
        for name in ("out", "lse", "grad_q"):
            bad = got[name].isnan()
            bad = bad if bad.dim() == 3 else bad.any(-1)
            assert bad.nonzero().tolist() == [[0, 1, 22]], name


def check_large_offsets(dtype: torch.dtype, device: str) -> None:
    """Heads and rows that lie more than 2^31 elements apart. The memory between them is reserved, never touched."""
    far = 2**31 + 2**12
    room = torch.empty(far + 40 * 16 * 2, dtype=dtype, device=device)
    q = torch.randn(1, 2, 20, 16, device=device).to(dtype)
    k = room.as_strided((1, 2, 20, 16), (0, far, 16, 1))
    k.copy_(torch.randn(1, 2, 20, 16))
    out, lse = through_op(q, k, k)
    expected, expected_lse = through_op(q, k.contiguous(), k.contiguous())
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)


EXTRA = {"descriptors": check_descriptors, "NaN rows": check_nan_rows, "large offsets": check_large_offsets}


@needs_interpreter
@pytest.mark.parametrize("name", [*CASES, *EXTRA])
def test_interpreter(name: str, verdicts: dict[str, str]) -> None:
    settle(verdicts[name])


@pytest.mark.plain_empty
@needs_device
@every_dtype
@pytest.mark.parametrize("name", [*CASES, *DEVICE_CASES])
def test_device(name: str, dtype: torch.dtype) -> None:
    check({**CASES, **DEVICE_CASES}[name], dtype, "cuda")


@pytest.mark.plain_empty
@needs_device
@every_dtype
@pytest.mark.parametrize("name", EXTRA)
def test_device_extra(name: str, dtype: torch.dtype) -> None:
    EXTRA[name](dtype, "cuda")


@needs_triton
def test_supports_names_the_reason() -> None:
    from effkern._triton import attention as launcher

    reason = launcher.supports(torch.device("cpu"), torch.float32, {"head_dim": 64, "value_dim": 64})
    assert os.environ.get("TRITON_INTERPRET") == "1" or (reason is not None and "interpreter" in reason)
    if torch.cuda.is_available():
        assert (
            launcher.supports(torch.device("cuda"), torch.bfloat16, {"head_dim": 64, "value_dim": 64}) is None
        )
        assert "256" in str(
            launcher.supports(torch.device("cuda"), torch.bfloat16, {"head_dim": 257, "value_dim": 64})
        )
        assert "float64" in str(launcher.supports(torch.device("cuda"), torch.float64, {}))


if __name__ == "__main__":
    every = {name: partial(check, case, torch.float32, "cpu") for name, case in CASES.items()}
    report(every | {name: partial(case, torch.float32, "cpu") for name, case in EXTRA.items()})
