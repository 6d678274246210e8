"""Attention in parts: merging results over disjoint keys, and Lambda attention, which is such a merge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effkern import backends
from effkern.masks import UNBOUNDED
from effkern.ops import registry
from effkern.ops._attention_checks import check_arguments
from effkern.ops._attention_merge_samples import bad_samples, calls, samples
from effkern.ops._dispatch import (
    FAST_DTYPES,
    dtype_name,
    refuse_all_but_fast,
    refuse_all_but_floating,
    refuse_forward_mode,
    register_flops,
    register_kernel,
)
from effkern.ops.attention import attention_in_band
from effkern.reference import attention_merge as reference

__all__ = ["attention_merge", "lambda_attention", "merge_bytes", "merge_flops"]

_OPS = torch.ops.effkern
DOUBLE_BACKWARD = "attention_merge: second derivatives are only available with backend='reference'"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(f"attention_merge: {message}")


def _check(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    """What csrc/attention_merge/cpu.cpp checks, for every other path."""
    _require(len(outs) > 0, "outs is empty, expected at least one part")
    _require(len(outs) == len(lses), f"there are {len(outs)} outs and {len(lses)} lses")
    first = outs[0]
    allowed = (*FAST_DTYPES, torch.float64)
    _require(first.dtype in allowed, "outs must be float32, bfloat16 or float16")
    _require(first.dim() >= 1, "outs must have at least one dimension")
    level = torch.float64 if first.dtype == torch.float64 else torch.float32
    for k, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        _require(
            out.shape == first.shape,
            f"outs[{k}] has shape {tuple(out.shape)}, outs[0] has {tuple(first.shape)}",
        )
        _require(
            lse.shape == first.shape[:-1],
            f"lses[{k}] has shape {tuple(lse.shape)}, expected that of outs without the last dimension",
        )
        _require(out.dtype == first.dtype, f"outs[{k}] has another dtype than outs[0]")
        _require(lse.dtype == level, f"lses[{k}] must be {dtype_name(level)}")
        same = out.device == first.device and lse.device == first.device
        _require(same, f"part {k} is on another device")


def merge_flops(outs: Sequence[Tensor], lses: Sequence[Tensor], *, backward: bool = False, **_: Any) -> int:
    """A multiplication and an addition for every number of every part; twice that backward."""
    return len(outs) * outs[0].numel() * (4 if backward else 2)


def merge_bytes(outs: Sequence[Tensor], lses: Sequence[Tensor], *, backward: bool = False, **_: Any) -> int:
    """Every part once, and the result; backward also writes the gradient of every part."""
    part = outs[0].nbytes + lses[0].nbytes
    return part * ((2 if backward else 1) * len(outs) + (2 if backward else 1))


def attention_merge(
    outs: Sequence[Tensor], lses: Sequence[Tensor], *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Merges attention over disjoint sets of keys into attention over all of them.

        lse = log(sum_k exp(lse_k))          out = sum_k exp(lse_k - lse) out_k

    So a long sequence can be attended in pieces: a prefix shared by a batch, the chunks that pass round a ring, the two
    views of Lambda attention. Each piece comes from `effkern.attention(..., return_lse=True)`.

    Args:
        outs: K tensors (..., Dv) of one shape: the results over each set of keys. float32, bfloat16 or float16;
            float64 through the reference. Any strides.
        lses: K tensors (...), float32: their log-sum-exps, natural logarithm. -inf where a part saw no key.
        backend: "cpu" or "reference"; None leaves the choice to `effkern.backends`.

    Returns:
        out (..., Dv) in the dtype of the parts, and lse (...) in float32, both contiguous and differentiable. A part
        with lse -inf counts for nothing, whatever its output holds, and gets zero gradients; a row that no part saw
        gives 0 and -inf.

    Raises:
        RuntimeError: no part, unequal numbers, shapes, dtypes or devices; the message names the part.
        effkern.backends.Unavailable: the backend asked for cannot run.
        NotImplementedError: differentiated twice or in forward mode, on any backend but the reference. Under torch.vmap
            only the reference works.

    Numerics:
        Weights and sums in float32, rounded once. Deterministic. NaN in a part stays in its rows. Autocast changes
        nothing.

    Cost:
        `merge_flops`, `merge_bytes`: one pass over memory each way.

    Source:
        Rabe and Staats 2021 (Self-attention does not need O(n^2) memory), section 2; Liu et al. 2023 (Ring attention).
    """
    outs, lses = list(outs), list(lses)
    if not all(isinstance(t, Tensor) for t in (*outs, *lses)):
        raise TypeError("attention_merge: outs and lses must be sequences of tensors")
    name = backends.forced() if backend is None else backend
    if name is not None:
        backends.check_name(name)
    if not outs or not lses:
        _check(outs, lses)
    device, dtype = outs[0].device.type, outs[0].dtype
    if name is None:
        usable = dtype in FAST_DTYPES and device in ("cpu", "cuda", "meta")
    else:
        usable = name != "reference"
        if usable:
            backends.select("attention_merge", device, dtype, {}, name)
    if usable:
        refuse_forward_mode("attention_merge", *outs, *lses)
        out, lse = _OPS.attention_merge(outs, lses)
        return out, lse
    _check(outs, lses)
    backends.record("attention_merge:reference")
    return reference.attention_merge(outs, lses)


def lambda_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_sink: Tensor,
    k_sink: Tensor,
    *,
    sink: int,
    window: int,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Lambda attention with two views of the positions: the last keys with their own, the first ones from afar.

        local: 0 <= p - j < window with q and k          sinks: j < sink and p - j >= window with q_sink and k_sink

    The two sets of keys are disjoint; each is attended in its own view, and the results are merged. For LM-Infinite, q
    and k carry ordinary rotary positions, q_sink is q rotated to the constant position `window`, and k_sink holds the
    first keys unrotated. Causal, p = i + Sk - Sq.

    Args:
        q: (B, Hq, Sq, D), as in `effkern.attention`.
        k: (B, Hkv, Sk, D).
        v: (B, Hkv, Sk, Dv): the values of both views.
        q_sink: (B, Hq, Sq, D), the queries as the sinks see them.
        k_sink: (B, Hkv, sink, D), or the first rows of a longer tensor: the sinks as the queries see them.
        sink: how many keys at the start stay visible, from 0 to Sk.
        window: how many keys up to and with its own position a query sees, at least 1.
        scale: as in `effkern.attention`.
        backend: as in `effkern.attention`.

    Returns:
        out (B, Hq, Sq, Dv) in q's dtype, differentiable in all five tensors. A query that sees no key gives 0.

    Raises:
        ValueError: sink or window is out of its range.
        RuntimeError: as `effkern.attention`; k_sink has fewer than `sink` rows.
        effkern.backends.Unavailable: the backend asked for cannot run.

    Numerics:
        Those of `effkern.attention` and `effkern.attention_merge`.

    Cost:
        2 (D + Dv) a visible pair forward, 2 (3 D + 2 Dv) backward: at most Sq * (window + sink) pairs a head.

    Source:
        Han et al. 2023 (LM-Infinite), section 4.2.
    """
    if window < 1:
        raise ValueError(f"lambda_attention: window must be at least 1, got {window}")
    sk, sq = k.shape[-2], q.shape[-2]
    if not 0 <= sink <= sk:
        raise ValueError(f"lambda_attention: sink must be between 0 and the {sk} keys, got {sink}")
    if k_sink.shape[-2] < sink:
        raise RuntimeError(f"lambda_attention: k_sink has {k_sink.shape[-2]} rows, sink is {sink}")
    check_arguments(q, k, v, None, None, scale)
    local = attention_in_band(q, k, v, (window - 1, 0, 0), False, scale, backend)
    # The sinks alone, counted from the top left: j <= i + (Sk - Sq) - window.
    far = (UNBOUNDED, sk - sq - window, 0)
    distant = attention_in_band(q_sink, k_sink[:, :, :sink], v[:, :, :sink], far, True, scale, backend)
    backend = backend if backend in (None, "cpu", "reference") else None
    return attention_merge((local[0], distant[0]), (local[1], distant[1]), backend=backend)[0]


def _fake_forward(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    _check(outs, lses)
    return outs[0].new_empty(outs[0].shape), lses[0].new_empty(lses[0].shape)


def _fake_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    outs: list[Tensor],
    lses: list[Tensor],
    out: Tensor,
    lse: Tensor,
) -> tuple[list[Tensor], list[Tensor]]:
    return [t.new_empty(t.shape) for t in outs], [t.new_empty(t.shape) for t in lses]


def _composed_forward(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The key CUDA: a handful of PyTorch kernels."""
    _check(outs, lses)
    backends.record("attention_merge:reference")
    return reference.attention_merge(outs, lses)


def _composed_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    outs: list[Tensor],
    lses: list[Tensor],
    out: Tensor,
    lse: Tensor,
) -> tuple[list[Tensor], list[Tensor]]:
    backends.record("attention_merge_backward:reference")
    grad_outs, grad_lses = [], []
    level = lse.masked_fill(lse == -torch.inf, 0.0)
    for part, part_lse in zip(outs, lses, strict=True):
        unseen = part_lse == -torch.inf
        share = (part_lse - level).exp()
        grad_outs.append((grad_out * share[..., None]).masked_fill(unseen[..., None], 0.0).to(part.dtype))
        slope = (grad_out.float() * (part.float() - out.float())).sum(-1)
        if grad_lse is not None:
            slope = slope + grad_lse
        grad_lses.append((share * slope).masked_fill(unseen, 0.0))
    return grad_outs, grad_lses


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    outs, lses = inputs
    ctx.set_materialize_grads(False)
    ctx.parts = len(outs)
    ctx.save_for_backward(*outs, *lses, *output)


def _gradient(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, Any]:
    *parts, out, lse = ctx.saved_tensors
    outs, lses = parts[: ctx.parts], parts[ctx.parts :]
    if grad_out is None and grad_lse is None:
        return [None] * ctx.parts, [None] * ctx.parts
    if grad_out is None:  # only lse was used
        grad_out = torch.zeros_like(out)
    return _OPS.attention_merge_backward(grad_out, grad_lse, outs, lses, out, lse)


def _refuse(ctx: Any, *grads: Any) -> Any:
    raise NotImplementedError(DOUBLE_BACKWARD)


torch.library.register_fake("effkern::attention_merge", _fake_forward)
torch.library.register_fake("effkern::attention_merge_backward", _fake_backward)
torch.library.register_autograd("effkern::attention_merge", _gradient, setup_context=_setup_context)
torch.library.register_autograd("effkern::attention_merge_backward", _refuse)
register_kernel("attention_merge", _composed_forward, "CUDA")
register_kernel("attention_merge_backward", _composed_backward, "CUDA")
register_flops("attention_merge", lambda outs, lses, **_: merge_flops(outs, lses))
register_flops(
    "attention_merge_backward", lambda g, gl, outs, lses, *_, **__: merge_flops(outs, lses, backward=True)
)

registry.register(
    registry.OpSpec(
        name="attention_merge",
        family="attention",
        public=attention_merge,
        reference=reference.attention_merge,
        schemas=("attention_merge", "attention_merge_backward"),
        backends=(
            registry.Backend("cpu", ("cpu",), refuse_all_but_fast),
            registry.Backend("reference", (), refuse_all_but_floating, note="plain PyTorch"),
        ),
        dtypes=(*FAST_DTYPES, torch.float64),
        sizes={},
        samples=samples,
        bad_samples=bad_samples,
        calls=calls,
        flops=merge_flops,
        bytes=merge_bytes,
        double_backward=DOUBLE_BACKWARD,
        autocast=False,
        vmap=False,
    )
)
