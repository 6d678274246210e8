"""Calls of long_conv that must work and calls that must fail, for the contract tests and the self-test."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effkern.ops.registry import BadSample, Sample


def samples(device: str, dtype: torch.dtype) -> list[Sample]:
    def make(*shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(sum(shape))
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    u = make(2, 3, 100)
    gates = {"pre_gate": make(2, 3, 100), "post_gate": make(2, 3, 100).cos()}
    later = {"pre_gate": make(2, 4, 9), "post_gate": make(2, 4, 9).cos()}
    return [
        Sample("skip", (u, make(3, 100)), {"skip": make(3)}),
        Sample("gates", (u, make(3, 100)), {"skip": make(3), **gates}),
        Sample("both directions", (make(2, 3, 61), make(3, 2, 61)), {"causal": False}),
        Sample("few taps", (make(1, 2, 300), make(2, 5)), {"return_state": True}),
        Sample("prime length", (make(2, 5, 1009), make(5, 997))),
        Sample("first of a stream", (make(2, 4, 9), make(4, 31)), {"return_state": True}),
        Sample(
            "later in a stream",
            (make(2, 4, 9), make(4, 31)),
            {"skip": make(4), "state": make(2, 4, 30), "return_state": True, **later},
        ),
        Sample("one step", (make(2, 4, 1), make(4, 31)), {"state": make(2, 4, 30), "return_state": True}),
        Sample("no batch", (make(0, 3, 20), make(3, 20)), {"skip": make(3)}),
        Sample("no positions", (make(2, 3, 0), make(3, 20))),
    ]


def calls(sample: Sample) -> list[tuple[str, tuple[Any, ...]]]:
    """The same call at the dispatcher: forward, with a spectrum, backward in full and for few gradients."""
    u, k = sample.args
    skip, pre_gate, post_gate, state = (
        sample.kwargs.get(name) for name in ("skip", "pre_gate", "post_gate", "state")
    )
    causal, history = sample.kwargs.get("causal", True), 0
    if state is not None:
        u, pre_gate, history = torch.cat([state, u], 2), None, state.shape[2]
    rest = (skip, pre_gate, post_gate, history, causal)
    length = max(u.shape[2], k.shape[-1])
    with torch.no_grad():
        grad = torch.cos(torch.ops.effkern.long_conv(u, k, None, *rest))
        spectrum = torch.ops.effkern.long_conv_spectrum(k, length, causal)
    return [
        ("long_conv", (u, k, None, *rest)),
        ("long_conv", (u, k, spectrum, *rest)),
        ("long_conv_backward", (grad, u, k, None, *rest)),
        ("long_conv_backward", (grad, u, k, spectrum, *rest)),
        ("long_conv_backward", (grad, u, k, None, *rest, False, True, False, False, False)),
    ]


def bad_samples(device: str) -> list[BadSample]:
    def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.ones(shape, device=device, dtype=dtype)

    def bad(
        name: str, match: str, *args: Any, error: type[Exception] = RuntimeError, **kwargs: Any
    ) -> BadSample:
        return BadSample(name, args, kwargs, error, match)

    u, k = ones(2, 3, 16), ones(3, 16)
    return [
        bad("kernel longer than u", "k has 17 taps, u only 16 positions", u, ones(3, 17)),
        bad("leading dimension of k", r"k must have shape \(3, Lk\).*got \(1, 3, 16\)", u, ones(1, 3, 16)),
        bad("channels of k", r"k must have shape \(3, Lk\).*got \(4, 16\)", u, ones(4, 16)),
        bad(
            "causal with two directions",
            r"k must have shape \(3, Lk\).*got \(3, 2, 16\)",
            u,
            ones(3, 2, 16),
        ),
        bad("one direction", r"k must have shape \(3, 2, Lk\).*got \(3, 16\)", u, k, causal=False),
        bad("no taps", "k has no taps", u, ones(3, 0)),
        bad("u of two dimensions", r"u must have shape \(B, H, L\), got \(3, 16\)", ones(3, 16), k),
        bad(
            "shape of skip", r"skip has shape \(4,\), which does not fit u's \(2, 3, 16\)", u, k, skip=ones(4)
        ),
        bad(
            "shape of pre_gate",
            r"pre_gate has shape \(2, 3, 15\), which does not fit",
            u,
            k,
            pre_gate=ones(2, 3, 15),
        ),
        bad(
            "shape of post_gate",
            r"post_gate has shape \(3, 16\), which does not fit",
            u,
            k,
            post_gate=ones(3, 16),
        ),
        bad(
            "shape of state",
            r"state has shape \(2, 3, 16\), which does not fit.*\(2, 3, 15\)",
            u,
            k,
            state=ones(2, 3, 16),
        ),
        bad(
            "dtype of a gate",
            "post_gate must have u's dtype",
            u,
            k,
            post_gate=ones(2, 3, 16).bfloat16(),
        ),
        bad(
            "dtype of state",
            "state must have u's dtype, got float16 beside float32",
            u,
            k,
            state=ones(2, 3, 15).half(),
        ),
        bad("dtype of k", "k must have u's dtype or float32", u.bfloat16(), k.half()),
        bad("dtype of skip", "skip must have u's dtype or float32", u, k, skip=ones(3).half()),
        bad("integers", "u must be float32, bfloat16 or float16", u.long(), k.long()),
        bad("complex", "u must be float32, bfloat16 or float16", u.to(torch.complex64), k),
        bad(
            "state in both directions",
            "for causal=True",
            u,
            ones(3, 2, 16),
            causal=False,
            return_state=True,
            error=ValueError,
        ),
        bad("not a tensor", "k must be a tensor", u, [1.0], error=TypeError),
        bad(
            "gate that is no tensor",
            "pre_gate must be a tensor, got float",
            u,
            k,
            pre_gate=1.0,
            error=TypeError,
        ),
        bad("backend", "backend 'gpu' is unknown", u, k, error=ValueError, backend="gpu"),
    ]
