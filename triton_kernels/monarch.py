"""Launchers of the Triton Monarch kernels: forward, backward, and what they support.

Two ways forward. Fused: one kernel, a program holds the middle of one l block and reads all of x, so x is read once per
l block. Staged: the first factor writes the middle in chunks that stay in the L2 cache, the second reads it back; for
many tokens that moves less than reading x again does. The choice and all tile shapes depend on shapes alone, nothing is
tuned at run time; they are chosen so that the compiled kernels fit (tests/test_triton_compile.py). Unverified on
hardware: runs and timings there are still due.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton

from . import monarch_kernels as kernels
from .attention import architecture
from .attention import supports as _device_supports
from .attention_tables import padded, precision
from .rows import on

_STAGED_BYTES = 32 << 20  # of the middle in a forward chunk: what the L2 cache of a data-centre GPU holds with the rest
_BACKWARD_BYTES = 64 << 20  # of the largest of the three workspaces of a backward chunk
_LEAST_TOKENS = 2048  # of a chunk: fewer would not fill the device
_LEAST_SPAN = 512  # tokens of a weight gradient that one program sums
_LAUNCH = 8 << 20  # numbers that move in the time a second launch takes
_PROGRAMS = 264  # programs that fill a large GPU twice over
_SECTOR = 32  # bytes that memory writes at once


class Tiles(NamedTuple):
    """Tokens, output columns and summed numbers of a tile, warps of a program, stages of the load pipeline."""

    m: int
    n: int
    c: int
    warps: int
    stages: int


_INTERPRETED = Tiles(16, 16, 16, 4, 1)
# (kernel, architecture) -> {element bytes: tiles}. For `fused` n is the outputs of one l block and c the inputs of one
# block of w1; for `interleave` n is the outputs of each of the neighbouring l blocks. The entries of 8.0 stay below
# 99 KB, so that consumer parts (8.6, 8.9, 12.0) take them too. For 10.0 Triton 3.7 turns split fp32 products into empty
# kernels from 128 columns on, without a word: the tests look for the products.
_TABLE = {
    ("fused", 80): {2: Tiles(64, 128, 128, 4, 2), 4: Tiles(32, 64, 32, 4, 2)},
    ("fused", 90): {2: Tiles(128, 256, 256, 8, 2), 4: Tiles(128, 128, 32, 8, 2)},
    ("fused", 100): {2: Tiles(128, 256, 256, 8, 2), 4: Tiles(64, 64, 32, 4, 2)},
    ("product", 80): {2: Tiles(128, 128, 64, 8, 3), 4: Tiles(64, 64, 32, 4, 2)},
    ("product", 90): {2: Tiles(128, 256, 64, 8, 3), 4: Tiles(128, 128, 32, 8, 2)},
    ("product", 100): {2: Tiles(128, 256, 64, 8, 3), 4: Tiles(128, 64, 32, 8, 2)},
    ("interleave", 80): {2: Tiles(64, 32, 64, 8, 3), 4: Tiles(64, 32, 32, 8, 2)},
    ("interleave", 90): {2: Tiles(64, 64, 64, 8, 3), 4: Tiles(128, 32, 32, 8, 2)},
    ("interleave", 100): {2: Tiles(64, 64, 64, 8, 3), 4: Tiles(128, 32, 32, 8, 2)},
    ("weight_gradient", 80): {2: Tiles(64, 128, 128, 8, 3), 4: Tiles(32, 64, 64, 4, 2)},
    ("weight_gradient", 90): {2: Tiles(64, 128, 128, 8, 3), 4: Tiles(32, 128, 128, 8, 2)},
    ("weight_gradient", 100): {2: Tiles(64, 128, 128, 8, 3), 4: Tiles(32, 128, 64, 8, 2)},
}


def supports(device: torch.device, dtype: torch.dtype, sizes: Mapping[str, int]) -> str | None:
    """None when the launchers take such a request, else the reason they do not; sizes p q r s k l, where known."""
    reason = _device_supports(device, dtype, {})
    if reason is not None:
        return reason
    for one, other in (("q", "p"), ("s", "r")):
        if sizes.get(one, 1) * sizes.get(other, 1) >= 2**31:
            return f"triton kernels take weight blocks of fewer than 2^31 numbers, not {sizes[one]} x {sizes[other]}"
    for blocks, width in (("k", "p"), ("k", "q"), ("l", "s")):
        if sizes.get(blocks, 1) * sizes.get(width, 1) >= 2**31:
            return f"triton kernels take rows of fewer than 2^31 numbers, not {sizes[blocks]} x {sizes[width]}"
    return None


def _rows(t: torch.Tensor, width: int) -> torch.Tensor:
    """(tokens, width) view whose rows are dense; a copy where there is none."""
    t = t.reshape(t.shape[:-1].numel(), width)
    return t if t.stride(1) == 1 or width == 1 else t.contiguous()


class _Problem:
    """What the launches share: the sizes, tile shapes and the token count of a chunk."""

    def __init__(self, x, w1, w2):
        self.w1, self.w2 = w1.contiguous(), w2.contiguous()
        self.k, self.q, self.p = w1.shape
        self.l, self.s, self.r = w2.shape
        self.dtype, self.on = x.dtype, x.device
        self.x = _rows(x, self.k * self.p)
        self.tokens = self.x.size(0)
        self.arch = architecture(x.device)
        self.precision = precision(self.arch, x.dtype)

    def vacant(self) -> bool:
        """Whether every sum is empty."""
        return self.w1.numel() == 0 or self.w2.numel() == 0

    def empty(self, *shape, dtype=None):
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.on)

    def tiles(self, name: str, tokens: int, n: int, c: int) -> Tiles:
        """Tile shapes of a kernel, no larger than the padded sizes need."""
        known = 100 if 100 <= self.arch < 120 else 90 if self.arch == 90 else 80
        t = _INTERPRETED if self.arch == 0 else _TABLE[name, known][self.dtype.itemsize]
        m = min(t.m, padded(tokens))
        n, c, stages = min(t.n, padded(n)), min(t.c, padded(c)), t.stages
        if name == "fused" and self.arch:
            # Too few programs to fill the device: narrower ones, for which the first factor is done again.
            while n > 64 and triton.cdiv(self.s, n) * self.l * triton.cdiv(tokens, m) < _PROGRAMS // 4:
                n //= 2
            stages = stages if m >= 64 else 2 * stages
        return Tiles(m, n, c, t.warps if 2 * m * n >= t.m * t.n else 4, stages)

    def group(self) -> int:
        """Neighbouring l blocks that one program writes: half a memory sector, or all there are."""
        return min(triton.next_power_of_2(self.l), 16 // self.dtype.itemsize)

    def chunks(self, width: int, most: int):
        """Ranges of tokens whose rows of `width` numbers take no more than `most` bytes."""
        step = max(_LEAST_TOKENS, most // (width * self.dtype.itemsize)) // 128 * 128
        return [(begin, min(begin + step, self.tokens)) for begin in range(0, self.tokens, step)]

    def fused_moves_less(self, l_major: bool) -> bool:
        """Whether the fused kernel reads and writes fewer numbers at the L2 cache than the two staged ones."""
        fused = self.tiles("fused", self.tokens, self.s, self.p)
        first = self.tiles("product", self.tokens, self.q, self.p)
        second = self.tiles("product" if l_major else "interleave", self.tokens, self.s, self.r)
        inputs, mid, outputs = (self.tokens * n for n in (self.k * self.p, self.k * self.q, self.l * self.s))
        w1, w2 = self.w1.numel(), self.w2.numel()
        # Numbers that lie alone in a sector cost as much as the whole of it.
        lonely = 1 if l_major else min(self.l, _SECTOR // self.dtype.itemsize)
        apart = 1 if l_major else max(1, lonely // self.group())
        fused_tiles, second_tiles = triton.cdiv(self.s, fused.n), triton.cdiv(self.s, second.n)
        one = inputs * self.l * fused_tiles + outputs * lonely
        one += triton.cdiv(self.tokens, fused.m) * (w1 * fused_tiles + w2)
        two = inputs * triton.cdiv(self.q, first.n) + mid * (1 + second_tiles) + outputs * apart + _LAUNCH
        two += triton.cdiv(self.tokens, first.m) * w1 + triton.cdiv(self.tokens, second.m) * w2
        return one <= two

    def fused(self, bias, out, l_major):
        """out (tokens, l * s) in one kernel."""
        t = self.tiles("fused", self.tokens, self.s, self.p)
        # More rows of the first factor at once would not leave a wide tile, or split operands, their registers.
        most = 16 if self.arch == 0 else 32 if t.n > 128 or self.dtype == torch.float32 else 64
        block_r = min(most, padded(triton.cdiv(self.q, self.l)))
        grid = triton.cdiv(self.s, t.n) * self.l * triton.cdiv(self.tokens, t.m)
        kernels.monarch_fused_kernel[(grid,)](
            self.x, self.w1, self.w2, bias, out, self.tokens, self.x.stride(0), K=self.k, Q=self.q, P=self.p, L=self.l,
            S=self.s, R=self.r, L_MAJOR=l_major, HAS_BIAS=bias is not None, BLOCK_M=t.m, BLOCK_R=block_r, BLOCK_P=t.c,
            BLOCK_S=t.n, PRECISION=self.precision, num_warps=t.warps, num_stages=t.stages)

    def product(self, a, w, out, tokens, a_steps, out_steps, blocks, transposed=False, middle_in=False,
                middle_out=False, bias=None):
        """out = a w^T (a w when `transposed`) block by block; steps are (block, row) strides."""
        n, c = (w.size(2), w.size(1)) if transposed else (w.size(1), w.size(2))
        t = self.tiles("product", tokens, n, c)
        kernels.monarch_product_kernel[(triton.cdiv(n, t.n) * blocks * triton.cdiv(tokens, t.m),)](
            a, w, bias, out, tokens, *a_steps, *out_steps, BLOCKS=blocks, N=n, C=c, Q=self.q, L=self.l, R=self.r,
            MIDDLE_IN=middle_in, MIDDLE_OUT=middle_out, TRANSPOSED=transposed, HAS_BIAS=bias is not None, BLOCK_M=t.m,
            BLOCK_N=t.n, BLOCK_C=t.c, PRECISION=self.precision, num_warps=t.warps, num_stages=t.stages)

    def first(self, x):
        """The middle (l, tokens, r) of rows x."""
        tokens = x.size(0)
        mid = self.empty(self.l, tokens, self.r)
        self.product(x, self.w1, mid, tokens, (self.p, x.stride(0)), (0, self.r), self.k, middle_out=True)
        return mid

    def second(self, mid, bias, out, l_major):
        """out (tokens, l * s) of a middle."""
        tokens = mid.size(1)
        if l_major:
            self.product(mid, self.w2, out, tokens, mid.stride()[:2], (self.s, self.l * self.s), self.l, bias=bias)
            return
        t, group = self.tiles("interleave", tokens, self.s, self.r), self.group()
        grid = triton.cdiv(self.s, t.n) * triton.cdiv(self.l, group) * triton.cdiv(tokens, t.m)
        kernels.monarch_interleave_kernel[(grid,)](
            mid, self.w2, bias, out, tokens, self.r, L=self.l, S=self.s, R=self.r, HAS_BIAS=bias is not None,
            GROUP=group, BLOCK_M=t.m, BLOCK_S=t.n, BLOCK_R=t.c, PRECISION=self.precision, num_warps=t.warps,
            num_stages=t.stages)

    def unshuffle(self, grad_out, l_major):
        """grad_out by l blocks, and its (block, row) strides."""
        if l_major:
            return grad_out, (self.s, grad_out.stride(0))
        tokens = grad_out.size(0)
        turned = self.empty(self.l, tokens, self.s)
        block_s, block_l = min(256, triton.next_power_of_2(self.s)), min(32, triton.next_power_of_2(self.l))
        kernels.monarch_unshuffle_kernel[(triton.cdiv(self.s, block_s) * triton.cdiv(self.l, block_l) * tokens,)](
            grad_out, turned, tokens, grad_out.stride(0), L=self.l, S=self.s, BLOCK_L=block_l, BLOCK_S=block_s,
            num_warps=4)
        return turned, turned.stride()[:2]

    def weight_gradient(self, sums, a, x, tokens, a_steps, x_steps, first, middle=False):
        """Adds a^T x of a chunk to `sums` (spans, blocks, n, c); the first chunk sets it."""
        spans, blocks, n, c = sums.shape
        t = self.tiles("weight_gradient", tokens, n, c)
        span = triton.cdiv(triton.cdiv(tokens, spans), t.m) * t.m
        kernels.monarch_weight_gradient_kernel[(triton.cdiv(c, t.c) * triton.cdiv(n, t.n) * blocks * spans,)](
            a, x, sums, tokens, span, *a_steps, *x_steps, BLOCKS=blocks, N=n, C=c, Q=self.q, L=self.l, R=self.r,
            MIDDLE=middle, FIRST=first, BLOCK_M=t.m, BLOCK_N=t.n, BLOCK_C=t.c, PRECISION=self.precision,
            num_warps=t.warps, num_stages=t.stages)

    def sums(self, w, tokens):
        """fp32 room for a weight gradient: as many long enough spans of tokens as fill the device."""
        t = self.tiles("weight_gradient", tokens, w.size(1), w.size(2))
        programs = w.size(0) * triton.cdiv(w.size(1), t.n) * triton.cdiv(w.size(2), t.c)
        spans = max(1, min(triton.cdiv(_PROGRAMS, programs), tokens // _LEAST_SPAN))
        return self.empty(spans, *w.shape, dtype=torch.float32)


def monarch_matmul(x, w1, w2, bias=None, l_major=False, *, fused=None):
    """x (..., k * p) -> (..., l * s), in the order (s, l), or (l, s) with `l_major`. `fused` forces or forbids a single
    kernel for both factors."""
    problem = _Problem(x, w1, w2)
    out = problem.empty(*x.shape[:-1], problem.l * problem.s)
    if out.numel() == 0:
        return out
    bias = None if bias is None else bias.contiguous()
    if problem.vacant():
        return out.zero_() if bias is None else out.copy_(bias.expand_as(out))
    rows = out.view(problem.tokens, -1)
    with on(problem.on):
        if problem.fused_moves_less(l_major) if fused is None else fused:
            problem.fused(bias, rows, l_major)
        else:
            for begin, end in problem.chunks(problem.k * problem.q, _STAGED_BYTES):
                problem.second(problem.first(problem.x[begin:end]), bias, rows[begin:end], l_major)
    return out


def monarch_matmul_backward(grad_out, x, w1, w2, l_major=False, need_x=True, need_w1=True, need_w2=True,
                            need_bias=False):
    """(grad_x, grad_w1, grad_w2, grad_bias), each of shape (0,) where it is not needed. The middle is recomputed, a
    chunk of tokens at a time; weight gradients add up in fp32, spans of tokens in a fixed order."""
    problem = _Problem(x, w1, w2)
    none = problem.empty(0)
    grad_out = _rows(grad_out, problem.l * problem.s)
    grad_x = problem.empty(*x.shape) if need_x else none
    grad_bias = grad_out.sum(0, dtype=torch.float32).to(x.dtype) if need_bias else none
    if problem.tokens == 0 or problem.vacant():
        grad_w1, grad_w2 = (torch.zeros_like(w) if need else none for w, need in ((w1, need_w1), (w2, need_w2)))
        return grad_x.zero_(), grad_w1, grad_w2, grad_bias
    if not (need_x or need_w1 or need_w2):
        return grad_x, none, none, grad_bias
    width = max(problem.k * problem.q, problem.l * problem.s if not l_major else 0)
    chunks = problem.chunks(width, _BACKWARD_BYTES)
    longest = chunks[0][1]
    sums1 = problem.sums(problem.w1, longest) if need_w1 else None
    sums2 = problem.sums(problem.w2, longest) if need_w2 else None
    rows = grad_x.view(problem.tokens, -1) if need_x else None
    with on(problem.on):
        for begin, end in chunks:
            x_part, count, first = problem.x[begin:end], end - begin, begin == 0
            g, g_steps = problem.unshuffle(grad_out[begin:end], l_major)
            if need_w2:
                mid = problem.first(x_part)
                problem.weight_gradient(sums2, g, mid, count, g_steps, mid.stride()[:2], first)
            if need_x or need_w1:
                grad_mid = problem.empty(problem.l, count, problem.r)
                problem.product(g, problem.w2, grad_mid, count, g_steps, grad_mid.stride()[:2], problem.l, True)
            if need_w1:
                problem.weight_gradient(sums1, grad_mid, x_part, count, (0, problem.r), (problem.p, x_part.stride(0)),
                                        first, middle=True)
            if rows is not None:
                problem.product(grad_mid, problem.w1, rows[begin:end], count, (0, problem.r),
                                (problem.p, problem.k * problem.p), problem.k, transposed=True, middle_in=True)
    grad_w1, grad_w2 = (none if sums is None else sums.sum(0).to(x.dtype) for sums in (sums1, sums2))
    return grad_x, grad_w1, grad_w2, grad_bias
