"""Products with palettised weights: indices are unpacked and looked up in registers, the dense weight is never stored.

How indices lie in words is said in effkern/ops/_palette_layout.py. COUNT is the indices of a row, `each` the rows that
share a table of CLUSTERS entries, `row_words` the 32-bit words of a row.
"""

import triton
import triton.language as tl


@triton.jit
def field_of(first, second, third, FIELD: tl.constexpr, BITS: tl.constexpr):
    """Field FIELD of lanes from their words, uint32; second and third are there for 3 and 6 bits."""
    each: tl.constexpr = 32 // BITS
    if each > FIELD:
        code = first >> BITS * FIELD & 2**BITS - 1
    elif 2 * each > FIELD:
        code = second >> BITS * (FIELD - each) & 2**BITS - 1
    elif 3 * each > FIELD:
        code = third >> BITS * (FIELD - 2 * each) & 2**BITS - 1
    elif BITS == 3:
        code = ((first if FIELD == 30 else second) >> 30) | ((third >> FIELD & 1) << 2)
    else:
        code = (first >> 30) | ((second >> 30) << 2) | ((third >> 30) << 4)
    return code.to(tl.int32)


@triton.jit
def load_words(source, at, inside):
    return tl.load(source + at, mask=inside, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def codes_at(source, column, inside, COUNT: tl.constexpr, BITS: tl.constexpr):
    """Codes (R, C) of columns (C) of rows whose words begin at source (R, 1); 0 where not inside (R, C)."""
    LANES: tl.constexpr = 16
    WORDS: tl.constexpr = 3 if BITS % 3 == 0 else 1
    EACH: tl.constexpr = 32 // BITS
    SPAN: tl.constexpr = LANES * (32 * WORDS // BITS)  # indices of a block
    WHOLE: tl.constexpr = COUNT // SPAN
    LAST: tl.constexpr = (COUNT % SPAN + SPAN // LANES - 1) // (SPAN // LANES)  # lanes of the last block
    block = column // SPAN
    rest = column % SPAN
    lanes = tl.full(column.shape, LANES, tl.int32)
    field = rest // LANES
    if LAST > 0:
        lanes = tl.where(block < WHOLE, LANES, LAST)
        field = tl.where(block < WHOLE, field, rest // LAST)
    at = block * (LANES * WORDS) + rest - field * lanes
    plane = field // EACH
    shift = field % EACH * BITS
    if WORDS == 3:
        odd = field >= 3 * EACH  # spread over the top bits of the words
        plane = tl.where(odd, field - 3 * EACH, plane)
        shift = tl.where(odd, 30, shift)
    code = load_words(source, (at + plane * lanes)[None, :], inside) >> shift.to(tl.uint32)[None, :] & 2**BITS - 1
    if WORDS == 3:
        also = inside & odd[None, :]
        third = load_words(source, (at + 2 * lanes)[None, :], also)
        if BITS == 3:
            code |= (third >> field.to(tl.uint32)[None, :] & 1) << 2 & tl.where(also, 4, 0).to(tl.uint32)
        else:
            code |= ((load_words(source, (at + lanes)[None, :], also) >> 30) << 2) | ((third >> 30) << 4)
    return code.to(tl.int32)


@triton.jit
def look_up(words, tables, row, column, rows, each, row_words, COUNT: tl.constexpr, BITS: tl.constexpr,
            CLUSTERS: tl.constexpr):
    """Weights (R, C), zeros outside."""
    inside = (row < rows)[:, None] & (column < COUNT)[None, :]
    code = codes_at(words + row.to(tl.int64)[:, None] * row_words, column, inside, COUNT, BITS)
    return tl.load(tables + (row // each)[:, None] * CLUSTERS + code, mask=inside & (code < CLUSTERS), other=0.0)


@triton.jit(do_not_specialize=["tokens", "rows", "each", "blocks", "share"])
def palettized_few_kernel(
        x, words, tables, partial, tokens, x_row, rows, each, row_words, blocks, share, COUNT: tl.constexpr,
        BITS: tl.constexpr, CLUSTERS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr):
    """partial[split] (tokens, rows) = x W^T over `share` blocks of each row: one program per (rows, split). Every word
    is read once, and is in a register for all of its fields."""
    LANES: tl.constexpr = 16
    WORDS: tl.constexpr = 3 if BITS % 3 == 0 else 1
    FIELDS: tl.constexpr = 32 * WORDS // BITS
    WHOLE: tl.constexpr = COUNT // (LANES * FIELDS)
    LAST: tl.constexpr = (COUNT % (LANES * FIELDS) + FIELDS - 1) // FIELDS
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(1)
    in_rows = (row < rows)[:, None]
    table = tables + (row // each)[:, None] * CLUSTERS
    source = words + row.to(tl.int64)[:, None] * row_words
    m = tl.arange(0, BLOCK_M)[:, None, None]
    lane = tl.arange(0, LANES)
    sums = tl.zeros([BLOCK_M, BLOCK_R, LANES], tl.float32)
    for block in range(split * share, tl.minimum(split * share + share, blocks)):
        lanes = tl.where(block < WHOLE, LANES, LAST)
        there = in_rows & (lane < lanes)[None, :]
        at = (block * (LANES * WORDS) + lane)[None, :]
        first = load_words(source, at, there)
        second = first
        third = first
        if WORDS == 3:
            second = load_words(source, at + lanes, there)
            third = load_words(source, at + 2 * lanes, there)
        for field in tl.static_range(FIELDS):
            column = block * (LANES * FIELDS) + field * lanes + lane
            known = (lane < lanes) & (column < COUNT)
            code = field_of(first, second, third, field, BITS)
            weight = tl.load(table + code, mask=in_rows & known[None, :] & (code < CLUSTERS), other=0.0)
            given = tl.load(x + m * x_row + column[None, None, :], mask=(m < tokens) & known[None, None, :], other=0.0)
            sums += given.to(tl.float32) * weight.to(tl.float32)[None, :, :]
    token = tl.arange(0, BLOCK_M)[:, None]
    target = partial + (split * tokens + token) * tl.cast(rows, tl.int64) + row[None, :]
    tl.store(target, tl.sum(sums, 2), mask=(token < tokens) & (row < rows)[None, :])


@triton.jit(do_not_specialize=["numbers", "rows", "splits"])
def palettized_join_kernel(partial, bias, out, numbers, rows, splits, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """out = the splits' sums one after the other, + bias."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < numbers
    sums = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        sums += tl.load(partial + tl.cast(split, tl.int64) * numbers + at, mask=there, other=0.0)
    if HAS_BIAS:
        sums += tl.load(bias + at % rows, mask=there, other=0.0).to(tl.float32)
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["tokens", "rows", "each"])
def palettized_product_kernel(
        a, words, tables, bias, out, tokens, a_row, rows, each, row_words, COUNT: tl.constexpr, BITS: tl.constexpr,
        CLUSTERS: tl.constexpr, TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr, OPERAND: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr):
    """out (tokens, rows) = a W^T + bias, or with TRANSPOSED (tokens, COUNT) = a W: one program per (columns, tokens),
    what is summed in order. Factors are of dtype OPERAND."""
    width = COUNT if TRANSPOSED else rows
    depth = rows if TRANSPOSED else COUNT
    tiles = tl.cdiv(width, BLOCK_N)
    pid = tl.program_id(0)
    ni = pid % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    token = pid // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    keep = (token < tokens)[:, None]
    source = a + token.to(tl.int64)[:, None] * a_row
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, depth, BLOCK_C):
        ci = start + tl.arange(0, BLOCK_C)
        at = tl.load(source + ci[None, :], mask=keep & (ci < depth)[None, :], other=0.0)
        if TRANSPOSED:
            wt = look_up(words, tables, ci, ni, rows, each, row_words, COUNT, BITS, CLUSTERS)
        else:
            wt = look_up(words, tables, ni, ci, rows, each, row_words, COUNT, BITS, CLUSTERS).T
        acc = tl.dot(at.to(OPERAND), wt.to(OPERAND), acc, input_precision=PRECISION)
    inside = (ni < width)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + ni, mask=ni < width, other=0.0).to(tl.float32)[None, :]
    target = out + token.to(tl.int64)[:, None] * width + ni[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=keep & inside)


@triton.jit(do_not_specialize=["tokens", "each"])
def palettized_table_kernel(
        grad, x, words, partial, tokens, grad_row, x_row, each, row_words, COUNT: tl.constexpr, BITS: tl.constexpr,
        CLUSTERS: tl.constexpr, OPERAND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
        BLOCK_C: tl.constexpr, PRECISION: tl.constexpr):
    """partial[program] (CLUSTERS): a tile of the weight's gradient, tokens in order, summed by code. One program per
    (columns, rows of a group, group); the tile is never stored."""
    across: tl.constexpr = (COUNT + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    ci = pid % across * BLOCK_C + tl.arange(0, BLOCK_C)
    down = tl.cdiv(each, BLOCK_N)
    within = pid // across % down * BLOCK_N + tl.arange(0, BLOCK_N)
    row = pid // (across * down) * each + within
    in_c = (ci < COUNT)[None, :]
    in_n = within < each
    acc = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in range(0, tokens, BLOCK_M):
        token = start + tl.arange(0, BLOCK_M)
        keep = (token < tokens)[:, None]
        far = token.to(tl.int64)[:, None]
        gt = tl.load(grad + far * grad_row + row[None, :], mask=keep & in_n[None, :], other=0.0)
        xt = tl.load(x + far * x_row + ci[None, :], mask=keep & in_c, other=0.0)
        acc = tl.dot(gt.to(OPERAND).T, xt.to(OPERAND), acc, input_precision=PRECISION)
    inside = in_n[:, None] & in_c
    code = codes_at(words + row.to(tl.int64)[:, None] * row_words, ci, inside, COUNT, BITS)
    for entry in range(CLUSTERS):
        total = tl.sum(tl.where(inside & (code == entry), acc, 0.0))
        tl.store(partial + pid.to(tl.int64) * CLUSTERS + entry, total)
