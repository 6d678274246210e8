"""Couplings: what happens between the sub-blocks of reversible networks, each in one pass over memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from effkern import backends
from effkern.ops import registry
from effkern.ops._coupling_checks import check_coupling, check_kinds
from effkern.ops._coupling_samples import bad_samples, calls, samples
from effkern.ops._dispatch import (
    FAST_DTYPES,
    refuse_all_but_fast,
    refuse_all_but_floating,
    register_flops,
    register_kernel,
    triton_refusal,
)
from effkern.reference import coupling as reference

__all__ = ["couple", "coupling", "coupling_bytes", "coupling_flops"]

_OPS = torch.ops.effkern
Outputs = tuple[Tensor, Tensor, Tensor]


def coupling_flops(
    f: Tensor,
    y: Tensor | None = None,
    x: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    subtract: bool = False,
    q: int | None = None,
    keep: float | None = None,
    **_: Any,
) -> int:
    """A multiplication and an addition for y and for x each, one for what is kept, and four to round and to compare."""
    terms = 2 * (y is not None) + 2 * (x is not None) + (keep is not None) + 4 * (q is not None)
    return terms * f.numel()


def coupling_bytes(
    f: Tensor,
    y: Tensor | None = None,
    x: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    subtract: bool = False,
    q: int | None = None,
    keep: float | None = None,
    **_: Any,
) -> int:
    """Every argument and every result once."""
    read = sum(t.nbytes for t in (f, y, x) if t is not None)
    kept = 0 if keep is None or x is None else x.nbytes
    return read + kept + f.numel() * reference.result_dtype(f, y, x, q).itemsize


def couple(
    f: Tensor,
    y: Tensor | None = None,
    x: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    subtract: bool = False,
    q: int | None = None,
    keep: float | None = None,
    backend: str | None = None,
) -> Outputs:
    """`coupling` with all its results; what was not asked for has shape (0,)."""
    name = backends.forced() if backend is None else backend
    if name is not None:
        backends.check_name(name)
    f, y, x = (t if t is None else t.detach() for t in (f, y, x))  # type: ignore[assignment]
    if name is None:
        fast = all(t is None or t.dtype in FAST_DTYPES for t in (f, y, x))
        usable = fast and f.device.type in ("cpu", "cuda", "meta")
    else:
        usable = name != "reference"
    if not usable:
        check_coupling(f, y, x, subtract, q, keep)
        backends.record("coupling:reference")
        return reference.couple(f, y, x, alpha, beta, subtract, q, keep)
    if name is not None:
        backends.select("coupling", f.device.type, f.dtype, {}, name)
    kernel = _OPS.coupling_triton.default if name == "triton" else _OPS.coupling.default
    return kernel(f, y, x, alpha, beta, subtract, q, keep)


def coupling(
    f: Tensor,
    y: Tensor | None = None,
    x: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    subtract: bool = False,
    q: int | None = None,
    keep: float | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Adds what a sub-block returned to the streams of a reversible network, or takes it off again.

        out = beta y + R(f + alpha x)          with subtract: out = beta y - R(f + alpha x)          kept = keep x

    R rounds to the nearest multiple of 2^-q, ties to even, or does nothing. So y1 = x1 + f(x2) is `coupling(f, x1)` and
    its inverse `coupling(f, y1, subtract=True)`, both exact with q; f + alpha x + y of dual-residual networks and its
    inverse have three arguments, and its gradient is `coupling(through_f, gy, gx, alpha=alpha, beta=beta)`.
    `coupling(f, q=q)` rounds.

    Args:
        f: what the sub-block returned, any shape. float32, bfloat16 or float16; float64 through the reference. Any
            strides; what is not contiguous is copied once.
        y: the stream that it is added to, f's shape, any of these dtypes; None: zero.
        x: the stream that the sub-block has seen, f's shape, any of these dtypes; None: zero.
        alpha, beta: finite numbers.
        subtract: takes R(f + alpha x) off y.
        q: 0 to 23, the grid of R, or None.
        keep: number that x is multiplied by for the stream of the next block, or None.
        backend: "cpu", "triton" or "reference"; None leaves the choice to `effkern.backends`.

    Returns:
        out, contiguous, in the dtype of a sum of the arguments, with q in float32. With keep a tuple (out, kept), kept
        in x's dtype. With q the last entry of a tuple is `largest`, a float32 number: the largest magnitude in out, NaN
        where there is one. While it is below 2^(24 - q) (and y was on the grid) the sum is exact. No gradients:
        `effkern.nn.ReversibleBlock` and its kin know those of what they couple.

    Raises:
        TypeError: f, y or x is not a tensor, q not a whole number.
        ValueError: backend is unknown.
        RuntimeError: shapes, dtypes or devices do not fit; q is out of its range; there is nothing to couple.
        effkern.backends.Unavailable: the backend asked for cannot run.

    Numerics:
        In float32; every product and every sum is rounded by itself, as PyTorch's multiplication and addition do, and
        16-bit results once more. So all CPU levels and Triton give the bits of the reference; on CUDA, PyTorch's own
        kernels may fuse alpha x and its sum. Deterministic. NaN stays in its place. Autocast changes nothing.

    Cost:
        `coupling_flops`, `coupling_bytes`: one pass over memory.

    Source:
        Gomez et al. 2017 (The Reversible Residual Network), equations 6 to 8; Zhao et al. 2024 (Dr2Net: Dynamic
        Reversible Dual-Residual Networks for Memory-Efficient Finetuning).
    """
    check_kinds(f, y, x, q)
    found = couple(f, y, x, alpha=alpha, beta=beta, subtract=subtract, q=q, keep=keep, backend=backend)
    return reference.asked(found, q, keep)


class _Call(NamedTuple):
    """The arguments of the op. The dispatcher leaves trailing defaults out."""

    f: Tensor
    y: Tensor | None = None
    x: Tensor | None = None
    alpha: float = 1.0
    beta: float = 1.0
    subtract: bool = False
    q: int | None = None
    keep: float | None = None

    @classmethod
    def checked(cls, *args: Any) -> _Call:
        call = cls(*args)
        check_coupling(call.f, call.y, call.x, call.subtract, call.q, call.keep)
        return call

    def result_dtype(self) -> torch.dtype:
        return reference.result_dtype(self.f, self.y, self.x, self.q)


def _fake(*args: Any) -> Outputs:
    call = _Call.checked(*args)
    f, x = call.f, call.x
    kept = f.new_empty(0) if call.keep is None or x is None else x.new_empty(x.shape)
    largest = f.new_empty((0,) if call.q is None else (), dtype=torch.float32)
    return f.new_empty(f.shape, dtype=call.result_dtype()), kept, largest


def _composed(*args: Any) -> Outputs:
    """The key CUDA: PyTorch's own kernels."""
    call = _Call.checked(*args)
    backends.record("coupling:reference")
    out, kept, largest = reference.couple(*call)
    return out.contiguous(), kept.contiguous(), largest


def _triton(*args: Any) -> Outputs:
    call = _Call.checked(*args)
    for t in (call.f, call.y, call.x):
        if t is not None:
            backends.select("coupling", t.device.type, t.dtype, {}, "triton")
    from effkern._triton import coupling as launcher

    backends.record("coupling:triton")
    return launcher.couple(*call, call.result_dtype())


for _op in ("coupling", "coupling_triton"):
    torch.library.register_fake(f"effkern::{_op}", _fake)
    register_flops(_op, coupling_flops)
register_kernel("coupling", _composed, "CUDA")
register_kernel("coupling_triton", _triton, "CPU", "CUDA")

registry.register(
    registry.OpSpec(
        name="coupling",
        family="reversible",
        public=coupling,
        reference=reference.coupling,
        schemas=("coupling", "coupling_triton"),
        backends=(
            registry.Backend("cpu", ("cpu",), refuse_all_but_fast),
            registry.Backend(
                "triton", (), triton_refusal("coupling"), note="unverified on hardware", automatic=False
            ),
            registry.Backend("reference", (), refuse_all_but_floating, note="plain PyTorch"),
        ),
        dtypes=(*FAST_DTYPES, torch.float64),
        sizes={},
        samples=samples,
        bad_samples=bad_samples,
        calls=calls,
        flops=coupling_flops,
        bytes=coupling_bytes,
        double_backward="",
        autocast=False,
    )
)
