"""Attention at the dispatcher: fakes, gradients, autocast, and the kernels that are called from Python."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from effkern import _lib, backends
from effkern.ops._attention_checks import FAST_DTYPES, MAX_HEAD_DIM, check_arguments, check_offsets
from effkern.ops._attention_cost import backward_formula, forward_formula
from effkern.ops._dispatch import register_autocast, register_flops, register_kernel
from effkern.reference import attention as reference

_OPS = torch.ops.effkern
FORWARD, FORWARD_TRITON, FORWARD_CUDA = (
    _OPS.attention.default,
    _OPS.attention_triton.default,
    _OPS.attention_cuda.default,
)


def cpu_refusal(device: str, dtype: torch.dtype, sizes: Mapping[str, int]) -> str | None:
    if dtype not in FAST_DTYPES:
        return f"it takes float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if not (1 <= sizes["head_dim"] <= MAX_HEAD_DIM and 1 <= sizes["value_dim"] <= MAX_HEAD_DIM):
        return f"head dims go from 1 to {MAX_HEAD_DIM}, got {sizes['head_dim']} and {sizes['value_dim']}"
    return None


def triton_refusal(device: str, dtype: torch.dtype, sizes: Mapping[str, int]) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    from effkern._triton import attention as launcher

    return launcher.supports(torch.device(device), dtype, sizes["head_dim"], sizes["value_dim"])


def cuda_refusal(device: str, dtype: torch.dtype, sizes: Mapping[str, int]) -> str | None:
    if _CUDA_MISSING:
        return f"the CUDA library is not loaded: {_lib.status().cuda.reason}"
    return cpu_refusal(device, dtype, sizes)


def reference_refusal(device: str, dtype: torch.dtype, sizes: Mapping[str, int]) -> str | None:
    return None if dtype.is_floating_point else f"it takes floating dtypes, not {dtype}"


def sizes(q: Tensor, v: Tensor) -> dict[str, int]:
    return {"head_dim": q.shape[-1], "value_dim": v.shape[-1]}


def run_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float | None,
    causal: bool,
    align: str,
) -> tuple[Tensor, Tensor]:
    check_arguments(q, k, v, cu_seqlens_q, cu_seqlens_k, scale)
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        check_offsets("cu_seqlens_q", cu_seqlens_q, q.shape[-2])
        check_offsets("cu_seqlens_k", cu_seqlens_k, k.shape[-2])
    backends.record("attention:reference")
    return reference.attention(
        q, k, v, causal=causal, align=align, scale=scale, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k
    )


def _fake_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    top_left: bool = False,
) -> tuple[Tensor, Tensor]:
    check_arguments(q, k, v, cu_seqlens_q, cu_seqlens_k, scale)
    rows = q.shape[:-1]
    return q.new_empty((*rows, v.shape[-1])), q.new_empty(rows, dtype=torch.float32)


def _fake_backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _triton_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    top_left: bool = False,
) -> tuple[Tensor, Tensor]:
    check_arguments(q, k, v, cu_seqlens_q, cu_seqlens_k, scale)
    backends.select("attention", q.device.type, q.dtype, sizes(q, v), "triton")
    from effkern._triton import attention as launcher

    backends.record("attention:triton")
    return launcher.forward(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, causal, top_left)


def _triton_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    top_left: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    backends.select("attention", q.device.type, q.dtype, sizes(q, v), "triton")
    from effkern._triton import attention as launcher

    backends.record("attention_backward:triton")
    return launcher.backward(
        grad_out, grad_lse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, scale, causal, top_left
    )


def _cuda_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    top_left: bool = False,
) -> tuple[Tensor, Tensor]:
    """The key CUDA of `attention`: C++ where it was asked for, else Triton, else the reference."""
    name = backends.select("attention", q.device.type, q.dtype, sizes(q, v))
    if name == "reference":
        align = "top_left" if top_left else "bottom_right"
        return run_reference(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, causal, align)
    forward = FORWARD_CUDA if name == "cuda" else _triton_forward
    return forward(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, causal, top_left)


def _cuda_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    top_left: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The key CUDA of `attention_backward`: Triton where it can, else the closed form in PyTorch."""
    if backends.forced() != "reference" and triton_refusal(q.device.type, q.dtype, sizes(q, v)) is None:
        return _triton_backward(
            grad_out, grad_lse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, scale, causal, top_left
        )
    backends.record("attention_backward:reference")
    return reference.attention_backward(
        *(grad_out, grad_lse, q, k, v, out, lse),
        causal=causal,
        align="top_left" if top_left else "bottom_right",
        scale=scale,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
    )


def _no_cuda_kernel(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    backends.select("attention", q.device.type, q.dtype, sizes(q, v), "cuda")
    raise AssertionError("unreachable: select refuses")


DOUBLE_BACKWARD = "attention: second derivatives are only available with backend='reference'"


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, *options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, cu_seqlens_q, cu_seqlens_k)
    ctx.options = options


def _register_gradient(op: str, backward_op: str) -> None:
    backward = getattr(_OPS, backward_op).default

    def gradient(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        rest = (None,) * (2 + len(ctx.options))
        if grad_out is None and grad_lse is None:
            return (None, None, None, *rest)
        q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
        if grad_out is None:  # only lse was used
            grad_out = torch.zeros_like(out)
        return (
            *backward(grad_out, grad_lse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, *ctx.options),
            *rest,
        )

    torch.library.register_autograd(f"effkern::{op}", gradient, setup_context=_setup_context)


def _refuse_gradient(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(DOUBLE_BACKWARD)


for _op, _backward_op in (
    ("attention", "attention_backward"),
    ("attention_triton", "attention_triton_backward"),
    ("attention_cuda", "attention_backward"),
):
    torch.library.register_fake(f"effkern::{_op}", _fake_forward)
    _register_gradient(_op, _backward_op)
    register_autocast(_op)
    register_flops(_op, forward_formula)
for _op in ("attention_backward", "attention_triton_backward"):
    torch.library.register_fake(f"effkern::{_op}", _fake_backward)
    torch.library.register_autograd(f"effkern::{_op}", _refuse_gradient)
    register_flops(_op, backward_formula)

register_kernel("attention", _cuda_forward, "CUDA")
register_kernel("attention_backward", _cuda_backward, "CUDA")
register_kernel("attention_triton", _triton_forward, "CPU", "CUDA")
register_kernel("attention_triton_backward", _triton_backward, "CPU", "CUDA")
_CUDA_MISSING = not torch._C._dispatch_has_kernel_for_dispatch_key("effkern::attention_cuda", "CUDA")
register_kernel("attention_cuda", _no_cuda_kernel, "CPU", *(("CUDA",) if _CUDA_MISSING else ()))
