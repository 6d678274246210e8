"""Short convolution kernels: sums over a few taps of tiles whose rows are flattened pairs of batch and channel.

Position t of a row is input t of x for t >= 0 and number reach + t of the state before that, reach = taps - 1. An input
is read once per tap, all but the first time from the cache. No atomics: every sum has one program and one order.
"""

import triton
import triton.language as tl


@triton.jit
def past(x, state, t, reach, mask, HAS_STATE: tl.constexpr):
    """Inputs at positions t of the rows that x and state point to, in fp32; zeros outside."""
    values = tl.load(x + t, mask=mask & (t >= 0), other=0.0).to(tl.float32)
    if HAS_STATE:
        values += tl.load(state + (t + reach), mask=mask & (t < 0), other=0.0).to(tl.float32)
    return values


@triton.jit
def tile(channels, rows, blocks, first, ROWS: tl.constexpr, POSITIONS: tl.constexpr):
    """Rows (ROWS, 1), their batches and channels, whether they exist, and positions (1, POSITIONS) of a program."""
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    t = (program % blocks).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)[None, :] - first
    return row, row // channels, row % channels, row < rows, t


@triton.jit
def short_conv_forward_kernel(
        x, weight, bias, state, grad_out, out, channels, rows, length, taps, blocks, x_batch, x_channel, grad_batch,
        grad_channel, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, SILU: tl.constexpr, GRADIENT: tl.constexpr,
        ROWS: tl.constexpr, POSITIONS: tl.constexpr):
    """One program per (ROWS rows, POSITIONS positions). With GRADIENT the output is grad_out times the derivative of
    SiLU at the sums instead of SiLU of them."""
    row, batch, channel, there, t = tile(channels, rows, blocks, 0, ROWS, POSITIONS)
    reach = taps - 1
    inputs = x + batch * x_batch + channel * x_channel
    before = state + row * reach if HAS_STATE else state
    inside = there & (t < length)
    y = tl.zeros([ROWS, POSITIONS], tl.float32)
    if HAS_BIAS:
        y += tl.load(bias + channel, mask=there, other=0.0).to(tl.float32)
    for w in range(taps):
        scale = tl.load(weight + channel * taps + w, mask=there, other=0.0).to(tl.float32)
        y += scale * past(inputs, before, t - reach + w, reach, inside, HAS_STATE)
    if SILU:
        share = tl.sigmoid(y)
        if GRADIENT:
            g = tl.load(grad_out + batch * grad_batch + channel * grad_channel + t, mask=inside, other=0.0)
            y = g.to(tl.float32) * share * (1.0 + y * (1.0 - share))
        else:
            y *= share
    tl.store(out + row * length + t, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def short_conv_input_gradient_kernel(
        grad, weight, grad_x, grad_state, channels, rows, length, taps, blocks, first, grad_batch, grad_channel,
        NEED_X: tl.constexpr, NEED_STATE: tl.constexpr, ROWS: tl.constexpr, POSITIONS: tl.constexpr):
    """One program per (ROWS rows, POSITIONS positions from -first on). grad is that of the sums."""
    row, batch, channel, there, t = tile(channels, rows, blocks, first, ROWS, POSITIONS)
    reach = taps - 1
    given = grad + batch * grad_batch + channel * grad_channel
    dx = tl.zeros([ROWS, POSITIONS], tl.float32)
    for w in range(taps):
        scale = tl.load(weight + channel * taps + w, mask=there, other=0.0).to(tl.float32)
        at = t + reach - w
        dx += scale * tl.load(given + at, mask=there & (at >= 0) & (at < length), other=0.0).to(tl.float32)
    if NEED_X:
        tl.store(grad_x + row * length + t, dx.to(grad_x.dtype.element_ty), mask=there & (t >= 0) & (t < length))
    if NEED_STATE:
        tl.store(grad_state + row * reach + (t + reach), dx.to(grad_state.dtype.element_ty), mask=there & (t < 0))


@triton.jit
def short_conv_weight_gradient_kernel(
        grad, x, state, sums, channels, batches, length, taps, blocks, share, grad_batch, grad_channel, x_batch,
        x_channel, HAS_STATE: tl.constexpr, TAPS: tl.constexpr, POSITIONS: tl.constexpr):
    """One program per (channel, TAPS taps, `share` blocks of POSITIONS positions, counted through the batch). Writes
    sums (shares, channels, taps + 1): the gradient of the weight and, behind it, of the bias."""
    channel = tl.program_id(0).to(tl.int64)
    part = tl.program_id(2).to(tl.int64)
    w = tl.program_id(1) * TAPS + tl.arange(0, TAPS)[:, None]
    reach = taps - 1
    products = tl.zeros([TAPS, POSITIONS], tl.float32)
    total = tl.zeros([1, POSITIONS], tl.float32)
    begin = tl.program_id(2) * share
    for block in range(begin, tl.minimum(begin + share, batches * blocks)):
        batch = (block // blocks).to(tl.int64)
        t = (block % blocks).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)[None, :]
        g = tl.load(grad + batch * grad_batch + channel * grad_channel + t, mask=t < length, other=0.0).to(tl.float32)
        before = state + (batch * channels + channel) * reach if HAS_STATE else state
        inputs = x + batch * x_batch + channel * x_channel
        inside = (w < taps) & (t < length)
        products += g * past(inputs, before, t - reach + w, reach, inside, HAS_STATE)
        total += g
    target = sums + (part * channels + channel) * (taps + 1)
    tl.store(target + w, tl.sum(products, 1, keep_dims=True), mask=w < taps)
    if tl.program_id(1) == 0:
        tl.store(target + taps + tl.arange(0, 1)[:, None], tl.sum(total, 1, keep_dims=True))
