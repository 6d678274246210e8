"""Attention in parts: merging against one shot, rings, shared prefixes, and Lambda attention with two views."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attention_oracle import DTYPES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import effkern
from effkern.reference.attention_merge import attention_merge as reference
from effkern.testing import errors


def parts(
    count: int, shape: tuple[int, ...], dtype: torch.dtype, unseen: float
) -> tuple[list[Tensor], list[Tensor]]:
    outs = [torch.randn(shape).to(dtype) for _ in range(count)]
    lses = [3 * torch.randn(shape[:-1]) for _ in range(count)]
    for lse in lses:
        lse[torch.rand(lse.shape) < unseen] = -torch.inf
    return outs, lses


def differentiate(
    merge: Callable[..., tuple[Tensor, Tensor]], outs: list[Tensor], lses: list[Tensor]
) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (*outs, *lses)]
    out, lse = merge(leaves[: len(outs)], leaves[len(outs) :])
    torch.manual_seed(9)
    grads = torch.randn(out.shape).to(out.dtype), torch.randn(lse.shape).to(lse.dtype)
    finite = torch.where(lse.isfinite(), lse, 0.0)
    return [out, lse, *torch.autograd.grad((out, finite), leaves, grads)]


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unseen", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(2, 3, 50, 64), (300, 7), (1, 1), (4, 0, 8)], ids=str)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_against_oracle(
    count: int, shape: tuple[int, ...], unseen: float, dtype: torch.dtype, isa: str
) -> None:
    outs, lses = parts(count, shape, dtype, unseen)
    ours = differentiate(effkern.attention_merge, outs, lses)
    assert effkern.backends.last().startswith("attention_merge_backward:cpu/")
    exact = differentiate(reference, [o.double() for o in outs], [t.double() for t in lses])
    for i, (result, expected) in enumerate(zip(ours, exact, strict=True)):
        limit = 4 * torch.finfo(dtype).eps + 2e-6
        scale = (
            max(1.0, expected[expected.isfinite()].abs().max().item()) if expected.isfinite().any() else 1.0
        )
        # Gradients of lse hold differences of rounded outputs, summed over the last dimension.
        limit *= 1 if i < 2 + count else shape[-1] ** 0.5
        assert errors(result, expected, f"result {i}").max_abs <= limit * scale


def test_what_a_part_that_saw_nothing_holds_does_not_matter(isa: str) -> None:
    outs, lses = parts(2, (5, 8), torch.float32, 0.0)
    outs[1][:3], lses[1][:3] = torch.nan, -torch.inf
    out, lse, *grads = differentiate(effkern.attention_merge, outs, lses)
    assert torch.equal(out[:3], outs[0][:3]) and torch.equal(lse[:3], lses[0][:3])
    assert all(g.isfinite().all() for g in grads[:2])


def test_nan_stays_in_its_row(isa: str) -> None:
    outs, lses = parts(3, (6, 8), torch.float32, 0.0)
    outs[2][4, 3] = torch.nan
    out, _ = effkern.attention_merge(outs, lses)
    assert out.isnan().nonzero().tolist() == [[4, 3]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chunks", [1, 3, 4])
def test_ring(chunks: int, dtype: torch.dtype) -> None:
    """Keys in chunks that pass round a ring: outputs and gradients of one shot, causal chunks included."""
    q, k, v = (torch.randn(2, h, 60, 16, dtype=dtype).requires_grad_() for h in (4, 2, 2))
    grad = torch.randn(2, 4, 60, 16, dtype=dtype)
    whole = effkern.attention(q, k, v, causal=True)
    expected = torch.autograd.grad(whole, (q, k, v), grad)
    outs, lses = [], []
    for begin in range(0, 60, 60 // chunks):
        end = begin + 60 // chunks
        # Position i sees the keys of this chunk up to i: aligned to the top left of queries from `begin` on.
        out, lse = effkern.attention(
            q[:, :, begin:],
            k[:, :, begin:end],
            v[:, :, begin:end],
            causal=True,
            align="top_left",
            return_lse=True,
        )
        outs.append(torch.nn.functional.pad(out, (0, 0, begin, 0)))
        lses.append(torch.nn.functional.pad(lse, (begin, 0), value=-torch.inf))
    merged, _ = effkern.attention_merge(outs, lses)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(merged, whole, rtol=tolerance, atol=tolerance)
    for found, wanted in zip(torch.autograd.grad(merged, (q, k, v), grad), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=10 * tolerance)


def test_prefix_shared_by_a_batch() -> None:
    """A cascade: the prefix is attended once for all sequences, as one long list of queries, then each suffix."""
    batch, prefix, suffix = 3, 40, 12
    q, k, v = (torch.randn(batch, 4, suffix, 16) for _ in range(3))
    k_prefix, v_prefix = torch.randn(1, 4, prefix, 16), torch.randn(1, 4, prefix, 16)
    together = q.transpose(0, 1).flatten(1, 2)[None]  # (1, H, batch * suffix, D)
    out, lse = effkern.attention(together, k_prefix, v_prefix, return_lse=True)
    shared = (
        out[0].unflatten(1, (batch, suffix)).transpose(0, 1),
        lse[0].unflatten(1, (batch, suffix)).transpose(0, 1),
    )
    own = effkern.attention(q, k, v, causal=True, return_lse=True)
    merged, _ = effkern.attention_merge((shared[0], own[0]), (shared[1], own[1]))
    keys, values = (torch.cat([p.expand(batch, -1, -1, -1), t], 2) for p, t in ((k_prefix, k), (v_prefix, v)))
    torch.testing.assert_close(merged, effkern.attention(q, keys, values, causal=True))


def two_views(
    q: Tensor, k: Tensor, v: Tensor, q_sink: Tensor, k_sink: Tensor, sink: int, window: int
) -> Tensor:
    """Lambda attention by its definition, all scores at once."""
    group, (sq, sk) = q.shape[1] // k.shape[1], (q.shape[2], k.shape[2])
    k, v, k_sink = (t.repeat_interleave(group, 1) for t in (k, v, k_sink))
    distance = torch.arange(sq)[:, None] + sk - sq - torch.arange(sk)
    scale = q.shape[-1] ** -0.5
    near = (q @ k.mT * scale).masked_fill(~((distance >= 0) & (distance < window)), -torch.inf)
    far = (q_sink @ k_sink[:, :, :sink].mT * scale).masked_fill(~(distance[:, :sink] >= window), -torch.inf)
    scores = torch.cat([near, far], -1)
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    return weights @ torch.cat([v, v[:, :, :sink]], 2)


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_lambda_attention(data: st.DataObject, isa: str) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))
    sq, sk = draw(st.integers(1, 90)), draw(st.integers(1, 120))
    sink, window = draw(st.integers(0, min(sk, 20))), draw(st.integers(1, 60))
    q, k, v = torch.randn(2, 4, sq, 16), torch.randn(2, 2, sk, 16), torch.randn(2, 2, sk, 24)
    q_sink, k_sink = torch.randn(2, 4, sq, 16), torch.randn(2, 2, sink, 16)
    grad = torch.randn(2, 4, sq, 24)
    leaves = [t.requires_grad_() for t in (q, k, v, q_sink, k_sink)]
    out = effkern.lambda_attention(*leaves, sink=sink, window=window)
    ours = [out, *torch.autograd.grad(out, leaves, grad)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    expected = two_views(*wide, sink, window)
    exact = [expected, *torch.autograd.grad(expected, wide, grad.double(), materialize_grads=True)]
    for result, wanted in zip(ours, exact, strict=True):
        torch.testing.assert_close(result.double(), wanted, rtol=1e-4, atol=2e-5)


def test_lambda_attention_of_one_view_is_the_mask() -> None:
    q, k, v = torch.randn(1, 4, 80, 16), torch.randn(1, 2, 80, 16), torch.randn(1, 2, 80, 16)
    mask = effkern.masks.Lambda(6, 30)
    ours = effkern.lambda_attention(q, k, v, q, k[:, :, :6], sink=6, window=30)
    torch.testing.assert_close(ours, effkern.attention(q, k, v, mask=mask))


def test_lambda_attention_says_what_is_wrong() -> None:
    q = torch.randn(1, 2, 8, 4)
    for kwargs, match in (
        ({"sink": 9, "window": 2}, "sink must be between 0 and the 8 keys"),
        ({"sink": 1, "window": 0}, "window must be at least 1"),
    ):
        with pytest.raises(ValueError, match=match):
            effkern.lambda_attention(q, q, q, q, q, **kwargs)
    with pytest.raises(RuntimeError, match="k_sink has 1 rows, sink is 2"):
        effkern.lambda_attention(q, q, q, q, q[:, :, :1], sink=2, window=2)
