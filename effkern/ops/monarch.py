"""Products with Monarch matrices: two block-diagonal factors and the permutation between them, in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effkern import backends
from effkern.ops import _monarch_complex as planes
from effkern.ops import registry
from effkern.ops._dispatch import (
    FAST_DTYPES,
    autocast_dtype,
    refuse_forward_mode,
    triton_refusal,
    without_autocast,
)
from effkern.ops._monarch_checks import check_block_diag, check_kinds, check_monarch
from effkern.ops._monarch_dispatch import (
    ORDERS,
    block_diag_bytes,
    block_diag_flops,
    cpu_refusal,
    monarch_bytes,
    monarch_flops,
    reference_refusal,
    refuse_twice,
)
from effkern.ops._monarch_samples import (
    bad_samples,
    block_diag_bad_samples,
    block_diag_calls,
    block_diag_samples,
    calls,
    samples,
)
from effkern.reference import monarch as reference

__all__ = [
    "block_diag_bytes",
    "block_diag_flops",
    "block_diag_matmul",
    "monarch_bytes",
    "monarch_flops",
    "monarch_matmul",
]

_OPS = torch.ops.effkern


def _kernel(op: str, x: Tensor, asked: str | None) -> Any:
    """The dispatcher op for a request, None for the reference. Complex numbers go through the real op."""
    name = backends.forced() if asked is None else asked
    if name is not None:
        backends.check_name(name)
    if name is None:
        usable = x.dtype in (*FAST_DTYPES, torch.complex64) and x.device.type in ("cpu", "cuda", "meta")
        return getattr(_OPS, op).default if usable else None
    if name == "reference":
        return None
    backends.select(op, x.device.type, x.dtype, {}, name)
    return getattr(_OPS, f"{op}_triton" if name == "triton" else op).default


def _two_products_win(x: Tensor, w1: Tensor, w2: Tensor, bias: Tensor | None) -> bool:
    """Whether PyTorch's two batched products train faster on the CPU: few and large blocks, where permuting is cheap
    and keeping the middle saves one product in seven. Only in float32, where they run at full speed on every CPU."""
    if x.dtype != torch.float32 or x.device.type != "cpu" or w1.dim() != 3 or w2.dim() != 3 or x.dim() == 0:
        return False
    if max(w1.shape[0], w2.shape[0]) > 4 or min(*w1.shape[1:], *w2.shape[1:]) < 512:
        return False
    trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w1, w2, bias))
    return trains and not torch.is_autocast_enabled("cpu") and x.numel() >= 64 * x.shape[-1]


def monarch_matmul(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    bias: Tensor | None = None,
    *,
    output_order: str = "s_major",
    backend: str | None = None,
) -> Tensor:
    """Multiplies by a Monarch matrix: a block-diagonal factor, a permutation, another block-diagonal factor.

        mid[kk q + j] = sum_i w1[kk, j, i] x[kk p + i]
        out[ss l + ll] = sum_rr w2[ll, ss, rr] mid[rr l + ll] + bias

    That is k q p + l s r products a token instead of the k p l s of a dense layer: with k = l = nblocks of a square
    layer, nblocks / 2 times fewer. Nothing is written to memory between the factors.

    Args:
        x: (..., k p). float32, bfloat16, float16 or complex64; float64 and complex128 through the reference. Any
            strides; features that are not adjacent are copied once.
        w1: (k, q, p), x's dtype.
        w2: (l, s, r), x's dtype, with l r = k q. k and l need not be equal, nor the blocks square.
        bias: (l s), x's dtype, in the order of the output.
        output_order: "s_major" as above. "l_major": out[ll s + ss], the blocks of w2 one after the other; a next layer
            that has the same shuffle in its weights saves the permutation.
        backend: "cpu", "triton" or "reference"; None leaves the choice to `effkern.backends`.

    Returns:
        out (..., l s), contiguous, in x's dtype; differentiable in x, w1, w2 and bias. No tokens give an empty result
        and zero gradients of the weights.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: output_order or backend is unknown.
        RuntimeError: shapes, dtypes or devices do not fit; the message names the argument, what was expected and what
            came.
        effkern.backends.Unavailable: the backend asked for cannot run.
        NotImplementedError: differentiated twice or in forward mode, on any backend but the reference (and the two
            products named under Cost).

    Numerics:
        Sums in float32. The middle stays in float32, but for bfloat16 inputs on CPU levels with bfloat16 products and
        for 16-bit inputs on a GPU: there it is rounded, as two matmuls would. Gradients of the weights are summed over
        all tokens in float32, in the order of the tokens. Deterministic: the bits of the one-pass kernels do not depend
        on the number of threads. Under autocast all arguments are cast to the autocast dtype (complex ones are not).

    Cost:
        `monarch_flops`, `monarch_bytes`. Backward computes the middle again instead of saving it. Only float32 training
        on the CPU with at most 4 blocks of 512 numbers or more each way goes through two batched products that save it,
        because they are faster (`backends.last()` ends in cpu/bmm); backend="cpu" keeps to one pass.

    Source:
        Dao et al. 2022 (Monarch: Expressive Structured Matrices for Efficient and Accurate Training), section 3.
    """
    check_kinds("monarch_matmul", x=x, w1=w1, w2=w2, bias=bias)
    if output_order not in ORDERS:
        raise ValueError(f"monarch_matmul: output_order must be 's_major' or 'l_major', got {output_order!r}")
    kernel = _kernel("monarch_matmul", x, backend)
    if (
        kernel is not None
        and backend is None
        and backends.forced() is None
        and _two_products_win(x, w1, w2, bias)
    ):
        check_monarch("monarch_matmul", x, w1, w2, bias)
        backends.record("monarch_matmul:cpu/bmm")
        return reference.monarch_matmul(x, w1, w2, bias, output_order=output_order)
    if kernel is None:
        x, w1, w2, bias = (t if t is None else t.to(autocast_dtype(t)) for t in (x, w1, w2, bias))  # type: ignore[assignment]
        check_monarch("monarch_matmul", x, w1, w2, bias)
        backends.record("monarch_matmul:reference")
        return reference.monarch_matmul(x, w1, w2, bias, output_order=output_order)
    refuse_forward_mode("monarch_matmul", x, w1, w2, bias)
    l_major = output_order == "l_major"
    if not x.is_complex():
        return kernel(x, w1, w2, bias, l_major)
    check_monarch("monarch_matmul", x, w1, w2, bias)
    (k, _, _), (l, s, _) = w1.shape, w2.shape
    with without_autocast(x):
        out = kernel(
            planes.double_input(x, k), planes.double_first(w1), planes.double_second(w2), None, l_major
        )
    joined = (
        planes.join(out.unflatten(-1, (l, 2, s)), -2).flatten(-2)
        if l_major
        else planes.join(out.unflatten(-1, (2, l * s)), -2)
    )
    return joined if bias is None else joined + bias


def block_diag_matmul(x: Tensor, w: Tensor, *, backend: str | None = None) -> Tensor:
    """Multiplies by a block-diagonal matrix: one factor of a Monarch matrix.

        out[kk q + j] = sum_i w[kk, j, i] x[kk p + i]

    Args:
        x: (..., k p). float32, bfloat16, float16 or complex64; float64 and complex128 through the reference. Any
            strides; features that are not adjacent are copied once.
        w: (k, q, p), x's dtype.
        backend: "cpu" or "reference"; None leaves the choice to `effkern.backends`.

    Returns:
        out (..., k q), contiguous, in x's dtype; differentiable in x and w.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: backend is unknown.
        RuntimeError: shapes, dtypes or devices do not fit; the message names the argument, what was expected and what
            came.
        effkern.backends.Unavailable: the backend asked for cannot run.
        NotImplementedError: differentiated twice or in forward mode, on any backend but the reference.

    Numerics:
        Sums in float32, rounded once; the gradient of w over all tokens too. Deterministic. Under autocast both
        arguments are cast to the autocast dtype (complex ones are not).

    Cost:
        `block_diag_flops`, `block_diag_bytes`.

    Source:
        Dao et al. 2022 (Monarch: Expressive Structured Matrices for Efficient and Accurate Training), section 3.
    """
    check_kinds("block_diag_matmul", x=x, w=w)
    kernel = _kernel("block_diag_matmul", x, backend)
    if kernel is None:
        x, w = (t.to(autocast_dtype(t)) for t in (x, w))
        check_block_diag("block_diag_matmul", x, w)
        backends.record("block_diag_matmul:reference")
        return reference.block_diag_matmul(x, w)
    refuse_forward_mode("block_diag_matmul", x, w)
    if not x.is_complex():
        return kernel(x, w)
    check_block_diag("block_diag_matmul", x, w)
    k, q, _ = w.shape
    with without_autocast(x):
        out = kernel(planes.double_input(x, k), planes.double_first(w))
    return planes.join(out.unflatten(-1, (2, k * q)), -2)


registry.register(
    registry.OpSpec(
        name="monarch_matmul",
        family="monarch",
        public=monarch_matmul,
        reference=reference.monarch_matmul,
        schemas=(
            *("monarch_matmul", "monarch_matmul_backward"),
            *("monarch_matmul_triton", "monarch_matmul_triton_backward"),
        ),
        backends=(
            registry.Backend("cpu", ("cpu",), cpu_refusal),
            registry.Backend(
                "triton", (), triton_refusal("monarch"), note="unverified on hardware", automatic=False
            ),
            registry.Backend("reference", (), reference_refusal, note="plain PyTorch"),
        ),
        dtypes=(*FAST_DTYPES, torch.float64),
        sizes={},
        samples=samples,
        bad_samples=bad_samples,
        calls=calls,
        flops=monarch_flops,
        bytes=monarch_bytes,
        double_backward=refuse_twice("monarch_matmul"),
        batched=(0,),
    )
)

registry.register(
    registry.OpSpec(
        name="block_diag_matmul",
        family="monarch",
        public=block_diag_matmul,
        reference=reference.block_diag_matmul,
        schemas=("block_diag_matmul", "block_diag_matmul_backward"),
        backends=(
            registry.Backend("cpu", ("cpu",), cpu_refusal),
            registry.Backend("reference", (), reference_refusal, note="plain PyTorch"),
        ),
        dtypes=(*FAST_DTYPES, torch.float64),
        sizes={},
        samples=block_diag_samples,
        bad_samples=block_diag_bad_samples,
        calls=block_diag_calls,
        flops=block_diag_flops,
        bytes=block_diag_bytes,
        double_backward=refuse_twice("block_diag_matmul"),
        batched=(0,),
    )
)
