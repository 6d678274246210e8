"""Long convolution kernels for rings of N = M R positions, three passes over memory: down the columns, along the rows
and up the columns. M is 16 or 256, R a ring of `long_conv_kernels`.

Position m R + r stands in column r. The first pass takes DFTs of size M down the columns, twisted so that row p holds a
polynomial modulo z^R = exp(2 pi i (1/4 - p) / M), and turns number r of it by exp(2 pi i ((1/4 - p) / M - 1/4) r / R),
which makes that z^R = i: what `long_conv_kernels` transforms, with the same tables for every row. The second pass
convolves the rows, the third undoes the first. Between passes numbers are in memory as (2, M, R): real and imaginary
parts.

A program of the first and third pass has C columns. A transform of 256 takes two steps of radix 16 there. `tables`
holds real and imaginary parts: matrix 1, for M = 256 twiddles (16, 16) and matrix 2, turns within a program (M, C),
turns to the first column of each program (R / C, M).
"""

import triton
import triton.language as tl

from .long_conv_kernels import (
    MATRIX,
    RADIX,
    back,
    both_parts,
    forth,
    gated,
    kernel_taps,
    line,
    matrix,
    planes,
    positions,
    product,
    times,
    times_conjugate,
    transform_complex,
)


@triton.jit
def entries(M: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """(M, C): where the numbers of a program stand, in the sequence as well as in memory between passes."""
    return line(M)[:, None] * R + (line(C)[None, :] + tl.program_id(0).to(tl.int64) * C)


@triton.jit
def turns(tables, M: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """(M, C): the turn of each number after the DFTs."""
    tables += MATRIX + (2 * M + MATRIX if M > RADIX else 0)
    p = line(M)[:, None]
    fine = tables + p * C + line(C)[None, :]
    f_re = tl.load(fine)
    f_im = tl.load(fine + M * C)
    coarse = tables + 2 * M * C + tl.program_id(0).to(tl.int64) * M + p
    c_re = tl.load(coarse)
    c_im = tl.load(coarse + M * (R // C))
    return f_re * c_re - f_im * c_im, f_re * c_im + f_im * c_re


@triton.jit
def second_step(re, im, tables, M: tl.constexpr, R: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr):
    """What follows the first product of the DFTs."""
    if M > RADIX:
        t_re, t_im = planes(tables + MATRIX, M // RADIX, C)
        a_re = forth(re * t_re - im * t_im, M * C)
        a_im = forth(re * t_im + im * t_re, M * C)
        f_re, f_im = matrix(tables + MATRIX + 2 * M)
        re, im = product(f_re, f_im, a_re, a_im, PRECISION)
        re = tl.reshape(tl.permute(tl.reshape(re, [RADIX, C, RADIX]), (0, 2, 1)), [M, C])
        im = tl.reshape(tl.permute(tl.reshape(im, [RADIX, C, RADIX]), (0, 2, 1)), [M, C])
    t_re, t_im = turns(tables, M, R, C)
    return re * t_re - im * t_im, re * t_im + im * t_re


@triton.jit
def down(x, tables, M: tl.constexpr, R: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr):
    """Rows of real x (M, C)."""
    x = tl.reshape(x, [RADIX, M // RADIX * C])
    f_re, f_im = matrix(tables)
    re = tl.dot(f_re, x, input_precision=PRECISION)
    im = tl.dot(f_im, x, input_precision=PRECISION)
    return second_step(re, im, tables, M, R, C, PRECISION)


@triton.jit
def down_complex(x_re, x_im, tables, M: tl.constexpr, R: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr):
    """Rows of x_re + i x_im."""
    x_re = tl.reshape(x_re, [RADIX, M // RADIX * C])
    x_im = tl.reshape(x_im, [RADIX, M // RADIX * C])
    f_re, f_im = matrix(tables)
    re, im = product(f_re, f_im, x_re, x_im, PRECISION)
    return second_step(re, im, tables, M, R, C, PRECISION)


@triton.jit
def before_last_step(scratch, tables, M: tl.constexpr, R: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr):
    """`second_step` undone for the rows in memory, but for a factor M / 16."""
    at = entries(M, R, C)
    s_re = tl.load(scratch + at)
    s_im = tl.load(scratch + M * R + at)
    t_re, t_im = turns(tables, M, R, C)
    re = s_re * t_re + s_im * t_im
    im = s_im * t_re - s_re * t_im
    if M > RADIX:
        re = tl.reshape(tl.permute(tl.reshape(re, [RADIX, RADIX, C]), (0, 2, 1)), [RADIX, RADIX * C])
        im = tl.reshape(tl.permute(tl.reshape(im, [RADIX, RADIX, C]), (0, 2, 1)), [RADIX, RADIX * C])
        f_re, f_im = matrix(tables + MATRIX + 2 * M)
        a_re, a_im = product(f_re, -f_im, re, im, PRECISION)
        a_re = back(a_re, M * C)
        a_im = back(a_im, M * C)
        t_re, t_im = planes(tables + MATRIX, M // RADIX, C)
        re = a_re * t_re + a_im * t_im
        im = a_im * t_re - a_re * t_im
    return re, im


@triton.jit
def up(scratch, tables, M: tl.constexpr, R: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr):
    """M times the real part of what has the rows in memory."""
    re, im = before_last_step(scratch, tables, M, R, C, PRECISION)
    f_re, f_im = matrix(tables, TURNED=True)
    y = tl.dot(f_im, im, tl.dot(f_re, re, input_precision=PRECISION), input_precision=PRECISION)
    return tl.reshape(y, [M, C])


@triton.jit
def keep(scratch, re, im, at, SIZE: tl.constexpr):
    tl.store(scratch + at, re)
    tl.store(scratch + SIZE + at, im)


@triton.jit
def long_conv_down_kernel(
        x, gate, scratch, tables, channels, length, first, x_batch, x_channel, gate_batch, gate_channel,
        GATED: tl.constexpr, M: tl.constexpr, R: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr):
    """First pass: rows of x, times a gate, which stands at positions `first` to length - 1. One program per (C columns,
    sequence and channel)."""
    row = tl.program_id(1).to(tl.int64)
    batch = row // channels
    channel = row % channels
    n = entries(M, R, C)
    inside = (n >= first) & (n < length)
    numbers = x + batch * x_batch + channel * x_channel - first
    numbers = gated(numbers, gate, batch * gate_batch + channel * gate_channel - first, n, inside, GATED)
    re, im = down(numbers, tables, M, R, C, PRECISION)
    keep(scratch + row * (2 * M * R), re, im, n, M * R)


@triton.jit
def long_conv_taps_down_kernel(
        k, skip, spectra, tables, taps, k_channel, k_row, HAS_SKIP: tl.constexpr, CAUSAL: tl.constexpr,
        M: tl.constexpr, R: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr):
    """First pass of the kernels: one program per (C columns, channel)."""
    channel = tl.program_id(1).to(tl.int64)
    n = entries(M, R, C)
    re, im = kernel_taps(k + channel * k_channel, skip + channel if HAS_SKIP else skip, n, taps, k_row, HAS_SKIP,
                         CAUSAL, M * R)
    if CAUSAL:
        re, im = down(re, tables, M, R, C, PRECISION)
    else:
        re, im = down_complex(re, im, tables, M, R, C, PRECISION)
    keep(spectra + channel * (2 * M * R), re, im, n, M * R)


@triton.jit
def long_conv_up_kernel(
        scratch, out, factor, other, other_factor, tables, channels, length, first, out_batch, out_channel,
        factor_batch, factor_channel, other_factor_batch, other_factor_channel, HAS_OUT: tl.constexpr,
        HAS_FACTOR: tl.constexpr, HAS_OTHER: tl.constexpr, M: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
        PRECISION: tl.constexpr):
    """Third pass: the real part of what has the rows, times a factor into `out`, times another into `other`. Both have
    the positions `first` to length - 1. One program per (C columns, sequence and channel)."""
    row = tl.program_id(1).to(tl.int64)
    batch = row // channels
    channel = row % channels
    y = up(scratch + row * (2 * M * R), tables, M, R, C, PRECISION)
    n = entries(M, R, C)
    inside = (n >= first) & (n < length)
    target = batch * out_batch + channel * out_channel - first + n
    if HAS_OTHER:
        scale = other_factor + batch * other_factor_batch + channel * other_factor_channel - first
        scale = tl.load(scale + n, mask=inside, other=0.0).to(tl.float32)
        tl.store(other + target, (y * scale).to(other.dtype.element_ty), mask=inside)
    if HAS_OUT:
        if HAS_FACTOR:
            scale = factor + batch * factor_batch + channel * factor_channel - first
            y *= tl.load(scale + n, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + target, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def long_conv_taps_up_kernel(sums, grad_k, tables, taps, CAUSAL: tl.constexpr, M: tl.constexpr, R: tl.constexpr,
                             C: tl.constexpr, PRECISION: tl.constexpr):
    """Third pass of the gradients of the kernels, into grad_k (channels, 1 or 2, taps): one program per (C columns,
    channel)."""
    channel = tl.program_id(1).to(tl.int64)
    sums += channel * (2 * M * R)
    n = entries(M, R, C)
    if CAUSAL:
        z = up(sums, tables, M, R, C, PRECISION) * (1.0 / (M * R))
        tl.store(grad_k + channel * taps + n, z, mask=n < taps)
    else:
        re, im = before_last_step(sums, tables, M, R, C, PRECISION)
        f_re, f_im = matrix(tables, TURNED=True)
        re, im = product(f_re, -f_im, re, im, PRECISION)
        z_re = tl.reshape(re, [M, C]) * (1.0 / (M * R))
        z_im = tl.reshape(im, [M, C]) * (-1.0 / (M * R))
        ahead = grad_k + channel * (2 * taps) + taps
        tl.store(ahead - taps + n, z_re, mask=n < taps)
        # Lag 0 of the taps that look ahead is the same as that of the others.
        tl.store(ahead + n, z_re, mask=n == 0)
        tl.store(ahead + M * R - n, z_im, mask=M * R - n < taps)


@triton.jit
def row(scratch, n, M: tl.constexpr, R: tl.constexpr):
    """Real and imaginary part of a row."""
    return tl.load(scratch + n), tl.load(scratch + M * R + n)


@triton.jit
def long_conv_taps_rows_kernel(spectra, tables, INVERSE: tl.constexpr, M: tl.constexpr, R: tl.constexpr,
                               PRECISION: tl.constexpr):
    """Second pass of the kernels, in place: rows to 1/N of their spectra, or spectra to R times the rows. One program
    per (row, channel)."""
    spectra += (tl.program_id(1).to(tl.int64) * (2 * M) + tl.program_id(0)) * R
    n = positions(R)
    re, im = row(spectra, n, M, R)
    if INVERSE:
        re, im = both_parts(re, im, tables, R, PRECISION)
    else:
        re, im = transform_complex(re, im, tables, R, PRECISION)
        re *= 1.0 / (M * R)
        im *= 1.0 / (M * R)
    keep(spectra, re, im, n, M * R)


@triton.jit(do_not_specialize=["nothing", "batches"])
def long_conv_rows_kernel(scratch, spectra, tables, nothing, batches, channels, M: tl.constexpr, R: tl.constexpr,
                          PRECISION: tl.constexpr):
    """Second pass, in place: rows to R times their product with those of the kernels. One program per (sequence, row,
    channel): those with the same kernel follow each other. `nothing` is 0, as in `long_conv_kernels`."""
    batch = (tl.program_id(0) % batches).to(tl.int64)
    p = (tl.program_id(0) // batches).to(tl.int64)
    channel = tl.program_id(1).to(tl.int64)
    scratch += ((batch * channels + channel) * (2 * M) + p) * R
    n = positions(R)
    re, im = row(scratch, n, M, R)
    re, im = transform_complex(re, im, tables, R, PRECISION)
    re, im = times(re, im, spectra + (channel * (2 * M) + p) * R, R, M * R)
    re, im = both_parts(re, im, tables + nothing, R, PRECISION)
    keep(scratch, re, im, n, M * R)


@triton.jit(do_not_specialize=["nothing", "batches"])
def long_conv_rows_backward_kernel(
        grads, inputs, spectra, sums, tables, nothing, batches, channels, NEED_X: tl.constexpr, NEED_K: tl.constexpr,
        NEED_POST: tl.constexpr, M: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr):
    """Second pass of the backward: the rows of the outgoing gradients become those of the gradients of the inputs, the
    rows of the inputs those of the outputs. Products of their spectra are added to `sums`, sequence after sequence.
    One program per (row, channel)."""
    p = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1).to(tl.int64)
    own = (channel * (2 * M) + p) * R
    spectrum = spectra + own
    n = positions(R)
    for batch in range(batches):
        at = tl.cast(batch, tl.int64) * channels * (2 * M * R) + own
        tables += nothing
        spectrum += nothing
        if NEED_X or NEED_K:
            g_re, g_im = row(grads + at, n, M, R)
            g_re, g_im = transform_complex(g_re, g_im, tables, R, PRECISION)
        if NEED_X:
            s_re, s_im = times_conjugate(g_re, g_im, spectrum, R, M * R)
            s_re, s_im = both_parts(s_re, s_im, tables + nothing, R, PRECISION)
            keep(grads + at, s_re, s_im, n, M * R)
        if NEED_K or NEED_POST:
            x_re, x_im = row(inputs + at, n, M, R)
            x_re, x_im = transform_complex(x_re, x_im, tables + 2 * nothing, R, PRECISION)
        if NEED_K:
            # Kept in memory: two more tiles would not fit into the registers beside a transform.
            d_re, d_im = row(sums + own, n, M, R)
            d_re += g_re * x_re + g_im * x_im
            d_im += g_im * x_re - g_re * x_im
            keep(sums + own, d_re, d_im, n, M * R)
        if NEED_POST:
            x_re, x_im = times(x_re, x_im, spectrum + nothing, R, M * R)
            x_re, x_im = both_parts(x_re, x_im, tables + 3 * nothing, R, PRECISION)
            keep(inputs + at, x_re, x_im, n, M * R)
