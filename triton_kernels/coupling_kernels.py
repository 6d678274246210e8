"""The coupling kernel: out = beta y + R(f + alpha x) and kept = keep x over flat, contiguous numbers.

Launched without fused products, so that its bits are those of PyTorch's multiplication and addition.
"""

import triton
import triton.language as tl


@triton.jit
def round_even(x):
    """The nearest whole number, ties to even; zeros keep their sign."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = tl.abs(x)
    # What reaches 2^23 is whole; below it, the sum with 2^23 has no place for a fraction.
    whole = tl.where(magnitude < 8388608.0, (magnitude + 8388608.0) - 8388608.0, magnitude)
    signed = (whole.to(tl.int32, bitcast=True) & 0x7FFFFFFF) | (bits & ~0x7FFFFFFF)
    return signed.to(tl.float32, bitcast=True)


@triton.jit
def coupling_kernel(
        f, y, x, out, kept, largest, count, alpha, beta, keep, up, down, HAS_Y: tl.constexpr, HAS_X: tl.constexpr,
        SUBTRACT: tl.constexpr, GRID: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr):
    """One program per BLOCK numbers. `largest` gets the bits of each program's largest magnitude: as whole numbers they
    have the order of the magnitudes, and NaN comes last."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    sums = tl.load(f + at, mask=there, other=0.0).to(tl.float32)
    if HAS_X:
        seen = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
        sums += alpha * seen
        if KEEP:
            tl.store(kept + at, (keep * seen).to(kept.dtype.element_ty), mask=there)
    if GRID:
        sums = round_even(sums * up) * down
    if HAS_Y:
        base = beta * tl.load(y + at, mask=there, other=0.0).to(tl.float32)
        sums = base - sums if SUBTRACT else base + sums
    if GRID:
        bits = sums.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        tl.store(largest + tl.program_id(0), tl.max(tl.where(there, bits, 0), 0))
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=there)
