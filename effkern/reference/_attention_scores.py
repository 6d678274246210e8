"""The parts of an attention score beside q k^T, as whole matrices: what is visible, bias and ALiBi, dropout."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from effkern.masks import Lowered


class Terms(NamedTuple):
    """The options of attention for one dense problem, q (B, Hq, Sq, D) and k (B, Hkv, Sk, D)."""

    scale: float | None
    causal: bool
    top_left: bool
    mask: Lowered | None
    bias: Tensor | None
    softcap: float
    sink_logits: Tensor | None
    alibi_slopes: Tensor | None
    dropout_p: float
    dropout_seed: Tensor | None
    rows: Tensor | None  # int64 (B, Hq, Sq): the number of every query among all of the call, for dropout


def positions(sq: int, sk: int, top_left: bool, device: torch.device) -> Tensor:
    """Where query i stands: at i, or at i + Sk - Sq when the last query sees the last key."""
    rows = torch.arange(sq, device=device)
    return rows if top_left else rows + (sk - sq)


def visible(
    mask: Lowered | None,
    causal: bool,
    rows: Tensor,
    position: Tensor,
    sk: int,
    heads: int,
) -> Tensor | None:
    """bool (B|1, Hq|1, R, Sk): what the queries `rows` (R,) at `position` (R,) see; None where that is everything."""
    device = rows.device
    j, p = torch.arange(sk, device=device), position[:, None]
    terms: list[Tensor] = []
    if causal:
        terms.append(j <= p)
    if mask is not None:
        for left, right, sink in zip(mask.bands[::3], mask.bands[1::3], mask.bands[2::3]):
            terms.append((j <= p + right) & ((j >= p - left) | (j < sink)))
        for size in mask.groups:
            shift = (torch.arange(heads, device=device) >= heads // 2)[:, None, None] * (size // 2)
            terms.append((p + shift) // size == (j + shift) // size)
        if mask.layout is not None:
            terms.append(mask.layout[:, :, rows // mask.block][..., j // mask.block])
        if mask.ids is not None and sk > 0:
            # Positions without a key see nothing; they read the id of some other.
            own = mask.ids[:, position.clamp(0, sk - 1)]
            terms.append(((own[:, :, None] == mask.ids[:, None, :]) & (p >= 0) & (p < sk))[:, None])
        if mask.visible is not None:
            table = mask.visible if mask.visible.shape[2] == 1 else mask.visible[:, :, rows]
            terms.append(table[..., :sk])
    if not terms:
        return None
    seen = terms[0]
    for term in terms[1:]:
        seen = seen & term
    return seen.reshape((1,) * (4 - seen.dim()) + seen.shape)


def one_sequence(mask: Lowered | None, index: int, keys: slice) -> Lowered | None:
    """The mask of one sequence of a packed call."""
    if mask is None:
        return None
    return mask._replace(
        layout=entry(mask.layout, index),
        ids=None if mask.ids is None else mask.ids[:, keys],
        visible=entry(mask.visible, index),
    )


def entry(table: Tensor | None, index: int) -> Tensor | None:
    """(N|1, ...) -> (1, ...): what a table says of one sequence."""
    return table if table is None or table.shape[0] == 1 else table[index : index + 1]


def shaped_scores(s: Tensor, t: Terms) -> tuple[Tensor, Tensor | None]:
    """scale * q k^T (B, Hq, Sq, Sk) -> z with hidden pairs -inf, and the slope of the cap, None without one."""
    slope = None
    _, heads, sq, sk = s.shape
    if t.softcap:
        capped = torch.tanh(s / t.softcap)
        s, slope = t.softcap * capped, 1 - capped.square()
    if t.bias is not None:
        s = s + t.bias[:, :, :sq, :sk].to(s.dtype)
    position = positions(sq, sk, t.top_left, s.device)
    if t.alibi_slopes is not None:
        distance = (position[:, None] - torch.arange(sk, device=s.device)).abs()
        s = s - t.alibi_slopes.to(s.dtype)[:, None, None] * distance
    seen = visible(t.mask, t.causal, torch.arange(sq, device=s.device), position, sk, heads)
    return (s if seen is None else s.masked_fill(~seen, -torch.inf)), slope


_LOW = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85


def _philox(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Philox4x32-10 on int64 tensors that hold 32-bit words (Salmon et al. 2011)."""
    a, b, c, d = counter
    for step in range(10):
        first, second = ((k + step * w) & _LOW for k, w in zip(key, _KEY_STEPS))
        # A product of two words may wrap to a negative int64; its 64 bits are right all the same.
        x, y = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = ((y >> 32) & _LOW) ^ b ^ first, y & _LOW, ((x >> 32) & _LOW) ^ d ^ second, x & _LOW
    return [a, b, c, d]


def dropout_factors(t: Terms, sk: int, dtype: torch.dtype) -> Tensor | None:
    """m (B, Hq, Sq, Sk): 0 where a weight is dropped, 1 / (1 - p) elsewhere; None without dropout."""
    if not t.dropout_p:
        return None
    assert t.rows is not None and t.dropout_seed is not None
    row, seed = t.rows[..., None], t.dropout_seed.reshape(())
    quads = torch.arange((sk + 3) // 4, device=row.device)
    shape = (*t.rows.shape, quads.shape[0])
    counter = [quads.expand(shape), (row & _LOW).expand(shape), (row >> 32).expand(shape)]
    words = _philox([*counter, torch.zeros_like(counter[0])], [seed & _LOW, (seed >> 32) & _LOW])
    keep = torch.stack(words, -1).flatten(-2)[..., :sk] >= int(t.dropout_p * 2**32)
    return keep.to(dtype) / (1 - t.dropout_p)
