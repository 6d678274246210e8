"""How palette indices lie in memory: packing and unpacking with PyTorch operations.

A row of indices is cut into blocks of 16 lanes; a lane of a block is one 32-bit word (three for 3 and 6 bits) of
several indices. Unpacking 8 or 16 of them is then one shift of a vector of words: field f of lane l is index 16 f + l
of the block. The last block of a row has as few lanes L as its indices need, and index L f + l there.

    bits        1    2    3    4    6    8
    words       1    1    3    1    3    1     of a lane
    fields     32   16   32    8   16    4     of a lane
    a block   512  256  512  128  256   64     indices

Three words have 10 fields of 3 bits (5 of 6) each, and their two top bits are left: of words 0, 1, 2 call them a, b and
c. At 3 bits field 30 is a with the lower bit of c above it, field 31 is b with the upper bit of c above it; at 6 bits
field 15 is a, b and c, from the lowest bits up. Words are little-endian, words of a block lie one after the other, each
over all lanes.
"""

from __future__ import annotations

import torch
from torch import Tensor

BITS = (1, 2, 3, 4, 6, 8)
LANES = 16
_AT_ONCE = 1 << 20  # indices, so that the wide integers in between stay small


def words_of(bits: int) -> int:
    return 3 if bits % 3 == 0 else 1


def fields_of(bits: int) -> int:
    return 32 * words_of(bits) // bits


def bits_for(clusters: int) -> int:
    return next(bits for bits in BITS if 2**bits >= clusters)


def row_bytes(count: int, bits: int) -> int:
    """What a row of `count` indices takes."""
    fields = fields_of(bits)
    blocks, rest = divmod(count, LANES * fields)
    return 4 * words_of(bits) * (LANES * blocks + -(-rest // fields))


def pack(indices: Tensor, bits: int) -> Tensor:
    """(rows, count) integers below 2^bits to (rows, row_bytes) uint8; fields behind the end are zero."""
    step = max(1, _AT_ONCE // max(1, indices.shape[1]))
    return torch.cat([_pack_rows(part, bits) for part in indices.split(step)])


def unpack(packed: Tensor, count: int, bits: int) -> Tensor:
    """The inverse, as uint8."""
    if packed.shape[0] == 0:
        return packed.new_empty(0, count)
    step = max(1, _AT_ONCE // max(1, count))
    return torch.cat([_unpack_rows(part, count, bits) for part in packed.split(step)])


def _pack_rows(indices: Tensor, bits: int) -> Tensor:
    rows, count = indices.shape
    fields = fields_of(bits)
    whole = count // (LANES * fields) * LANES * fields
    lanes = -(-(count - whole) // fields)
    rest = torch.nn.functional.pad(indices[:, whole:].long(), (0, lanes * fields - (count - whole)))
    parts = [
        _to_words(indices[:, :whole].long().view(rows, -1, fields, LANES), bits),
        _to_words(rest.view(rows, int(lanes > 0), fields, lanes), bits),
    ]
    words = torch.cat([part.reshape(rows, -1) for part in parts], -1)
    return torch.stack([(words >> shift & 255).to(torch.uint8) for shift in (0, 8, 16, 24)], -1).flatten(1)


def _unpack_rows(packed: Tensor, count: int, bits: int) -> Tensor:
    rows = packed.shape[0]
    fields, per_lane = fields_of(bits), words_of(bits)
    blocks = count // (LANES * fields)
    lanes = -(-(count - blocks * LANES * fields) // fields)
    octets = packed.reshape(rows, -1, 4).long()
    words: Tensor = sum((octets[..., i] << 8 * i for i in range(4)), torch.zeros_like(octets[..., 0]))
    split = blocks * per_lane * LANES
    parts = [
        _to_fields(words[:, :split].view(rows, blocks, per_lane, LANES), bits),
        _to_fields(words[:, split:].view(rows, int(lanes > 0), per_lane, lanes), bits),
    ]
    return torch.cat([part.reshape(rows, -1) for part in parts], -1)[:, :count].to(torch.uint8)


def _to_words(fields: Tensor, bits: int) -> Tensor:
    """(rows, blocks, fields, lanes) to (rows, blocks, words, lanes), words as int64."""
    each = 32 // bits
    words: list[Tensor] = []
    zero = torch.zeros_like(fields[:, :, 0])
    for first in range(0, each * words_of(bits), each):
        words.append(sum((fields[:, :, first + i] << bits * i for i in range(each)), zero))  # noqa: PERF401
    if bits == 3:
        last, other = fields[:, :, 30], fields[:, :, 31]
        words[0] = words[0] | (last & 3) << 30
        words[1] = words[1] | (other & 3) << 30
        words[2] = words[2] | (last >> 2) << 30 | (other >> 2) << 31
    elif bits == 6:
        last = fields[:, :, 15]
        words = [word | (last >> 2 * i & 3) << 30 for i, word in enumerate(words)]
    return torch.stack(words, 2)


def _to_fields(words: Tensor, bits: int) -> Tensor:
    """The inverse of `_to_words`."""
    per_lane, each = words_of(bits), 32 // bits
    fields = [words[:, :, w] >> bits * i & 2**bits - 1 for w in range(per_lane) for i in range(each)]
    if per_lane == 3:
        a, b, c = (words[:, :, w] >> 30 & 3 for w in range(3))
        fields += [a | (c & 1) << 2, b | (c >> 1) << 2] if bits == 3 else [a | b << 2 | c << 4]
    return torch.stack(fields, 2)
