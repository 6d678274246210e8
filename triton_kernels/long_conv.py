"""Launchers of the Triton long convolutions: forward, backward, and what they support.

Kernels are transformed first, one program each. Then a program takes a channel and its share of the batch, a row after
the other, each from input to output within the chip; the backward sums the gradient of a kernel over them as a
spectrum. Longer inputs take three passes (`long_conv_passes`). The ring is the smallest of `_RINGS`, alone or times a
number of columns, that holds the input; it and the shares depend on shapes alone, nothing is tuned at run time.
Unverified on hardware: runs and timings there are still due.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton

from . import long_conv_kernels as kernels
from .attention import architecture
from .attention import supports as _device_supports
from .long_conv_passes import COLUMN_SIZES, Passes, roots
from .rows import adjacent, on, steps

_PROGRAMS = 528  # that fill a large GPU a few times over


class Ring(NamedTuple):
    """Positions of a ring, warps of a program forward and backward."""

    size: int
    forward: int
    backward: int


# With these warps nothing spills but a few registers of the largest backward, of which twice the warps spill more
# (tests/test_triton_compile.py).
_RINGS = (Ring(256, 1, 1), Ring(512, 2, 2), Ring(1024, 4, 4), Ring(2048, 4, 8), Ring(4096, 8, 8))
MAX_LENGTH = COLUMN_SIZES[-1] * _RINGS[-1].size


def supports(device: torch.device, dtype: torch.dtype, sizes: Mapping[str, int]) -> str | None:
    """None when the launchers take such a request, else the reason they do not; sizes: positions, where known."""
    reason = _device_supports(device, dtype, {})
    if reason is None and sizes.get("positions", 0) > MAX_LENGTH:
        return f"triton kernels take up to {MAX_LENGTH} positions, state included, not {sizes['positions']}"
    return reason


@functools.cache
def _tables(size: int, device: torch.device) -> torch.Tensor:
    """What `long_conv_kernels` calls tables. The twist w takes a quarter turn along all positions, against the sense of
    the transform."""
    radix, last = kernels.RADIX.value, size // kernels.RADIX.value**2
    p = torch.arange(radix, device="cpu")[:, None]
    rows, columns, short = p.mT, torch.arange(size // radix, device="cpu"), torch.arange(last, device="cpu")
    parts = [
        roots(4 * p * rows - rows, 4 * radix),
        roots(4 * p * columns - columns, 4 * size),
        roots(p * rows, radix),
        roots(p * short, size // radix),
        torch.stack([f.kron(torch.eye(radix // last, device="cpu").double())
                     for f in roots(short[:, None] * short, last)]),
    ]
    return torch.cat([t.flatten() for t in parts]).float().to(device)


def ring_of(length: int) -> tuple[int, Ring]:
    """The smallest that holds so many positions: its columns and the ring of its rows."""
    for columns in (1, *COLUMN_SIZES):
        for ring in _RINGS:
            if columns * ring.size >= length:
                return columns, ring
    raise ValueError(f"long_conv: triton kernels take up to {MAX_LENGTH} positions, got {length}")


class _Problem:
    """What both launches share: sizes, arguments in the layout the kernels read, the shares of the batch."""

    def __init__(self, u, k, skip, pre_gate, post_gate, history, causal):
        self.batches, self.channels, self.length = u.shape
        self.history, self.causal = history, causal
        self.empty = self.batches * self.channels * (self.length - history) == 0
        self.u = adjacent(u)
        self.k = k if k.stride(-1) == 1 else k.contiguous()
        self.taps = min(k.size(-1), self.length)  # further ones meet no input
        self.skip = None if skip is None else skip.contiguous()
        self.pre, self.post = (None if t is None else adjacent(t) for t in (pre_gate, post_gate))
        self.on = u.device
        self.columns, self.ring = ring_of(self.length)
        groups = min(self.batches, triton.cdiv(_PROGRAMS, max(self.channels, 1)))
        self.rows = triton.cdiv(self.batches, max(groups, 1))
        self.groups = triton.cdiv(self.batches, max(self.rows, 1))
        self.tables = _tables(self.ring.size, self.on)
        precision = "tf32x3" if architecture(self.on) else "ieee"
        self.common = {"N": self.ring.size, "PRECISION": precision, "num_stages": 1}

    def spectra(self):
        """(channels, real and imaginary part, positions), in the order of the kernels."""
        spectra = torch.empty((self.channels, 2, self.ring.size), dtype=torch.float32, device=self.on)
        kernels.long_conv_spectrum_kernel[(self.channels,)](
            self.k, self.skip, spectra, self.tables, self.taps, self.k.stride(0),
            0 if self.causal else self.k.stride(1), HAS_SKIP=self.skip is not None, CAUSAL=self.causal,
            num_warps=self.ring.forward, **self.common)
        return spectra

    def launch(self, kernel, tensors, own, flags, warps):
        """Runs a kernel; `tensors` are those before and after the ones that both kernels take."""
        before, after = tensors
        kernel[(self.channels, self.groups)](
            *before, self.u, self.spectra(), self.pre, self.post, *after, self.tables, 0, self.batches,
            self.rows, self.channels, self.length, self.history, *own, *steps(self.u), *steps(self.pre),
            *steps(self.post), HAS_PRE=self.pre is not None, HAS_POST=self.post is not None, **flags,
            num_warps=warps, **self.common)


def long_conv(u, k, skip=None, pre_gate=None, post_gate=None, history=0, causal=True):
    """u (B, H, L), k (H, Lk) or (H, 2, Lk) -> (B, H, L - history); gates and skip as in `effkern.long_conv`."""
    problem = _Problem(u, k, skip, pre_gate, post_gate, history, causal)
    out = torch.empty((*u.shape[:2], problem.length - history), dtype=u.dtype, device=u.device)
    if not problem.empty:
        with on(u.device):
            if problem.columns > 1:
                Passes(problem).forward(out)
            else:
                problem.launch(kernels.long_conv_forward_kernel, ((), (out,)), (), {}, problem.ring.forward)
    return out


def long_conv_backward(grad_out, u, k, skip=None, pre_gate=None, post_gate=None, history=0, causal=True, need_u=True,
                       need_k=True, need_skip=True, need_pre=True, need_post=True):
    """(grad_u, grad_k, grad_skip, grad_pre, grad_post), each of shape (0,) where it is not needed or its argument not
    there. Sums over the batch are those of each program's rows in turn, then of the programs in turn."""
    problem = _Problem(u, k, skip, pre_gate, post_gate, history, causal)
    needs = [need and t is not None for need, t in zip((need_u, need_k, need_skip, need_pre, need_post),
                                                      (u, k, skip, pre_gate, post_gate))]
    like = [u if t is None else t for t in (u, k, skip, pre_gate, post_gate)]
    make = torch.zeros if problem.empty else torch.empty
    grads = [make(t.shape if need else (0,), dtype=t.dtype, device=u.device) for t, need in zip(like, needs)]
    if problem.empty or not any(needs):
        return tuple(grads)
    sums_shape = (1 if problem.columns > 1 else problem.groups, problem.channels, 1 if causal else 2, problem.taps)
    sums = torch.empty(sums_shape, dtype=torch.float32, device=u.device)
    sent = adjacent(grad_out)
    # The gradient of skip is that of the tap at lag 0.
    flags = {"NEED_U": needs[0], "NEED_K": needs[1] or needs[2], "NEED_PRE": needs[3], "NEED_POST": needs[4]}
    with on(u.device):
        if problem.columns > 1:
            wanted = zip((grads[0], sums[0], grads[3], grads[4]), flags.values())
            Passes(problem).backward(sent, *(t if need else None for t, need in wanted))
        else:
            problem.launch(kernels.long_conv_backward_kernel, ((sent,), (grads[0], sums, *grads[3:])),
                           (problem.taps, *steps(sent)), {**flags, "CAUSAL": causal}, problem.ring.backward)
    if needs[1] or needs[2]:
        sums = sums.sum(0)
    if needs[1]:
        grad_k = grads[1].view(sums.size(0), sums.size(1), -1)
        grad_k[..., : problem.taps].copy_(sums)
        grad_k[..., problem.taps :].zero_()
    if needs[2]:
        grads[2].copy_(sums[:, 0, 0])
    return tuple(grads)
