"""Attention where inputs are degenerate, huge, infinite or wrong: the right result or a clear error, never a crash."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import effkern
from effkern import _host, backends
from effkern.ops.attention import attention_bytes, attention_flops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
attention = effkern.attention


def offsets(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def qkv(
    device: str, *shape: int, keys: int | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    b, h, s, d = shape
    keys = s if keys is None else keys
    return tuple(torch.randn(b, h, n, d).to(device, dtype).requires_grad_() for n in (s, keys, keys))


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("queries", "keys", "count"), [(9, 4, 5), (300, 1, 299), (3, 0, 3), (1, 0, 1)])
def test_rows_without_keys(queries: int, keys: int, count: int, dtype: torch.dtype, route: Any) -> None:
    """The first `count` rows see none."""
    empty = slice(0, count)
    q, k, v = qkv(route.device, 2, 2, queries, 24, keys=keys, dtype=dtype)
    out, lse = attention(q, k, v, causal=True, return_lse=True)
    assert (out[:, :, empty] == 0).all()
    assert (lse[:, :, empty] == -torch.inf).all()
    assert out[:, :, count:].isfinite().all() and lse[:, :, count:].isfinite().all()
    grads = torch.autograd.grad((out, lse), (q, k, v), (torch.randn_like(out), torch.randn_like(lse)))
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][:, :, empty] == 0).all()


@pytest.mark.sanitize
@pytest.mark.parametrize(
    "shape", [(0, 2, 3, 8), (2, 0, 3, 8), (2, 2, 0, 8)], ids=["batch", "heads", "queries"]
)
def test_empty(shape: tuple[int, ...], route: Any) -> None:
    q, k, v = qkv(route.device, *shape, keys=5)
    out, lse = attention(q, k, v, return_lse=True)
    assert out.shape == q.shape and lse.shape == q.shape[:-1]
    grads = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))
    assert all((g == 0).all() for g in grads)


@pytest.mark.sanitize
def test_empty_packed(route: Any) -> None:
    for lengths in ((), (0,), (0, 0)):
        x = torch.empty(2, 0, 8, device=route.device)
        cu = offsets(*lengths).to(route.device)
        assert attention(x, x, x, cu_seqlens_q=cu, cu_seqlens_k=cu).shape == x.shape


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_bad_numbers_in_q_stay_in_their_rows(value: float, dtype: torch.dtype, route: Any) -> None:
    q, k, v = qkv(route.device, 1, 2, 70, 32, dtype=dtype)
    expected, expected_lse = attention(q, k, v, return_lse=True)
    q = q.detach().clone()
    q[0, 1, 33, 5] = value
    out, lse = attention(q, k, v, return_lse=True)
    clean = torch.ones(1, 2, 70, dtype=torch.bool)
    clean[0, 1, 33] = False
    assert torch.equal(out[clean], expected[clean]) and torch.equal(lse[clean], expected_lse[clean])
    assert not out[0, 1, 33].isfinite().any()


@pytest.mark.sanitize
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_numbers_in_k_stay_behind_the_causal_line(value: float, route: Any) -> None:
    q, k, v = qkv(route.device, 1, 2, 70, 32)
    expected = attention(q, k, v, causal=True)
    k = k.detach().clone()
    k[0, 1, 33] = value
    out = attention(q, k, v, causal=True)
    assert torch.equal(out[:, 0], expected[:, 0]) and torch.equal(out[:, 1, :33], expected[:, 1, :33])
    assert out[0, 1, 33:].isnan().any(-1).all() or value == math.inf


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.0, -1.5, 1e4, -1e4, 1e30])
def test_unusual_scales(scale: float, dtype: torch.dtype, route: Any) -> None:
    """Zero averages, negative turns the order around, huge ones pick the best key."""
    q, k, v = (t.detach() for t in qkv(route.device, 1, 2, 20, 32, dtype=dtype))
    out = attention(q, k, v, scale=scale)
    expected = attention(q.double(), k.double(), v.double(), scale=scale, backend="reference")
    torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores_do_not_overflow(dtype: torch.dtype, route: Any) -> None:
    q, k, v = qkv(route.device, 1, 1, 64, 64, dtype=dtype)
    with torch.no_grad():
        q *= 100
        k *= 100
    out, lse = attention(q, k, v, return_lse=True)
    assert out.isfinite().all() and lse.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.sanitize
@pytest.mark.plain_empty
def test_offsets_beyond_31_bits(route: Any) -> None:
    """Two batch entries 2^31 elements apart. The memory between is reserved, never touched."""
    if route.device != "cpu":
        pytest.skip("4 GiB of GPU memory would be real")
    room = torch.empty(2**31 + 4096, dtype=torch.bfloat16)
    x = room.as_strided((2, 1, 32, 16), (2**31, 512, 16, 1)).normal_()
    assert torch.equal(attention(x, x, x), attention(*[x.contiguous()] * 3))
    rows = room.as_strided((1, 1, 3, 16), (0, 0, 2**30, 1)).normal_()
    assert torch.equal(attention(rows, rows, rows), attention(*[rows.contiguous()] * 3))


def test_more_than_31_bits_of_elements_by_shape() -> None:
    q = torch.empty(1, 1, 1, 64, device="meta", dtype=torch.bfloat16).expand(64, 32, 2**20, 64)
    out, lse = attention(q, q[:, :8], q[:, :8], causal=True, return_lse=True)
    assert out.shape == q.shape and out.numel() > 2**31 and lse.shape == q.shape[:-1]
    assert attention_flops(q, q[:, :8], q[:, :8]) == 64 * 32 * 2**40 * 256
    assert attention_bytes(q, q, q) > 2**33


@pytest.mark.sanitize
def test_broadcast_inputs_read_no_copy(route: Any) -> None:
    """Keys shared by stride 0 over batch and heads."""
    q, k, v = qkv(route.device, 3, 4, 33, 16)
    k, v = (t[:1, :1].detach().expand(3, 4, -1, -1) for t in (k, v))
    assert torch.equal(attention(q, k, v), attention(q, k.contiguous(), v.contiguous()))


@pytest.mark.sanitize
@pytest.mark.parametrize("head_dim", [(257, 8), (8, 300)])
def test_wide_heads_take_the_reference(head_dim: tuple[int, int]) -> None:
    q, v = torch.randn(1, 1, 3, head_dim[0]), torch.randn(1, 1, 3, head_dim[1])
    attention(q, q, v)
    assert backends.last() == "attention:reference"
    with pytest.raises(backends.Unavailable, match=r"head dims go from 1 to 256.*would work: reference"):
        attention(q, q, v, backend="cpu")
    with pytest.raises(RuntimeError, match=r"has head dim \d+, expected 1 to 256"):
        torch.ops.effkern.attention(q, q, v)


@pytest.mark.sanitize
def test_the_op_itself_checks() -> None:
    """torch.ops users get the same errors, and none of these may crash."""
    x = torch.randn(2, 4, 6, 8)
    op, backward = torch.ops.effkern.attention, torch.ops.effkern.attention_backward
    bad: list[tuple[str, tuple[Any, ...]]] = [
        ("k has 3 heads, which does not divide q's 4", (x, x[:, :3], x[:, :3])),
        ("must be float32, bfloat16 or float16, got float64", (x.double(),) * 3),
        ("must have 4 dimensions", (x[0], x[0], x[0])),
        ("go together", (x[0], x[0], x[0], offsets(6))),
        ("must end at the number of tokens 6, got 9", (x[0], x[0], x[0], offsets(9), offsets(6))),
        ("scale must be finite", (x, x, x, None, None, math.nan)),
        ("k has head dim 4, q has 8", (x, x[..., :4], x)),
    ]
    for message, args in bad:
        with pytest.raises(RuntimeError, match=re.escape(message)):
            op(*args)
    out, lse = op(x, x, x)
    for wrong in (
        (out[:1], None, x, x, x, out, lse),
        (out, lse[..., :2], x, x, x, out, lse),
        (out, None, x, x, x, out, lse.double()),
        (out, None, x, x, x, out[..., :3], lse),
        (out.bfloat16(), None, x, x, x, out, lse),
    ):
        with pytest.raises(RuntimeError, match="attention_backward: "):
            backward(*wrong)


def test_unused_outputs_cost_no_gradient(route: Any) -> None:
    q, k, v = qkv(route.device, 1, 2, 20, 16)
    out, lse = attention(q, k, v, causal=True, return_lse=True)
    from_out = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
    from_lse = torch.autograd.grad(lse.sum(), (q, k, v), retain_graph=True)
    both = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))
    for a, b, c in zip(from_out, from_lse, both, strict=True):
        torch.testing.assert_close(a + b, c)
    assert (from_lse[2] == 0).all(), "lse does not depend on v"


def test_levels_are_forced_by_name() -> None:
    with pytest.raises(ValueError, match="sse9"):
        _host.isa_force("sse9")
    assert _host.isa_active() in _host.isa_levels()


def test_module(device: str) -> None:
    for kv_heads, causal in ((None, False), (2, True)):
        module = effkern.nn.Attention(48, 6, kv_heads, causal=causal, device=device)
        x = torch.randn(2, 17, 48, device=device, requires_grad=True)
        q, k, v = (
            t.unflatten(-1, (-1, 8)).transpose(1, 2)
            for t in module.qkv(x).split([48, *[8 * (kv_heads or 6)] * 2], -1)
        )
        expected = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=causal, enable_gqa=True
        )
        expected = module.proj(expected.transpose(1, 2).flatten(2))
        torch.testing.assert_close(module(x), expected)
        module(x).sum().backward()
        assert all(p.grad is not None for p in (x, *module.parameters()))
    assert "kv_heads=2" in repr(module)
    with pytest.raises(ValueError, match="does not divide"):
        effkern.nn.Attention(48, 6, 4)
    with pytest.raises(ValueError, match="does not divide embed_dim 50"):
        effkern.nn.Attention(50, 6)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    sq=st.integers(0, 60),
    sk=st.integers(0, 60),
    causal=st.booleans(),
    top_left=st.booleans(),
    tiles=st.tuples(st.integers(1, 20), st.integers(1, 20)),
)
def test_tile_plan_covers_what_is_visible(
    sq: int, sk: int, causal: bool, top_left: bool, tiles: tuple[int, int]
) -> None:
    """Visited tiles hold every visible pair, whole tiles hold nothing else, and no tile is visited in vain."""
    position = torch.arange(sq)[:, None] + (0 if top_left else sk - sq)
    visible = torch.ones(sq, sk, dtype=torch.bool) if not causal else torch.arange(sk) <= position
    plan = _host.attention_tile_plan(sq, sk, causal, top_left, *tiles)
    assert len(plan) == -(-sq // tiles[0])
    for row, visits in enumerate(plan):
        block = visible[row * tiles[0] : (row + 1) * tiles[0]].clone()
        for begin, end, partial in visits:
            assert 0 <= begin < end <= sk
            assert block[:, begin:end].any()
            assert partial or block[:, begin:end].all()
            block[:, begin:end] = False
        assert not block.any()


@pytest.mark.parametrize("sizes", [(5, 5), (3, 9), (9, 3), (1, 8), (0, 4), (4, 0)])
def test_flops_count_visible_pairs(sizes: tuple[int, int]) -> None:
    sq, sk = sizes
    q, k = torch.empty(2, 3, sq, 4), torch.empty(2, 3, sk, 4)
    for align in ("bottom_right", "top_left"):
        position = torch.arange(sq)[:, None] + (0 if align == "top_left" else sk - sq)
        pairs = int((torch.arange(sk) <= position).sum())
        assert attention_flops(q, k, k, causal=True, align=align) == 2 * 3 * pairs * 16
    assert attention_flops(q, k, k, backward=True) == 2 * 3 * sq * sk * 40
