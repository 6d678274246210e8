"""Long convolutions: one kernel as long as the input for each channel, with gates, a skip and streaming."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effkern import backends
from effkern.ops import registry
from effkern.ops._dispatch import (
    FAST_DTYPES,
    refuse_all_but_fast,
    refuse_all_but_floating,
    refuse_forward_mode,
    triton_refusal,
    without_autocast,
)
from effkern.ops._long_conv_checks import (
    check_convolution,
    check_dtype,
    check_kernel,
    check_kinds,
    check_parts,
)
from effkern.ops._long_conv_cost import long_conv_bytes, long_conv_flops
from effkern.ops._long_conv_dispatch import DOUBLE_BACKWARD
from effkern.ops._long_conv_samples import bad_samples, calls, samples
from effkern.ops._long_conv_spectrum import Spectrum
from effkern.reference import long_conv as reference

__all__ = ["Spectrum", "long_conv", "long_conv_bytes", "long_conv_flops", "long_conv_prepare"]

_OPS = torch.ops.effkern
LONGEST = 1 << 34  # positions of an input, as in csrc/long_conv/operands.h


def _kernel(u: Tensor, asked: str | None) -> Any:
    """The dispatcher's op for a request, None for the reference."""
    name = backends.forced() if asked is None else asked
    if name is None:
        usable = u.dtype in FAST_DTYPES and u.device.type in ("cpu", "cuda", "meta")
        return _OPS.long_conv.default if usable else None
    backends.check_name(name)
    if name == "reference":
        return None
    backends.select("long_conv", u.device.type, u.dtype, {}, name)
    return getattr(_OPS, "long_conv_triton" if name == "triton" else "long_conv").default


def long_conv(
    u: Tensor,
    k: Tensor | Spectrum,
    *,
    skip: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    causal: bool = True,
    state: Tensor | None = None,
    return_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolves each channel with a kernel of its own, which may be as long as the input.

        x = pre_gate u          out[b, h, t] = post_gate (sum_{j <= t} k[h, j] x[b, h, t - j] + skip[h] x[b, h, t])

    With causal=False the kernel has a second row, whose taps look ahead: sum_j k[h, 1, j] x[b, h, t + j] more. Lag 0
    then counts from both rows. Any length works, odd and prime ones included.

    A long input can come in parts, down to one position at a time: ask for `return_state` from the first part on, and
    give each part the state of the one before. The results are those of the whole input up to rounding.

    Args:
        u: (B, H, L). float32, bfloat16 or float16; float64 through the reference. Any strides; positions that are not
            adjacent are copied once.
        k: (H, Lk) with Lk <= L (or any Lk, in parts); (H, 2, Lk) with causal=False. float32 or u's dtype. Or what
            `long_conv_prepare` made of such a kernel, which saves transforming it.
        skip: (H,), float32 or u's dtype: the weight of the input itself.
        pre_gate: (B, H, L), u's dtype, on the input.
        post_gate: (B, H, L), u's dtype, on the output.
        causal: whether an output depends on its own and earlier inputs only.
        state: (B, H, Lk - 1), u's dtype: the gated inputs before u. Causal convolutions only.
        return_state: whether the state after u is returned too. Without `state` the input starts here, after zeros.
        backend: "cpu", "triton" (up to 2^20 positions, state included; transforms k anew even where it is prepared) or
            "reference"; None leaves the choice to `effkern.backends`.

    Returns:
        out (B, H, L) in u's dtype, contiguous; with return_state=True (out, state). Differentiable in every tensor,
        through the state too. No batch, channels or positions give an empty result.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: backend is unknown; state or return_state with causal=False.
        RuntimeError: shapes, dtypes or devices do not fit; the kernel is longer than an input that is not given in
            parts; the spectrum is too short for the input and its state, or k was changed in place since. The message
            names the argument, what was expected and what came.
        effkern.backends.Unavailable: the backend asked for cannot run.
        NotImplementedError: differentiated twice or in forward mode, on any backend but the reference.

    Numerics:
        float32 inside, rounded once at the end, but a state holds gated inputs in u's dtype. The error is that of a
        float32 FFT, spread evenly over a row: at most twice that of torch.fft's, relative to the norm of the output.
        Deterministic: the bits do not depend on the number of threads. A NaN stays in its row of the output; in
        gradients of k and skip, in its channel. Autocast changes nothing: u and its gates keep their dtype.

    Cost:
        `long_conv_flops`, `long_conv_bytes`. Only the arguments are saved for the backward pass, which transforms them
        again and sums the gradient of k over the batch as a spectrum. Parts copy their state; a single position takes
        Lk multiplications and no transform.

    Source:
        Fu et al. 2023 (Simple Hardware-Efficient Long Convolutions for Sequence Modeling), section 3; gates and skip
        as in Poli et al. 2023 (Hyena Hierarchy), section 3.
    """
    spectrum, taps = (k, k.k) if isinstance(k, Spectrum) else (None, k)
    check_kinds(u=u, k=taps, skip=skip, pre_gate=pre_gate, post_gate=post_gate, state=state)
    kernel = _kernel(u, backend)
    check_parts(u, taps, pre_gate, post_gate, causal, state, return_state)
    if spectrum is not None:
        spectrum.check(u.shape[2] + (0 if state is None else state.shape[2]))
    x, gate, history = reference.with_state(u, pre_gate, state)
    if kernel is not None:
        refuse_forward_mode("long_conv", x, taps, skip, gate, post_gate)
        data = None if spectrum is None else spectrum.current()
        out = kernel(x, taps, data, skip, gate, post_gate, history, causal)
    else:
        check_convolution(x, taps, skip, gate, post_gate, history, causal)
        backends.record("long_conv:reference")
        with without_autocast(u):
            out = reference.convolve(x, taps, skip, gate, post_gate, history, causal)
    return (out, reference.next_state(x, gate, taps.shape[-1])) if return_state else out


def long_conv_prepare(k: Tensor, length: int, *, causal: bool = True) -> Spectrum:
    """Transforms a kernel once for many convolutions with it, inference and training.

    `effkern.long_conv` takes the spectrum in place of k; gradients go to k as if it had been given. Prepare again after
    each change of k: a spectrum whose kernel was changed in place is refused. Code under torch.compile cannot see such
    changes: there a spectrum from outside is taken as it is in inference, and not used where k trains.

    Args:
        k: (H, Lk), or (H, 2, Lk) with causal=False. float32, bfloat16 or float16; float64 keeps only k, since the
            reference transforms for itself.
        length: the longest input it will be used with, its state of Lk - 1 positions included; at least Lk. Inputs much
            shorter than that are slower than with a spectrum of their own.
        causal: as in `effkern.long_conv`.

    Returns:
        A `Spectrum`, which holds on to k. Its transform takes about 8 bytes a position and channel.

    Raises:
        TypeError: k is not a tensor, or length not an integer.
        ValueError: length is not positive, or beyond 2^34.
        RuntimeError: k has another shape or dtype, or more taps than `length`.

    Numerics:
        Those of `effkern.long_conv`, which computes the same spectrum.

    Cost:
        One transform of `length` a channel, two with causal=False.

    Source:
        As `effkern.long_conv`.
    """
    check_kinds(k=k)
    if not isinstance(length, int | torch.SymInt):
        raise TypeError(f"long_conv_prepare: length must be an integer, got {type(length).__name__}")
    if not 1 <= length <= LONGEST:
        raise ValueError(f"long_conv_prepare: length must be between 1 and {LONGEST}, got {length}")
    check_kernel(k, None, causal)
    check_dtype("k", k)
    if k.shape[-1] > length:
        raise RuntimeError(f"long_conv_prepare: k has {k.shape[-1]} taps, length is only {length}")
    data = None
    if _kernel(k, None) is not None:
        data = _OPS.long_conv_spectrum.default(k.detach(), length, causal)
    return Spectrum.of(k, length, data)


registry.register(
    registry.OpSpec(
        name="long_conv",
        family="long_conv",
        public=long_conv,
        reference=reference.long_conv,
        schemas=(
            *("long_conv", "long_conv_backward", "long_conv_spectrum"),
            *("long_conv_triton", "long_conv_triton_backward"),
        ),
        backends=(
            registry.Backend("cpu", ("cpu",), refuse_all_but_fast),
            registry.Backend(
                "triton", (), triton_refusal("long_conv"), note="unverified on hardware", automatic=False
            ),
            registry.Backend("reference", (), refuse_all_but_floating, note="plain PyTorch"),
        ),
        dtypes=(*FAST_DTYPES, torch.float64),
        sizes={},
        samples=samples,
        bad_samples=bad_samples,
        calls=calls,
        flops=long_conv_flops,
        bytes=long_conv_bytes,
        double_backward=DOUBLE_BACKWARD,
        autocast=False,
        batched=(0,),
    )
)
