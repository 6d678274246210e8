"""The impulse response of companion matrices: kernels of long convolutions that are state spaces."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effkern import backends
from effkern.ops import registry
from effkern.ops._companion_kernel_samples import bad_samples, calls, samples
from effkern.ops._dispatch import (
    FAST_DTYPES,
    dtype_name,
    refuse_all_but_fast,
    refuse_all_but_floating,
    refuse_forward_mode,
    register_flops,
    register_gradient,
    register_kernel,
    without_autocast,
)
from effkern.reference import long_conv_kernels as reference

__all__ = ["companion_bytes", "companion_flops", "companion_kernel"]

_OPS = torch.ops.effkern
DOUBLE_BACKWARD = "companion_kernel: second derivatives are only available with backend='reference'"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(f"companion_kernel: {message}")


def _check(a: Tensor, b: Tensor, c: Tensor) -> None:
    """What csrc/companion_kernel/cpu.cpp checks, for every other path."""
    allowed = (*FAST_DTYPES, torch.float64)
    _require(
        a.dtype in allowed, f"a must be float32, float64, bfloat16 or float16, got {dtype_name(a.dtype)}"
    )
    _require(
        a.dim() == 2 and a.shape[1] >= 1,
        f"a must have shape (channels, order), order at least 1, got {tuple(a.shape)}",
    )
    for name, t in (("b", b), ("c", c)):
        _require(t.shape == a.shape, f"{name} has shape {tuple(t.shape)}, a has {tuple(a.shape)}")
        _require(t.dtype == a.dtype, f"{name} is {dtype_name(t.dtype)} but a is {dtype_name(a.dtype)}")
        _require(t.device == a.device, f"{name} is on another device than a")


def companion_flops(a: Tensor, b: Tensor, c: Tensor, length: int, *, backward: bool = False, **_: Any) -> int:
    """2 d a number, and 4 d a number for the first d; backward twice, and 12 d for the first d."""
    channels, order = a.shape
    start = min(order, length)
    rest = (length - start) * (4 if backward else 2)
    return channels * order * (rest + start * (12 if backward else 4))


def companion_bytes(a: Tensor, b: Tensor, c: Tensor, length: int, *, backward: bool = False, **_: Any) -> int:
    """Parameters in and the kernel out; backward reads the kernel and its gradient, and writes three gradients."""
    channels, order = a.shape
    return a.element_size() * channels * ((2 if backward else 1) * (3 * order + length))


def companion_kernel(a: Tensor, b: Tensor, c: Tensor, length: int, *, backend: str | None = None) -> Tensor:
    """The kernel of a state space with a companion matrix, a channel each, as a long convolution takes it.

        K[l] = c^T A^l b          A[i, i - 1] = 1,  A[i, d - 1] += a[i]

    so that the states of x_(l+1) = A x_l + b u_l, y_l = c^T x_(l+1) are never computed: y = K * u.

    Args:
        a: (H, d), the last column: the characteristic polynomial of A is z^d - sum_i a[i] z^i. A kernel that does not
            grow has its zeros in the unit circle; sum_i |a[i]| <= 1 makes sure of that.
        b: (H, d), the input vector, a's dtype.
        c: (H, d), the output vector, a's dtype.
            Of all three float32, bfloat16 or float16; float64 through the reference. Any strides.
        length: L, how many numbers of the kernel, at least 1.
        backend: "cpu" or "reference"; None leaves the choice to `effkern.backends`.

    Returns:
        K (H, L), contiguous, in a's dtype; differentiable in a, b and c.

    Raises:
        TypeError: an argument is not a tensor, or length not an integer.
        ValueError: length is below 1, or backend unknown.
        RuntimeError: shapes, dtypes or devices do not fit; the message names the argument, what was expected and what
            came.
        effkern.backends.Unavailable: the backend asked for cannot run.
        NotImplementedError: differentiated twice or in forward mode, on any backend but the reference.

    Numerics:
        A recurrence in float32, rounded once for 16-bit dtypes: the first d numbers from the states, the others from
        the d numbers before them (Cayley and Hamilton), with the error of stepping x <- A x. There is no division, so
        poles on the unit circle, z = 1 included, are as good as any. On x86 CPUs numbers below 1.2e-38 count as zero.
        Deterministic: the bits do not depend on the number of threads. Autocast changes nothing.

    Cost:
        `companion_flops`, `companion_bytes`: d products a number, 2 d backward, and nothing kept for backward but the
        arguments and K. Channels run in the lanes of a vector, and groups of lanes on the threads. The reference takes
        about 2 sqrt(L) steps.

    Source:
        Zhang et al. 2023 (SpaceTime: Effectively Modeling Time Series with Simple Discrete State Spaces), section 3.
    """
    for argument, t in (("a", a), ("b", b), ("c", c)):
        if not isinstance(t, Tensor):
            raise TypeError(f"companion_kernel: {argument} must be a tensor, got {type(t).__name__}")
    if not isinstance(length, int | torch.SymInt):
        raise TypeError(f"companion_kernel: length must be an integer, got {type(length).__name__}")
    if length < 1:
        raise ValueError(f"companion_kernel: length must be at least 1, got {length}")
    name = backends.forced() if backend is None else backend
    if name is not None:
        backends.check_name(name)
        if name != "reference":
            backends.select("companion_kernel", a.device.type, a.dtype, {}, name)
    _check(a, b, c)
    usable = a.dtype in FAST_DTYPES and a.device.type in ("cpu", "cuda", "meta")
    with without_autocast(a):
        if name == "reference" or not usable:
            backends.record("companion_kernel:reference")
            return reference.companion_kernel(a, b, c, length)
        refuse_forward_mode("companion_kernel", a, b, c)
        out = _OPS.companion_kernel(a.float(), b.float(), c.float(), length)
        return out.to(a.dtype)


def _fake_forward(a: Tensor, b: Tensor, c: Tensor, length: int) -> Tensor:
    _check(a, b, c)
    return a.new_empty(a.shape[0], length)


def _fake_backward(
    grad_out: Tensor, a: Tensor, b: Tensor, c: Tensor, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return a.new_empty(a.shape), a.new_empty(a.shape), a.new_empty(a.shape)


def _composed_forward(a: Tensor, b: Tensor, c: Tensor, length: int) -> Tensor:
    """The key CUDA: PyTorch's batched products."""
    _check(a, b, c)
    backends.record("companion_kernel:reference")
    return reference.companion_kernel(a, b, c, length)


def _composed_backward(
    grad_out: Tensor, a: Tensor, b: Tensor, c: Tensor, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    backends.record("companion_kernel_backward:reference")
    return reference.companion_kernel_backward(grad_out, a, b, c)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3], output)


def _gradient(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    grads = _OPS.companion_kernel_backward(grad_out, *ctx.saved_tensors)
    needed = ctx.needs_input_grad[:3]
    return (*(g if wanted else None for g, wanted in zip(grads, needed, strict=True)), None)


def _refuse(ctx: Any, *grads: Any) -> Any:
    raise NotImplementedError(DOUBLE_BACKWARD)


torch.library.register_fake("effkern::companion_kernel", _fake_forward)
torch.library.register_fake("effkern::companion_kernel_backward", _fake_backward)
register_gradient("companion_kernel", _setup_context, _gradient)
torch.library.register_autograd("effkern::companion_kernel_backward", _refuse)
register_kernel("companion_kernel", _composed_forward, "CUDA")
register_kernel("companion_kernel_backward", _composed_backward, "CUDA")
register_flops("companion_kernel", lambda a, b, c, length, **_: companion_flops(a, b, c, length))
register_flops(
    "companion_kernel_backward",
    lambda grad_out, a, b, c, out, **_: companion_flops(a, b, c, out.shape[1], backward=True),
)

registry.register(
    registry.OpSpec(
        name="companion_kernel",
        family="long_conv",
        public=companion_kernel,
        reference=reference.companion_kernel,
        schemas=("companion_kernel", "companion_kernel_backward"),
        backends=(
            registry.Backend("cpu", ("cpu",), refuse_all_but_fast),
            registry.Backend("reference", (), refuse_all_but_floating, note="plain PyTorch"),
        ),
        dtypes=(*FAST_DTYPES, torch.float64),
        sizes={},
        samples=samples,
        bad_samples=bad_samples,
        calls=calls,
        flops=companion_flops,
        bytes=companion_bytes,
        double_backward=DOUBLE_BACKWARD,
        autocast=False,
    )
)
