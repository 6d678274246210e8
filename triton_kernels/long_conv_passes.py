"""Launchers of the long convolutions in three passes, for rings that one program cannot hold.

Channels, and sequences where one channel's take too much, go in groups whose numbers between passes stay within
`_BYTES`. Kernels are transformed once per group of channels. The gradients of kernels are spectra until all sequences
have been added to them, in their order. Groups depend on shapes alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton

from . import long_conv_kernels
from . import long_conv_passes_kernels as kernels
from .rows import steps

_BYTES = 256 << 20  # between passes
_PROGRAMS = 528  # of the second pass that fill a large GPU a few times over
COLUMN_SIZES = (16, 256)


class Columns(NamedTuple):
    """Columns of a program of the first and third pass, and its warps."""

    each: int
    warps: int


_COLUMNS = {16: Columns(128, 4), 256: Columns(16, 8)}


def roots(turns: torch.Tensor, of: int) -> torch.Tensor:
    """Real and imaginary part of exp(-2 pi i turns / of), from exact whole turns."""
    angle = (turns % of).double() * (-2 * math.pi / of)
    return torch.stack([angle.cos(), angle.sin()])


@functools.cache
def column_tables(size: int, row: int, count: int, device: torch.device) -> torch.Tensor:
    """What `long_conv_passes_kernels` calls tables, for columns of `size`, rows of `row`, `count` columns a program."""
    radix = long_conv_kernels.RADIX.value
    p = torch.arange(radix, device="cpu")[:, None]
    parts = [roots(4 * p * p.mT - p.mT, 4 * radix)]
    if size > radix:
        parts += [roots(4 * p * p.mT - p.mT, 4 * size), roots(p * p.mT, radix)]
    # (4 p - 1 + size) r / (4 size row) turns, r = first column of a program + column within it
    turn = 4 * torch.arange(size, device="cpu") - 1 + size
    within, first = torch.arange(count, device="cpu"), torch.arange(0, row, count, device="cpu")
    parts += [roots(turn[:, None] * within, 4 * size * row), roots(first[:, None] * turn, 4 * size * row)]
    return torch.cat([t.flatten() for t in parts]).float().to(device)


def _part(t, *of):
    return None if t is None else t[of]


class Passes:
    """The three passes over one problem of `long_conv`."""

    def __init__(self, problem):
        self.problem = problem
        self.size, self.row = problem.columns, problem.ring.size
        self.count, self.warps = _COLUMNS[self.size]
        self.tables = column_tables(self.size, self.row, self.count, problem.on)
        self.shape = {"M": self.size, "R": self.row, "PRECISION": problem.common["PRECISION"], "num_stages": 1}

    def empty(self, *lead):
        return torch.empty((*lead, 2, self.size, self.row), dtype=torch.float32, device=self.problem.on)

    def groups(self, buffers: int) -> Iterator[tuple[slice, list[slice]]]:
        """Channels of a group, and the sequences it takes one after the other, with so many buffers for each."""
        problem, unit = self.problem, 8 * self.size * self.row
        most = max(_BYTES // (buffers * unit), 2)  # numbers of a kernel count like a sequence
        channels = min(problem.channels, triton.cdiv(_PROGRAMS, self.size), most // 2)
        batches = min(problem.batches, most // channels - 1)
        channels = min(problem.channels, most // (batches + 1))
        cuts = [slice(b, min(b + batches, problem.batches)) for b in range(0, problem.batches, batches)]
        for c in range(0, problem.channels, channels):
            yield slice(c, min(c + channels, problem.channels)), cuts

    def columns(self, kernel, rows, *arguments, **flags):
        kernel[(self.row // self.count, rows)](*arguments, C=self.count, **self.shape, **flags, num_warps=self.warps)

    def rows(self, kernel, grid, warps, *arguments, **flags):
        kernel[grid](*arguments, **self.shape, **flags, num_warps=warps)

    def spectra(self, channels: slice):
        p = self.problem
        k, skip = p.k[channels], None if p.skip is None else p.skip[channels]
        spectra = self.empty(k.size(0))
        self.columns(kernels.long_conv_taps_down_kernel, k.size(0), k, skip, spectra, self.tables, p.taps, k.stride(0),
                     0 if p.causal else k.stride(1), HAS_SKIP=skip is not None, CAUSAL=p.causal)
        self.taps_rows(spectra, False)
        return spectra

    def taps_rows(self, spectra, inverse):
        self.rows(kernels.long_conv_taps_rows_kernel, (self.size, spectra.size(0)), self.problem.ring.forward, spectra,
                  self.problem.tables, INVERSE=inverse)

    def down(self, x, gate, first):
        """Rows of x (B, H, L), which ends with the sequence, times a gate."""
        batches, channels = x.shape[:2]
        scratch = self.empty(batches, channels)
        self.columns(kernels.long_conv_down_kernel, batches * channels, x, gate, scratch, self.tables, channels,
                     self.problem.length, first, *steps(x), *steps(gate), GATED=gate is not None)
        return scratch

    def up(self, scratch, first, out, factor, other=None, other_factor=None):
        """What has these rows, times `factor` into out, times `other_factor` into other, those of them that are
        there."""
        batches, channels = scratch.shape[:2]
        self.columns(kernels.long_conv_up_kernel, batches * channels, scratch, out, factor, other, other_factor,
                     self.tables, channels, self.problem.length, first, *steps(other if out is None else out),
                     *steps(factor), *steps(other_factor), HAS_OUT=out is not None, HAS_FACTOR=factor is not None,
                     HAS_OTHER=other is not None)

    def forward(self, out):
        p = self.problem
        for channels, cuts in self.groups(1):
            spectra = self.spectra(channels)
            for batches in cuts:
                u, pre, post = (_part(t, batches, channels) for t in (p.u, p.pre, p.post))
                scratch = self.down(u, pre, 0)
                grid = (self.size * u.size(0), u.size(1))
                self.rows(kernels.long_conv_rows_kernel, grid, p.ring.forward, scratch, spectra, p.tables, 0, u.size(0),
                          u.size(1))
                self.up(scratch, p.history, out[batches, channels], post)

    def backward(self, sent, grad_u, sums, grad_pre, grad_post):
        """Into those gradients that are there; `sums` (channels, 1 or 2, taps) is that of the kernels."""
        p = self.problem
        needs = {"NEED_X": grad_u is not None or grad_pre is not None, "NEED_K": sums is not None,
                 "NEED_POST": grad_post is not None}
        for channels, cuts in self.groups(2):
            spectra = self.spectra(channels)
            added = self.empty(spectra.size(0)).zero_() if sums is not None else None
            for batches in cuts:
                of = (_part(t, batches, channels)
                      for t in (sent, p.u, p.pre, p.post, grad_u, grad_pre, grad_post))
                g, u, pre, post, to_u, to_pre, to_post = of
                grads = self.down(g, post, p.history) if needs["NEED_X"] or needs["NEED_K"] else None
                inputs = self.down(u, pre, 0) if needs["NEED_K"] or needs["NEED_POST"] else None
                self.rows(kernels.long_conv_rows_backward_kernel, (self.size, u.size(1)), p.ring.backward, grads,
                          inputs, spectra, added, p.tables, 0, u.size(0), u.size(1), **needs)
                if needs["NEED_X"]:
                    self.up(grads, 0, to_u, pre, to_pre, u)
                if needs["NEED_POST"]:
                    self.up(inputs, p.history, to_post, g)
            if added is not None:
                self.taps_rows(added, True)
                self.columns(kernels.long_conv_taps_up_kernel, added.size(0), added, sums[channels], self.tables,
                             p.taps, CAUSAL=p.causal)
