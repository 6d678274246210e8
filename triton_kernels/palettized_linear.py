"""Launchers of the Triton products with palettised weights: forward, backward, and what they support.

Up to `_FEW` tokens words of indices are read once and multiplied in registers, a row split among programs whose sums
are added in order. More tokens, and the gradients, look a tile of the weight up for every tile of the product and use
tensor cores. Splits and tile shapes depend on shapes alone, nothing is tuned at run time. Unverified on hardware: runs
and timings there are still due.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import palettized_linear_kernels as kernels
from .attention import architecture
from .attention import supports as _device_supports
from .attention_tables import padded, precision
from .rows import on

_FEW = 8  # tokens
_PROGRAMS = 1056  # that fill a large GPU
_JOINED = 256  # numbers of a program that adds up splits


class Tiles(NamedTuple):
    """Tokens, output columns and summed numbers of a tile, warps of a program, stages of the load pipeline."""

    m: int
    n: int
    c: int
    warps: int
    stages: int


_INTERPRETED = Tiles(16, 16, 32, 4, 1)
# (kernel, architecture) -> {element bytes: tiles}. The gradient of a table sums over tokens, for n rows and c columns
# of the weight. See `monarch` for split fp32 products on 10.0.
_TABLE = {
    ("product", 80): {2: Tiles(64, 128, 32, 8, 2), 4: Tiles(32, 64, 32, 4, 2)},
    ("product", 90): {2: Tiles(128, 128, 64, 8, 2), 4: Tiles(64, 64, 32, 4, 2)},
    ("product", 100): {2: Tiles(128, 128, 64, 8, 2), 4: Tiles(64, 64, 32, 4, 2)},
    ("table", 80): {2: Tiles(64, 64, 64, 4, 2), 4: Tiles(32, 64, 32, 4, 2)},
    ("table", 90): {2: Tiles(64, 64, 128, 4, 2), 4: Tiles(32, 64, 64, 4, 2)},
    ("table", 100): {2: Tiles(64, 64, 128, 4, 2), 4: Tiles(32, 64, 64, 4, 2)},
}
_OPERANDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def supports(device: torch.device, dtype: torch.dtype, sizes: Mapping[str, int]) -> str | None:
    """None when the launchers take such a request, else the reason they do not; sizes: dim, where known."""
    reason = _device_supports(device, dtype, {})
    if reason is None and sizes.get("dim", 1) != 1:
        return f"triton kernels take palettes of single numbers, not of vectors of dim {sizes['dim']}"
    return reason


def _rows(t: torch.Tensor) -> torch.Tensor:
    """(tokens, features) view whose rows are dense; a copy where there is none."""
    t = t.reshape(t.shape[:-1].numel(), t.size(-1))
    return t if t.stride(1) == 1 or t.size(1) == 1 else t.contiguous()


class _Weight:
    """The palette as the kernels read it."""

    def __init__(self, x, indices, lut, bits, groups):
        self.on, self.arch = x.device, architecture(x.device)
        self.rows, self.count, self.bits, self.groups = indices.size(0), x.size(-1), bits, groups
        indices = indices.contiguous()
        self.words = (indices.clone() if indices.storage_offset() % 4 else indices).view(torch.int32)
        self.tables, self.clusters = lut.contiguous(), lut.numel() // groups
        self.each = self.rows // groups
        self.flags = dict(COUNT=self.count, BITS=bits, CLUSTERS=self.clusters)

    def operand(self, *dtypes: torch.dtype) -> torch.dtype:
        """16-bit factors are multiplied as they are; of different dtypes, as fp32."""
        return dtypes[0] if len(set(dtypes)) == 1 else torch.float32

    def tiles(self, kernel: str, tokens: int, operand: torch.dtype) -> Tiles:
        """Tile shapes, with no more tokens and, for a table, rows than there are."""
        known = 100 if 100 <= self.arch < 120 else 90 if self.arch == 90 else 80
        t = _INTERPRETED if self.arch == 0 else _TABLE[kernel, known][operand.itemsize]
        m, n = min(t.m, padded(tokens)), t.n
        if kernel == "table":
            n = min(n, padded(self.each))
        elif m < t.m:
            n = min(n, 64)  # more programs for fewer tokens
        return Tiles(m, n, t.c, t.warps if m * n == t.m * t.n else 4, t.stages)

    def few(self, x, bias, out):
        tokens = x.size(0)
        fields = 96 // self.bits if self.bits % 3 == 0 else 32 // self.bits
        blocks = triton.cdiv(self.count, 16 * fields)
        height = 32 if self.arch else 16
        tiles = triton.cdiv(self.rows, height)
        splits = max(1, min(blocks, _PROGRAMS // tiles))
        share = triton.cdiv(blocks, splits)
        splits = triton.cdiv(blocks, share)
        partial = torch.empty(splits, tokens, self.rows, dtype=torch.float32, device=self.on)
        kernels.palettized_few_kernel[(tiles, splits)](
            x, self.words, self.tables, partial, tokens, x.stride(0), self.rows, self.each, self.words.size(1), blocks,
            share, **self.flags, BLOCK_M=triton.next_power_of_2(tokens), BLOCK_R=height, num_warps=4)
        kernels.palettized_join_kernel[(triton.cdiv(out.numel(), _JOINED),)](
            partial, bias, out, out.numel(), self.rows, splits, HAS_BIAS=bias is not None, BLOCK=_JOINED, num_warps=4)

    def product(self, a, bias, out, transposed):
        tokens, width = out.shape
        operand = self.operand(a.dtype, self.tables.dtype)
        t = self.tiles("product", tokens, operand)
        kernels.palettized_product_kernel[(triton.cdiv(width, t.n) * triton.cdiv(tokens, t.m),)](
            a, self.words, self.tables, bias, out, tokens, a.stride(0), self.rows, self.each, self.words.size(1),
            **self.flags, TRANSPOSED=transposed, HAS_BIAS=bias is not None, OPERAND=_OPERANDS[operand], BLOCK_M=t.m,
            BLOCK_N=t.n, BLOCK_C=t.c, PRECISION=precision(self.arch, operand), num_warps=t.warps, num_stages=t.stages)

    def table_gradient(self, grad_out, x):
        """(groups, CLUSTERS) in float64."""
        operand = self.operand(grad_out.dtype, x.dtype)
        t = self.tiles("table", x.size(0), operand)
        programs = self.groups * triton.cdiv(self.each, t.n) * triton.cdiv(self.count, t.c)
        partial = torch.empty(programs, self.clusters, dtype=torch.float32, device=self.on)
        kernels.palettized_table_kernel[(programs,)](
            grad_out, x, self.words, partial, x.size(0), grad_out.stride(0), x.stride(0), self.each, self.words.size(1),
            **self.flags, OPERAND=_OPERANDS[operand], BLOCK_M=t.m, BLOCK_N=t.n, BLOCK_C=t.c,
            PRECISION=precision(self.arch, operand), num_warps=t.warps, num_stages=t.stages)
        return partial.view(self.groups, -1, self.clusters).sum(1, dtype=torch.float64)


def palettized_linear(x, indices, lut, bits, groups=1, bias=None, wide=False):
    """x (..., in) -> (..., rows) in x's dtype, or float32 if wide."""
    weight, rows = _Weight(x, indices, lut, bits, groups), _rows(x)
    out = torch.empty(rows.size(0), weight.rows, dtype=torch.float32 if wide else x.dtype, device=x.device)
    if out.numel():
        with on(x.device):
            if rows.size(0) <= _FEW:
                weight.few(rows, bias, out)
            else:
                weight.product(rows, bias, out, False)
    return out.view(*x.shape[:-1], weight.rows)


def palettized_linear_backward(grad_out, x, indices, lut, bits, groups=1, need_x=True, need_lut=True):
    """(grad_x, grad_lut), each of shape (0,) where it is not needed."""
    weight, sent, rows = _Weight(x, indices, lut, bits, groups), _rows(grad_out), _rows(x)
    grad_x = torch.empty(rows.shape if need_x else (0,), dtype=x.dtype, device=x.device)
    grad_lut = lut.new_empty(0)
    with on(x.device):
        if grad_x.numel():
            weight.product(sent, None, grad_x, True)
        if need_lut:
            grad_lut = weight.table_gradient(sent, rows).to(lut.dtype).view(lut.shape)
    return grad_x.view(x.shape) if need_x else grad_x, grad_lut
