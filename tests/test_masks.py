"""Masks against their definitions written as loops, against each other, and through the reference and the compiler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import effkern
from effkern import masks
from effkern.masks import BlockSparse, Dense, Document, Lambda, Mask, ShiftedGroups, SlidingWindow
from effkern.ops.attention import attention_flops
from effkern.reference import attention as reference
from effkern.reference._attention_scores import positions, visible

Rule = Callable[[int, int, int, int, int], bool]  # (batch, head, i, p, j) -> visible
HEADS, BATCH = 3, 2
several = settings(deadline=None, derandomize=True, max_examples=60)
sizes = st.tuples(st.integers(0, 40), st.integers(0, 40))
aligns = st.sampled_from(["bottom_right", "top_left"])


def random_bool(draw: Any, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 100)))
    return torch.rand(shape, generator=generator) < draw(st.sampled_from([0.2, 0.7, 1.0]))


@st.composite
def simple(draw: Any, sq: int, sk: int) -> tuple[Mask, Rule]:
    """A mask of one kind and its definition, straight from the docstring."""
    kind = draw(st.sampled_from(["window", "lambda", "groups", "blocks", "document", "dense"]))
    b, h = draw(st.sampled_from([1, BATCH])), draw(st.sampled_from([1, HEADS]))
    if kind == "window":
        left, right = (draw(st.one_of(st.none(), st.integers(0, 12))) for _ in range(2))
        return SlidingWindow(
            left, right
        ), lambda b, h, i, p, j: (left is None or j >= p - left) and (right is None or j <= p + right)
    if kind == "lambda":
        sink, window = draw(st.integers(0, 5)), draw(st.integers(1, 12))
        return Lambda(sink, window), lambda b, h, i, p, j: j <= p and (p - j < window or j < sink)
    if kind == "groups":
        group = draw(st.integers(1, 15))
        shift = [0 if head < HEADS // 2 else group // 2 for head in range(HEADS)]
        return ShiftedGroups(group), lambda b, h, i, p, j: (p + shift[h]) // group == (j + shift[h]) // group
    if kind == "blocks":
        block = draw(st.sampled_from([16, 32, 48]))
        layout = random_bool(draw, b, h, -(-sq // block), -(-sk // block))
        return BlockSparse(layout, block), lambda b, h, i, p, j: bool(
            layout[b % layout.shape[0], h % layout.shape[1], i // block, j // block]
        )
    if kind == "document":
        ids = torch.randint(0, 3, (b, sk), generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
        return Document(
            ids if b > 1 else ids[0]
        ), lambda b, h, i, p, j: 0 <= p < sk and bool(ids[b % len(ids), p] == ids[b % len(ids), j])
    table = random_bool(draw, b, h, sq, sk)
    return Dense(table if b > 1 else table[0]), lambda b, h, i, p, j: bool(
        table[b % table.shape[0], h % table.shape[1], i, j]
    )


def brute_force(rule: Rule, sq: int, sk: int, align: str) -> Tensor:
    shift = 0 if align == "top_left" else sk - sq
    seen = torch.zeros(BATCH, HEADS, sq, sk, dtype=torch.bool)
    for b in range(BATCH):
        for h in range(HEADS):
            for i in range(sq):
                for j in range(sk):
                    seen[b, h, i, j] = rule(b, h, i, i + shift, j)
    return seen


def canonical(mask: Mask, sq: int, sk: int, align: str, causal: bool = False) -> Tensor:
    """What the reference makes of the canonical form."""
    every, top_left = torch.arange(sq), align == "top_left"
    seen = visible(mask.lower(), causal, every, positions(sq, sk, top_left, every.device), sk, HEADS)
    return torch.ones(()) > 0 if seen is None else seen


@several
@given(st.data(), sizes, aligns)
def test_definitions(data: Any, sizes: tuple[int, int], align: str) -> None:
    sq, sk = (min(n, 24) for n in sizes)
    mask, rule = data.draw(simple(sq, sk))
    dense = mask.to_dense(sq, sk, HEADS, align)
    assert dense.dtype == torch.bool and dense.shape[2:] == (sq, sk)
    assert dense.shape[0] in (1, BATCH) and dense.shape[1] in (1, HEADS)
    expected = brute_force(rule, sq, sk, align)
    assert torch.equal(dense.expand_as(expected), expected), mask
    assert torch.equal(canonical(mask, sq, sk, align).expand_as(expected), expected), mask


@several
@given(st.data(), sizes, aligns, st.booleans())
def test_composition(data: Any, sizes: tuple[int, int], align: str, causal: bool) -> None:
    """A composed mask shows what all parts show, in canonical form too; and its pairs are counted right."""
    sq, sk = sizes
    parts = [data.draw(simple(sq, sk))[0] for _ in range(data.draw(st.integers(2, 4)))]
    mask = parts[0]
    for part in parts[1:]:
        mask = mask & part
    expected = torch.ones(BATCH, HEADS, sq, sk, dtype=torch.bool)
    for part in parts:
        expected &= part.to_dense(sq, sk, HEADS, align)
    assert torch.equal(mask.to_dense(sq, sk, HEADS, align).expand_as(expected), expected), mask
    assert torch.equal(canonical(mask, sq, sk, align).expand_as(expected), expected), mask
    if causal:
        expected &= torch.arange(sk) <= positions(sq, sk, align == "top_left", expected.device)[:, None]
    q, k = torch.empty(BATCH, HEADS, sq, 4), torch.empty(BATCH, HEADS, sk, 4)
    flops = attention_flops(q, k, k, mask=mask, causal=causal, align=align)
    assert flops == 16 * int(expected.sum()), mask


def test_flops_of_packed_and_unread_masks() -> None:
    q = torch.empty(4, 24, 8)
    cu = torch.tensor([0, 10, 10, 24], dtype=torch.int32)
    layout = torch.rand(3, 4, 1, 1) < 0.5
    mask = Lambda(1, 4) & BlockSparse(layout, 16) & Document(torch.arange(24) // 5)
    ids = torch.arange(24) // 5
    pairs = 0
    for n, (a, b) in enumerate(((0, 10), (10, 10), (10, 24))):
        part = Lambda(1, 4) & Document(ids[a:b]) & BlockSparse(layout[n : n + 1], 16)
        pairs += int(part.to_dense(b - a, b - a, 4).expand(-1, 4, -1, -1).sum())
    packed = {"cu_seqlens_q": cu, "cu_seqlens_k": cu}
    assert attention_flops(q, q, q, mask=mask, **packed) == 32 * pairs
    wide = torch.empty(2, 4, 2**18, 8, device="meta")
    one = attention_flops(wide, wide, wide, mask=SlidingWindow(2**12 - 1, 0))
    assert one == 8 * 32 * (2**12 * 2**18 - 2**12 * (2**12 - 1) // 2)
    bound = attention_flops(
        wide, wide, wide, mask=(SlidingWindow(2**12 - 1, 0) & Document(torch.zeros(2**18).long())).to("meta")
    )
    assert bound == one


@pytest.mark.parametrize("align", ["bottom_right", "top_left"])
def test_every_kind_through_the_op(align: str, device: str) -> None:
    """Attention with a mask is attention with -inf where the dense form hides, rows that see nothing included."""
    sq, sk = 33, 40
    q, k = torch.randn(BATCH, HEADS, sq, 8, device=device), torch.randn(BATCH, 1, sk, 8, device=device)
    kinds = [
        SlidingWindow(3, 2),
        Lambda(2, 3),
        ShiftedGroups(10),
        BlockSparse(torch.rand(1, HEADS, 3, 3) < 0.4, 16),
        Document(torch.randint(0, 3, (BATCH, sk))),
        Dense(torch.rand(sq, sk) < 0.1),
        SlidingWindow(9) & Document(torch.arange(sk) // 7) & Dense(torch.rand(HEADS, 1, sk) < 0.5),
    ]
    for kind in kinds:
        mask = kind.to(device)
        seen = mask.to_dense(sq, sk, HEADS, align)
        bias = torch.zeros(seen.shape, device=device).masked_fill(~seen, -torch.inf)
        expected, expected_lse = reference.attention(q, k, k, bias=bias)
        for backend in (None, "reference"):
            out, lse = effkern.attention(q, k, k, mask=mask, align=align, return_lse=True, backend=backend)
            torch.testing.assert_close(out, expected)
            torch.testing.assert_close(lse, expected_lse)


def test_errors() -> None:
    seen = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    cases: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (
            ValueError,
            "SlidingWindow: left must be an integer of at least 0 or None",
            lambda: SlidingWindow(-1),
        ),
        (ValueError, "SlidingWindow: right .* got -2", lambda: SlidingWindow(None, -2)),
        (TypeError, "SlidingWindow: left .* got 1.5", lambda: SlidingWindow(1.5)),  # type: ignore[arg-type]
        (TypeError, "SlidingWindow: left .* got True", lambda: SlidingWindow(True)),
        (ValueError, "Lambda: sink must be an integer of at least 0, got -1", lambda: Lambda(-1, 3)),
        (ValueError, "Lambda: window must be an integer of at least 1, got 0", lambda: Lambda(3, 0)),
        (ValueError, "ShiftedGroups: group must be .* got 0", lambda: ShiftedGroups(0)),
        (ValueError, "BlockSparse: block must be a multiple of 16, got 24", lambda: BlockSparse(seen, 24)),
        (ValueError, "BlockSparse: block must be .* at least 16, got 0", lambda: BlockSparse(seen, 0)),
        (
            ValueError,
            r"BlockSparse: layout must have shape .* got \(2, 2\)",
            lambda: BlockSparse(seen[0, 0], 16),
        ),
        (TypeError, "layout must be a bool tensor, got float32", lambda: BlockSparse(seen * torch.nan, 16)),
        (TypeError, "layout must be a bool tensor, got list", lambda: BlockSparse([True], 16)),  # type: ignore[arg-type]
        (TypeError, "ids must be an integer tensor, got float32", lambda: Document(torch.ones(3))),
        (TypeError, "ids must be an integer tensor, got list", lambda: Document([1])),  # type: ignore[arg-type]
        (ValueError, "ids must have shape", lambda: Document(torch.ones(1, 1, 3).long())),
        (TypeError, "mask must be a bool tensor, got int64", lambda: Dense(seen.long())),
        (ValueError, "mask must broadcast to", lambda: Dense(seen[None])),
        (ValueError, "ids of 3 and of 4 keys", lambda: Document(torch.arange(3)) & Document(torch.arange(4))),
        (TypeError, "unsupported operand", lambda: Lambda(1, 1) & seen),  # type: ignore[operator]
        (ValueError, "to_dense: align must be", lambda: Lambda(1, 1).to_dense(3, 3, align="left")),
        (ValueError, "to_dense: Sq must be", lambda: Lambda(1, 1).to_dense(-1, 3)),
        (ValueError, "to_dense: layout has .* need", lambda: BlockSparse(seen, 16).to_dense(33, 3)),
        (ValueError, "to_dense: ids has 3 entries", lambda: Document(torch.arange(3)).to_dense(3, 4)),
        (ValueError, "to_dense: mask has shape", lambda: Dense(seen).to_dense(2, 4)),
        (ValueError, "heads must be an integer of at least 1", lambda: masks.alibi_slopes(0)),
    ]
    for error, match, make in cases:
        with pytest.raises(error, match=match):
            make()


def test_any_integer_makes_a_document() -> None:
    for dtype in (torch.int32, torch.int16, torch.uint8):
        assert Document(torch.tensor([0, 1, 1], dtype=dtype)).lower().ids.dtype == torch.int64  # type: ignore[union-attr]
    far = torch.tensor([2**62, -(2**62), 2**62])
    merged = (Document(far) & Document(far.flip(0) + 1)).to_dense(3, 3)
    assert torch.equal(merged[0, 0], torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 1]]).bool())


def test_slopes() -> None:
    """Values of the ALiBi paper and of its code for a head count that is no power of two."""
    assert torch.equal(masks.alibi_slopes(8), 2.0 ** -torch.arange(1.0, 9.0))
    assert torch.equal(masks.alibi_slopes(1), torch.tensor([2.0**-8]))
    twelve = masks.alibi_slopes(12)
    assert torch.equal(twelve[:8], masks.alibi_slopes(8))
    assert torch.equal(twelve[8:], masks.alibi_slopes(16)[::2][:4])


def test_repr_names_every_part() -> None:
    mask = SlidingWindow(4) & BlockSparse(torch.ones(1, 2, 3, 4, dtype=torch.bool), 32) & Lambda(1, 2)
    shown = "SlidingWindow(left=4, right=None) & BlockSparse(layout=(1, 2, 3, 4), block=32) & Lambda(sink=1, window=2)"
    assert repr(mask) == shown


def test_compiled(device: str) -> None:
    """Masks built inside of a compiled function, passed into it, and both, with a bias and dropout."""
    torch._dynamo.reset()

    def step(q: Tensor, ids: Tensor, outer: Mask, bias: Tensor) -> Tensor:
        mask = outer & Document(ids) & SlidingWindow(5, None)
        return effkern.attention(q, q, q, mask=mask, causal=True, bias=bias, dropout_p=0.2)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    outer = Lambda(2, 9) & Document(torch.arange(24) % 5).to(device)
    for batch in (2, 3):
        q = torch.randn(batch, 4, 24, 16, device=device, requires_grad=True)
        bias = torch.randn(4, 24, 24, device=device, requires_grad=True)
        ids = (torch.arange(24, device=device) // 10).expand(batch, -1)
        results = []
        for function in (step, compiled):
            torch.manual_seed(0)
            out = function(q, ids, outer, bias)
            results.append((out, *torch.autograd.grad(out.cos().sum(), (q, bias))))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


def test_exported(device: str) -> None:
    module = effkern.nn.Attention(32, 4, mask=Lambda(1, 6) & Document(torch.arange(20) // 8), device=device)
    x = torch.randn(2, 20, 32, device=device)
    program = torch.export.export(
        module.eval(), (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},)
    )
    x = torch.randn(3, 20, 32, device=device)
    torch.testing.assert_close(program.module()(x), module(x))


def test_module_options(device: str) -> None:
    module = effkern.nn.Attention(
        32, 4, causal=True, mask=SlidingWindow(6), softcap=5.0, dropout=0.5, device=device
    )
    assert "mask=SlidingWindow(left=6, right=None), softcap=5.0, dropout=0.5" in repr(module)
    x = torch.randn(2, 20, 32, device=device)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))
    documents = Document(torch.arange(20, device=device) // 7)
    changed = x.clone()
    changed[:, :7] = 0.0
    assert torch.equal(module(x, documents)[:, 7:], module(changed, documents)[:, 7:])
    assert not torch.equal(module(x)[:, 7:], module(changed)[:, 7:])
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1"):
        effkern.nn.Attention(32, 4, dropout=1.0)


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from effkern._mask_plot import classify

    seen = torch.rand(70, 50) < torch.rand(70, 1)
    seen[:32, 16:32], seen[32:64, :16] = True, False
    pairs, full, partial = classify(seen, 32, 16)
    for row in range(3):
        for column in range(4):
            tile = (slice(32 * row, 32 * row + 32), slice(16 * column, 16 * column + 16))
            assert full[row, column] == seen[tile].all()
            assert partial[row, column] == (seen[tile].any() and not seen[tile].all())
            shown = (pairs[tile] == 1) | (pairs[tile] == 2)
            assert torch.equal(shown, seen[tile])
            assert (pairs[tile] == 0).all() == (not seen[tile].any())
    path = tmp_path / "mask.png"
    figure = masks.plot(ShiftedGroups(64), 200, 256, heads=2, head=1, causal=True, path=path)
    assert path.stat().st_size > 1000
    assert "of 16 tiles visited" in figure.axes[0].get_title()
    with pytest.raises(ValueError, match="head 2 of 2"):
        masks.plot(ShiftedGroups(64), 20, 20, heads=2, head=2)
