"""Long convolution kernels: right-angle rings of N = 256 to 4096 positions, transforms as products, no atomics.

With w[n] = exp(i pi n / 2N) the product of FFT(w u) and FFT(w k) is that of polynomials in z with z^N = i: what leaves
the N positions returns as an imaginary part, so the real part of conj(w) IFFT(.) is the causal convolution, without
zero padding. Taps that look ahead are negative powers, z^-j = -i z^(N-j).

A transform takes three steps of radix 16, 16 and N/256, each a product of a 16 x 16 matrix with a tile (16, N/16), so
that matrices take few registers and nothing but data is spread over the warps. Entry (a, m) of the first tile is
position a N/16 + m; the matrix is that of the DFT, its columns times w's factor of a. Twiddles follow, which carry w's
factor of m, and the transposed tile, seen as (16, N/16) again, is what the next step works on. A radix below 16 works
on as many rows at once as fill 16: its matrix is the Kronecker product with an identity. The inverse takes the same
steps back, so spectra stay in the order that these leave them in. `tables` holds real and imaginary parts: matrix 1,
twiddles (16, N/16), matrix 2, twiddles (16, N/256), matrix 3.
"""

import triton
import triton.language as tl

RADIX = tl.constexpr(16)
MATRIX = tl.constexpr(512)  # numbers of a matrix in the tables


@triton.jit
def line(SIZE: tl.constexpr):
    """0 to SIZE - 1 in 64 bits: differences then become part of the instructions that read and write, where in 32 each
    address would take registers of its own."""
    return tl.arange(0, SIZE).to(tl.int64)


@triton.jit
def matrix(source, TURNED: tl.constexpr = False):
    """Real and imaginary part of a 16 x 16 matrix, transposed when TURNED."""
    ri = line(RADIX)[:, None]
    ci = line(RADIX)[None, :]
    source += ci * RADIX + ri if TURNED else ri * RADIX + ci
    return tl.load(source), tl.load(source + RADIX * RADIX)


@triton.jit
def planes(source, COLUMNS: tl.constexpr, EACH: tl.constexpr, APART: tl.constexpr = 0):
    """Real and imaginary part of (16, COLUMNS) numbers, each column EACH times. The imaginary part follows, or is APART
    behind."""
    ci = (tl.arange(0, COLUMNS * EACH) // EACH).to(tl.int64)[None, :]
    source += line(RADIX)[:, None] * COLUMNS + ci
    return tl.load(source), tl.load(source + (APART if APART else RADIX * COLUMNS))


@triton.jit
def product(f_re, f_im, x_re, x_im, PRECISION: tl.constexpr):
    """f x of complex numbers."""
    re = tl.dot(f_re, x_re, input_precision=PRECISION)
    im = tl.dot(f_im, x_re, input_precision=PRECISION)
    im = tl.dot(f_re, x_im, im, input_precision=PRECISION)
    re = tl.dot(-f_im, x_im, re, input_precision=PRECISION)
    return re, im


@triton.jit
def forth(x, N: tl.constexpr):
    """A tile after a step -> before the next."""
    return tl.reshape(tl.trans(x), [RADIX, N // RADIX])


@triton.jit
def back(x, N: tl.constexpr):
    """`forth` undone."""
    return tl.trans(tl.reshape(x, [N // RADIX, RADIX]))


@triton.jit
def later_steps(re, im, tables, N: tl.constexpr, PRECISION: tl.constexpr):
    """What follows the first product of a transform."""
    R3: tl.constexpr = N // (RADIX * RADIX)
    t_re, t_im = planes(tables + MATRIX, N // RADIX, 1)
    a_re = forth(re * t_re - im * t_im, N)
    a_im = forth(re * t_im + im * t_re, N)
    f_re, f_im = matrix(tables + MATRIX + 2 * N)
    s_re, s_im = product(f_re, f_im, a_re, a_im, PRECISION)
    if R3 > 1:
        t_re, t_im = planes(tables + 2 * MATRIX + 2 * N, R3, RADIX)
        a_re = forth(s_re * t_re - s_im * t_im, N)
        a_im = forth(s_re * t_im + s_im * t_re, N)
        f_re, f_im = matrix(tables + 2 * MATRIX + 2 * N + 2 * RADIX * R3)
        s_re, s_im = product(f_re, f_im, a_re, a_im, PRECISION)
    return s_re, s_im


@triton.jit
def earlier_steps(s_re, s_im, tables, N: tl.constexpr, PRECISION: tl.constexpr):
    """`later_steps` undone, but for a factor N/16."""
    R3: tl.constexpr = N // (RADIX * RADIX)
    if R3 > 1:
        f_re, f_im = matrix(tables + 2 * MATRIX + 2 * N + 2 * RADIX * R3)
        a_re, a_im = product(f_re, -f_im, s_re, s_im, PRECISION)
        a_re = back(a_re, N)
        a_im = back(a_im, N)
        t_re, t_im = planes(tables + 2 * MATRIX + 2 * N, R3, RADIX)
        s_re = a_re * t_re + a_im * t_im
        s_im = a_im * t_re - a_re * t_im
    f_re, f_im = matrix(tables + MATRIX + 2 * N)
    a_re, a_im = product(f_re, -f_im, s_re, s_im, PRECISION)
    a_re = back(a_re, N)
    a_im = back(a_im, N)
    t_re, t_im = planes(tables + MATRIX, N // RADIX, 1)
    return a_re * t_re + a_im * t_im, a_im * t_re - a_re * t_im


@triton.jit
def transform(x, tables, N: tl.constexpr, PRECISION: tl.constexpr):
    """Spectrum of real x."""
    f_re, f_im = matrix(tables)
    re = tl.dot(f_re, x, input_precision=PRECISION)
    im = tl.dot(f_im, x, input_precision=PRECISION)
    return later_steps(re, im, tables, N, PRECISION)


@triton.jit
def transform_complex(x_re, x_im, tables, N: tl.constexpr, PRECISION: tl.constexpr):
    """Spectrum of x_re + i x_im."""
    f_re, f_im = matrix(tables)
    re, im = product(f_re, f_im, x_re, x_im, PRECISION)
    return later_steps(re, im, tables, N, PRECISION)


@triton.jit
def real_part(s_re, s_im, tables, N: tl.constexpr, PRECISION: tl.constexpr):
    """N times the real part of what has the spectrum s."""
    re, im = earlier_steps(s_re, s_im, tables, N, PRECISION)
    f_re, f_im = matrix(tables, TURNED=True)
    return tl.dot(f_im, im, tl.dot(f_re, re, input_precision=PRECISION), input_precision=PRECISION)


@triton.jit
def both_parts(s_re, s_im, tables, N: tl.constexpr, PRECISION: tl.constexpr):
    """N times what has the spectrum s."""
    re, im = earlier_steps(s_re, s_im, tables, N, PRECISION)
    f_re, f_im = matrix(tables, TURNED=True)
    return product(f_re, -f_im, re, im, PRECISION)


@triton.jit
def positions(N: tl.constexpr):
    """(16, N/16): the position of each entry of a tile."""
    return line(RADIX)[:, None] * (N // RADIX) + line(N // RADIX)[None, :]


@triton.jit
def kernel_taps(k, skip, n, taps, k_row, HAS_SKIP: tl.constexpr, CAUSAL: tl.constexpr, N: tl.constexpr):
    """Real and imaginary part of a kernel on the ring, at positions n. Taps that look ahead stand k_row after the
    others; skip is one more tap at lag 0."""
    re = tl.load(k + n, mask=n < taps, other=0.0).to(tl.float32)
    im = tl.zeros_like(re)
    if HAS_SKIP:
        re += tl.where(n == 0, tl.load(skip).to(tl.float32), 0.0)
    if not CAUSAL:
        re += tl.load(k + k_row + n, mask=n == 0, other=0.0).to(tl.float32)
        im -= tl.load(k + k_row + N - n, mask=N - n < taps, other=0.0).to(tl.float32)
    return re, im


@triton.jit
def long_conv_spectrum_kernel(k, skip, spectra, tables, taps, k_channel, k_row, HAS_SKIP: tl.constexpr,
                              CAUSAL: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr):
    """1/N of the spectrum of each kernel, (channels, real and imaginary part, 16, N/16): one program per channel."""
    channel = tl.program_id(0).to(tl.int64)
    n = positions(N)
    re, im = kernel_taps(k + channel * k_channel, skip + channel if HAS_SKIP else skip, n, taps, k_row, HAS_SKIP,
                         CAUSAL, N)
    if CAUSAL:
        re, im = transform(re, tables, N, PRECISION)
    else:
        re, im = transform_complex(re, im, tables, N, PRECISION)
    target = spectra + channel * (2 * N) + n
    tl.store(target, re * (1.0 / N))
    tl.store(target + N, im * (1.0 / N))


@triton.jit
def times(re, im, spectra, N: tl.constexpr, APART: tl.constexpr = 0):
    """Product with the spectrum of a kernel."""
    k_re, k_im = planes(spectra, N // RADIX, 1, APART)
    return re * k_re - im * k_im, re * k_im + im * k_re


@triton.jit
def times_conjugate(re, im, spectra, N: tl.constexpr, APART: tl.constexpr = 0):
    """Product with the conjugate of the spectrum of a kernel."""
    k_re, k_im = planes(spectra, N // RADIX, 1, APART)
    return re * k_re + im * k_im, im * k_re - re * k_im


@triton.jit
def gated(row, gate, at, n, mask, GATED: tl.constexpr):
    """The numbers n of a row, times those of a gate from `at` on."""
    x = tl.load(row + n, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        x *= tl.load(gate + at + n, mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit(do_not_specialize=["nothing", "batches", "rows"])
def long_conv_forward_kernel(
        u, spectra, pre, post, out, tables, nothing, batches, rows, channels, length, history, u_batch, u_channel,
        pre_batch, pre_channel, post_batch, post_channel, HAS_PRE: tl.constexpr, HAS_POST: tl.constexpr,
        N: tl.constexpr, PRECISION: tl.constexpr):
    """One program per (channel, `rows` sequences of the batch); spectra are those of the kernels. Inputs stand at
    positions 0 to length - 1, outputs at those from `history` on.

    `nothing` is 0, which the compiler does not know: what is read at another address is read again, where keeping it
    would cost registers."""
    channel = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * rows
    n = positions(N)
    inside = n < length
    sent = inside & (n >= history)
    spectrum = spectra + channel * (2 * N)
    for row in range(begin, tl.minimum(begin + rows, batches)):
        batch = tl.cast(row, tl.int64)
        inputs = u + batch * u_batch + channel * u_channel
        before = batch * pre_batch + channel * pre_channel
        tables += nothing
        spectrum += nothing
        x_re, x_im = transform(gated(inputs, pre, before, n, inside, HAS_PRE), tables, N, PRECISION)
        x_re, x_im = times(x_re, x_im, spectrum, N)
        y = real_part(x_re, x_im, tables + nothing, N, PRECISION)
        if HAS_POST:
            after = batch * post_batch + channel * post_channel - history
            y *= tl.load(post + after + n, mask=sent, other=0.0).to(tl.float32)
        target = (batch * channels + channel) * (length - history) - history
        tl.store(out + target + n, y.to(out.dtype.element_ty), mask=sent)


@triton.jit(do_not_specialize=["nothing", "batches", "rows"])
def long_conv_backward_kernel(
        grad_out, u, spectra, pre, post, grad_u, grad_k, grad_pre, grad_post, tables, nothing, batches, rows, channels,
        length, history, taps, grad_batch, grad_channel, u_batch, u_channel, pre_batch, pre_channel, post_batch,
        post_channel, HAS_PRE: tl.constexpr, HAS_POST: tl.constexpr, NEED_U: tl.constexpr, NEED_K: tl.constexpr,
        NEED_PRE: tl.constexpr, NEED_POST: tl.constexpr, CAUSAL: tl.constexpr, N: tl.constexpr,
        PRECISION: tl.constexpr):
    """One program per (channel, `rows` sequences of the batch), as forward. The gradient of k is summed over those
    as a spectrum and written to grad_k (shares of the batch, channels, 1 or 2, taps)."""
    channel = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * rows
    n = positions(N)
    inside = n < length
    sent = inside & (n >= history)
    d_re = tl.zeros([RADIX, N // RADIX], tl.float32)
    d_im = tl.zeros([RADIX, N // RADIX], tl.float32)
    spectrum = spectra + channel * (2 * N)
    for row in range(begin, tl.minimum(begin + rows, batches)):
        batch = tl.cast(row, tl.int64)
        given = grad_out + batch * grad_batch + channel * grad_channel - history
        after = batch * post_batch + channel * post_channel - history
        inputs = u + batch * u_batch + channel * u_channel
        before = batch * pre_batch + channel * pre_channel
        target = (batch * channels + channel) * length
        tables += nothing
        spectrum += nothing
        if NEED_U or NEED_PRE or NEED_K:
            g_re, g_im = transform(gated(given, post, after, n, sent, HAS_POST), tables, N, PRECISION)
        if NEED_U or NEED_PRE:
            s_re, s_im = times_conjugate(g_re, g_im, spectrum, N)
            dx = real_part(s_re, s_im, tables + nothing, N, PRECISION)
            if NEED_PRE:
                x = tl.load(inputs + n, mask=inside, other=0.0).to(tl.float32)
                tl.store(grad_pre + target + n, (x * dx).to(grad_pre.dtype.element_ty), mask=inside)
            if NEED_U:
                if HAS_PRE:
                    dx *= tl.load(pre + before + n, mask=inside, other=0.0).to(tl.float32)
                tl.store(grad_u + target + n, dx.to(grad_u.dtype.element_ty), mask=inside)
        if NEED_K or NEED_POST:
            x_re, x_im = transform(gated(inputs + nothing, pre, before + nothing, n, inside, HAS_PRE),
                                   tables + 2 * nothing, N, PRECISION)
        if NEED_K:
            d_re += g_re * x_re + g_im * x_im
            d_im += g_im * x_re - g_re * x_im
        if NEED_POST:
            x_re, x_im = times(x_re, x_im, spectrum + nothing, N)
            y = real_part(x_re, x_im, tables + 3 * nothing, N, PRECISION)
            y *= tl.load(given + nothing + n, mask=sent, other=0.0).to(tl.float32)
            target = (batch * channels + channel) * (length - history) - history
            tl.store(grad_post + target + n, y.to(grad_post.dtype.element_ty), mask=sent)
    part = tl.program_id(1).to(tl.int64) * channels + channel
    if NEED_K:
        if CAUSAL:
            z = real_part(d_re, d_im, tables, N, PRECISION) * (1.0 / N)
            tl.store(grad_k + part * taps + n, z, mask=n < taps)
        else:
            z_re, z_im = both_parts(d_re, d_im, tables, N, PRECISION)
            z_re *= 1.0 / N
            z_im *= -1.0 / N
            ahead = grad_k + part * (2 * taps) + taps
            tl.store(ahead - taps + n, z_re, mask=n < taps)
            # Lag 0 of the taps that look ahead is the same as that of the others.
            tl.store(ahead + n, z_re, mask=n == 0)
            tl.store(ahead + N - n, z_im, mask=N - n < taps)
