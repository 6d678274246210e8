"""How many (query, key) pairs a call of attention computes: exact where the mask can be read, else an upper bound."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from effkern.masks import UNBOUNDED, Lowered
from effkern.reference._attention_scores import one_sequence, positions, visible

_CHUNK = 2**22  # pairs looked at together


def _staircase(first: int, rows: int) -> int:
    """Sum of max(0, x) over x = first, first + 1, ..., first + rows - 1."""

    def triangle(n: int) -> int:
        return n * (n + 1) // 2 if n > 0 else 0

    return triangle(first + rows - 1) - triangle(first - 1)


def visible_pairs(sq: int, sk: int, causal: bool, top_left: bool) -> int:
    """How many pairs one head computes without a mask. Exact, also where rows see no key or all keys."""
    if not causal:
        return sq * sk
    first = 1 if top_left else sk - sq + 1
    return _staircase(first, sq) - _staircase(first - sk, sq)


def _readable(*tensors: Tensor | None) -> bool:
    return not any(t is not None and (isinstance(t, FakeTensor) or t.is_meta) for t in tensors)


def _interval_pairs(mask: Lowered, sq: int, sk: int, top_left: bool, shifts: Iterable[int]) -> int:
    """Pairs that bands and groups show to one head, in time linear in Sq: a row sees an interval less others."""
    p = positions(sq, sk, top_left, torch.device("cpu"))
    begin, end = torch.zeros_like(p), torch.full_like(p, sk)
    for size, shift in zip(mask.groups, shifts, strict=True):
        first = (p + shift).div(size, rounding_mode="floor") * size - shift
        begin, end = begin.maximum(first), end.minimum(first + size)
    bands = sorted(zip(mask.bands[2::3], mask.bands[::3], mask.bands[1::3]))
    for _, _, right in bands:
        end = end.minimum(p + right + 1)
    pairs = (end - begin).clamp(min=0)
    counted = begin  # a band hides [sink, p - left): counted up to here
    for sink, left, _ in bands:
        hidden_begin, hidden_end = counted.clamp(min=sink), end.minimum(p - left)
        pairs = pairs - (hidden_end - hidden_begin).clamp(min=0)
        counted = counted.maximum(hidden_end)
    return int(pairs.sum())


def _table_pairs(mask: Lowered, sq: int, sk: int, heads: int, entries: int, top_left: bool) -> int:
    """Pairs of all heads and batch entries, counted in the matrix itself, a few rows at a time."""
    tensors = [t for t in (mask.layout, mask.ids, mask.visible) if t is not None]
    wide = max(t.shape[0] for t in tensors) * max([1, *(t.shape[1] for t in tensors if t.dim() == 4)])
    if mask.groups:
        wide = max(wide, heads)
    chunk = max(1, _CHUNK // max(1, sk * wide))
    device = tensors[0].device
    every, position = torch.arange(sq, device=device), positions(sq, sk, top_left, device)
    pairs = 0
    for rows, places in zip(every.split(chunk), position.split(chunk), strict=True):
        seen = visible(mask, False, rows, places, sk, heads)
        assert seen is not None
        repeats = entries * heads // (seen.shape[0] * seen.shape[1])
        copies = (len(rows) // seen.shape[2]) * (sk // max(1, seen.shape[3]))
        pairs += int(seen.sum()) * repeats * copies
    return pairs


def _mask_pairs(
    mask: Lowered, sq: int, sk: int, heads: int, entries: int, causal: bool, top_left: bool
) -> int:
    if causal:
        mask = mask._replace(bands=(*mask.bands, UNBOUNDED, 0, 0))
    if sq == 0 or sk == 0 or heads == 0 or entries == 0:
        return 0
    tables = mask.layout, mask.ids, mask.visible
    if any(t is not None for t in tables) and _readable(*tables):
        return _table_pairs(mask, sq, sk, heads, entries, top_left)
    if not mask.bands and not mask.groups:
        return entries * heads * sq * sk
    if not mask.groups:
        return entries * heads * _interval_pairs(mask, sq, sk, top_left, ())
    plain = _interval_pairs(mask, sq, sk, top_left, [0] * len(mask.groups))
    shifted = _interval_pairs(mask, sq, sk, top_left, [size // 2 for size in mask.groups])
    return entries * (heads // 2 * plain + (heads - heads // 2) * shifted)


def total_pairs(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    top_left: bool,
    mask: Lowered,
) -> int:
    """Of all heads and batch entries. Without the values of cu_seqlens: one sequence, the upper bound."""
    heads, sq, sk = q.shape[-3], q.shape[-2], k.shape[-2]
    masked = bool(mask.bands or mask.groups) or not (mask.layout is mask.ids is mask.visible is None)

    def one(entry: Lowered, rows: int, columns: int, entries: int) -> int:
        if masked:
            return _mask_pairs(entry, int(rows), int(columns), int(heads), int(entries), causal, top_left)
        return entries * heads * visible_pairs(rows, columns, causal, top_left)

    with _disable_current_modes():
        if cu_seqlens_q is None or cu_seqlens_k is None:
            return one(mask, sq, sk, q.shape[0])
        if not _readable(cu_seqlens_q, cu_seqlens_k):
            return one(mask._replace(layout=None, ids=None, visible=None), sq, sk, 1)
        ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        pairs = 0
        for n, (a, b, c, d) in enumerate(zip(ends_q[:-1], ends_q[1:], ends_k[:-1], ends_k[1:], strict=True)):
            entry = one_sequence(mask, n, slice(c, d))
            assert entry is not None
            pairs += one(entry, b - a, d - c, 1)
        return pairs
