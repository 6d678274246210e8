"""Tile vocabulary of the attention kernels: where a program works, which tiles it visits, how a tile is loaded.

A kernel owns one stationary tile (of queries or of keys) and visits tiles of the other side. What it visits is
always two lists: *full* tiles, where every pair is visible and no masking code runs, and *partial* tiles, where
each pair is tested. Causal, dense and packed inputs lower to index ranges; a mask given as data would hand the
same loops a list of tile numbers instead (see `visited`).
"""

import triton
import triton.language as tl


@triton.jit
def locate(tiles, total_heads, section, batch_heads, table, lengths_q, lengths_k, sq, sk,
           LONGEST_FIRST: tl.constexpr, PACKED: tl.constexpr, TOP_LEFT: tl.constexpr):
    """Program number -> (tile, head, batch, entry, first query, first key, query count, key count, causal shift); entry
    is the sequence of a packed launch, else the batch.

    Heads run in sections whose keys and values fit in the L2 cache together; inside a section the tile number is
    the slow index, so that heads sharing keys run side by side and, for causal, the longest tiles start first.
    `tile` is -1 where a packed launch has more programs than tiles.
    """
    pid = tl.program_id(0)
    programs = section * tiles
    first = (pid // programs) * section
    count = tl.minimum(section, total_heads - first)
    rest = pid % programs
    tile = rest // count
    head = first + rest % count
    if LONGEST_FIRST:
        tile = tiles - 1 - tile
    batch = head // batch_heads
    head = head % batch_heads
    entry = batch
    first_q = 0
    first_k = 0
    if PACKED:
        sequence = tl.load(table + tile)
        tile = tl.load(table + tiles + tile)
        if sequence < 0:
            tile = -1
        sequence = tl.maximum(sequence, 0)
        entry = sequence
        first_q = tl.load(lengths_q + sequence)
        first_k = tl.load(lengths_k + sequence)
        sq = tl.load(lengths_q + sequence + 1) - first_q
        sk = tl.load(lengths_k + sequence + 1) - first_k
    shift = sk - sq
    if TOP_LEFT:
        shift = 0
    return tile, head, batch, entry, first_q, first_k, sq, sk, shift


@triton.jit
def key_tiles(row, sq, sk, shift, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Key tiles a query tile visits: full ones are [0, full), partial ones [full, end)."""
    all_see = sk
    some_see = sk
    if CAUSAL:
        all_see = tl.maximum(tl.minimum(sk, row + shift + 1), 0)
        some_see = tl.maximum(tl.minimum(sk, tl.minimum(row + BLOCK_M, sq) + shift), 0)
    return all_see // BLOCK_N, tl.cdiv(some_see, BLOCK_N)


@triton.jit
def last_key(rows, sk, shift, CAUSAL: tl.constexpr):
    """Last visible key of each query row: all that a partial tile of a causal or ragged input needs."""
    last = tl.zeros_like(rows) + (sk - 1)
    if CAUSAL:
        last = tl.minimum(rows + shift, last)
    return last


@triton.jit
def query_tiles(col, sq, sk, shift, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Query tiles a key tile visits: full ones are [full, full_end), partial ones [begin, full) and [full_end, end).

    Keys beyond the sequence need no mask here: they only reach gradient rows that are never stored.
    """
    end = tl.cdiv(sq, BLOCK_M)
    full_end = sq // BLOCK_M
    begin = 0
    full = 0
    if CAUSAL:
        begin = tl.minimum(tl.maximum(col - shift, 0) // BLOCK_M, end)
        full = tl.cdiv(tl.maximum(tl.minimum(col + BLOCK_N, sk) - 1 - shift, 0), BLOCK_M)
        full = tl.maximum(tl.minimum(full, full_end), begin)
        full_end = tl.maximum(full_end, full)
    return begin, full, full_end, end


@triton.jit
def visited(step, head_count, skip):
    """Tile number at position `step` of a list made of two index ranges with a gap of `skip` at `head_count`.

    This is the one place that knows lists are ranges: a block-sparse or document mask would load the number from
    memory here (`tl.load(list + step)`) and nothing around it would change.
    """
    return tl.where(step < head_count, step, step + skip)


@triton.jit
def load_tile(source, batch, head, row, row_end, batch_stride, head_stride, row_stride,
              ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr, CHECK: tl.constexpr,
              PACKED: tl.constexpr):
    """(ROWS, BLOCK_D) tile starting at `row`; columns beyond D, and with CHECK rows from `row_end` on, read as zero."""
    rows = row + tl.arange(0, ROWS)
    if TMA:
        # The descriptor (B, H, S, D) zero-fills what lies outside the tensor.
        tile = source.load([batch, head, row, 0]).reshape(ROWS, BLOCK_D)
        if CHECK and PACKED:
            # Inside a packed tensor the next sequence follows: its values, NaN included, must not leak.
            tile = tl.where((rows < row_end)[:, None], tile, 0.0)
    else:
        # 64-bit up to the tile's corner, 32-bit inside it (the launcher bounds the row stride).
        corner = source + batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride
        corner += row.to(tl.int64) * row_stride
        cols = tl.arange(0, BLOCK_D)
        pointers = corner + tl.arange(0, ROWS)[:, None] * row_stride + cols[None, :]
        if CHECK and D != BLOCK_D:
            tile = tl.load(pointers, mask=(rows < row_end)[:, None] & (cols < D)[None, :], other=0.0)
        elif CHECK:
            tile = tl.load(pointers, mask=(rows < row_end)[:, None], other=0.0)
        elif D != BLOCK_D:
            tile = tl.load(pointers, mask=(cols < D)[None, :], other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@triton.jit
def load_line(line, rows, row_end, other, CHECK: tl.constexpr):
    """One number a row; with CHECK, `other` from `row_end` on."""
    return tl.load(line + rows, mask=rows < row_end, other=other) if CHECK else tl.load(line + rows)


@triton.jit
def store_tile(target, value, batch, heads, head, length, row, row_end, ROWS: tl.constexpr, D: tl.constexpr,
               BLOCK_D: tl.constexpr):
    """Write a tile into a contiguous (B, H, S, D) tensor of `length` rows a head, rows from `row_end` on left out."""
    rows = tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    corner = target + ((batch * heads + head).to(tl.int64) * length + row) * D
    keep = (row + rows < row_end)[:, None] & (cols < D)[None, :]
    tl.store(corner + rows[:, None] * D + cols[None, :], value.to(target.dtype.element_ty), mask=keep)
