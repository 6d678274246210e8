"""Stored tile lists: for every tile of one side the tiles of the other side that it visits, full ones first.

Built by tensor operations on the device, without waiting for it. Bands and groups are judged by interval arithmetic on
whole tiles, tables by pooling; nothing the size of the score matrix is made.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class TileLists(NamedTuple):
    """entries (B|1, Hq|1, tiles, most) int32; full and total (B|1, Hq|1, tiles) int32: entries [0, full) need no mask,
    [full, total) do."""

    entries: Tensor
    full: Tensor
    total: Tensor


def _judge_bands(bands, first, last, key_first, key_last):
    some = torch.ones_like(first + key_first, dtype=torch.bool)
    every = some
    for left, right, sink in zip(bands[::3], bands[1::3], bands[2::3]):
        some = some & (key_first <= last + right) & ((key_last >= first - left) | (key_first < sink))
        every = every & (key_last <= first + right) & ((key_first >= last - left) | (key_last < sink))
    return some, every


def _judge_groups(groups, heads, first, last, key_first, key_last):
    """(1, Hq, query tiles, key tiles): the two halves of the heads differ."""
    offset = torch.zeros(heads, 1, 1, dtype=torch.int64, device=first.device)
    offset[heads // 2:] = 1
    some = torch.ones_like(offset + first + key_first, dtype=torch.bool)
    every = some
    for size in groups:
        shift = offset * (size // 2)
        q0, q1, k0, k1 = ((x + shift).div(size, rounding_mode="floor") for x in (first, last, key_first, key_last))
        some = some & (q0 <= k1) & (k0 <= q1)
        every = every & (q0 == k1) & (k0 == q1)
    return some[None], every[None]


def _pool(table, block_m, block_n, tiles_m, tiles_n):
    """(any, all) of a bool table (B, H, rows, columns) over tiles; a side of size 1 is broadcast."""
    rows, columns = table.shape[2:]
    by_m, by_n = (block_m if rows > 1 else 1), (block_n if columns > 1 else 1)
    fill_m = tiles_m * block_m - rows if rows > 1 else 0
    fill_n = tiles_n * block_n - columns if columns > 1 else 0
    results = []
    for value, reduce in ((False, torch.amax), (True, torch.amin)):
        # A layout may be longer than the sequence: cut what no tile covers.
        full = pad(table, (0, max(fill_n, 0), 0, max(fill_m, 0)), value=value)
        full = full[:, :, : full.shape[2] + min(fill_m, 0), : full.shape[3] + min(fill_n, 0)]
        parts = full.unflatten(3, (-1, by_n)).unflatten(2, (-1, by_m))
        results.append(reduce(parts.to(torch.uint8), (3, 5)).bool().expand(-1, -1, tiles_m, tiles_n))
    return results


def _judge_layout(layout, block, block_m, block_n, tiles_m, tiles_n):
    """Through cells that divide both a block and a tile."""
    cell_m, cell_n = math.gcd(block, block_m), math.gcd(block, block_n)
    cells = layout.repeat_interleave(block // cell_m, 2).repeat_interleave(block // cell_n, 3)
    return _pool(cells, block_m // cell_m, block_n // cell_n, tiles_m, tiles_n)


def _judge_ids(ids, sq, sk, shift, block_m, block_n, tiles_m, tiles_n):
    """Ranges of ids that do not meet hide a tile; two ranges of the same single id show all of it."""
    top, bottom = torch.iinfo(torch.int64).max, torch.iinfo(torch.int64).min
    positions = torch.arange(tiles_m * block_m, device=ids.device)
    known = (positions < sq) & (positions + shift >= 0) & (positions + shift < sk)
    mine = ids[:, (positions + shift).clamp(0, sk - 1)]
    low = mine.masked_fill(~known, top).unflatten(1, (tiles_m, block_m)).amin(2)[:, None, :, None]
    high = mine.masked_fill(~known, bottom).unflatten(1, (tiles_m, block_m)).amax(2)[:, None, :, None]
    whole = (known | (positions >= sq)).unflatten(0, (tiles_m, block_m)).all(1)[None, None, :, None]
    # Not torch.nn.functional.pad, whose value is a float: that has no room for these.
    low_end, high_end = (ids.new_full((len(ids), tiles_n * block_n - sk), end) for end in (top, bottom))
    key_low = torch.cat([ids, low_end], 1).unflatten(1, (tiles_n, block_n)).amin(2)[:, None, None]
    key_high = torch.cat([ids, high_end], 1).unflatten(1, (tiles_n, block_n)).amax(2)[:, None, None]
    return (low <= key_high) & (key_low <= high), whole & (low == key_high) & (key_low == high)


def build(sq, sk, heads, top_left, bands, groups, layout, block, ids, visible, block_m, block_n, device, by_key):
    """The lists of query tiles, or with `by_key` those of key tiles, of a dense batch."""
    tiles_m, tiles_n = -(-sq // block_m), -(-sk // block_n)
    shift = 0 if top_left else sk - sq
    row = torch.arange(tiles_m, device=device)[:, None] * block_m
    col = torch.arange(tiles_n, device=device)[None] * block_n
    first, last = row + shift, (row + block_m).clamp(max=sq) - 1 + shift
    key_last = (col + block_n).clamp(max=sk) - 1
    some, every = _judge_bands(bands, first, last, col, key_last)
    # Ragged tiles hold rows and columns that are not there: they always take the masked path.
    whole = (row + block_m <= sq) & (col + block_n <= sk)
    some, every = some[None, None], (every & whole)[None, None]
    judged = []
    if groups:
        judged.append(_judge_groups(groups, heads, first, last, col, key_last))
    if layout is not None:
        judged.append(_judge_layout(layout, block, block_m, block_n, tiles_m, tiles_n))
    if ids is not None:
        judged.append(_judge_ids(ids, sq, sk, shift, block_m, block_n, tiles_m, tiles_n))
    if visible is not None:
        judged.append(_pool(visible, block_m, block_n, tiles_m, tiles_n))
    for some_too, every_too in judged:
        some, every = some & some_too, every & every_too
    if by_key:
        some, every = some.mT, every.mT
    every = every & some
    rank = torch.where(every, 0, torch.where(some, 1, 2)).to(torch.uint8)
    entries = rank.argsort(dim=-1, stable=True).to(torch.int32).contiguous()
    return TileLists(entries, every.sum(-1, dtype=torch.int32), some.sum(-1, dtype=torch.int32))
