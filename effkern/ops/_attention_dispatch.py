"""Attention at the dispatcher: fakes, gradients, autocast, and the kernels that are called from Python."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from effkern import backends
from effkern.ops import _attention_cuda as cuda_kernels
from effkern.ops import _attention_gradient as gradient
from effkern.ops._attention_checks import MAX_HEAD_DIM, check_arguments, check_offsets
from effkern.ops._attention_cost import backward_formula, forward_formula
from effkern.ops._attention_options import Options, check_options
from effkern.ops._dispatch import (
    FAST_DTYPES,
    register_autocast,
    register_flops,
    register_kernel,
    triton_refusal,
)
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


def sizes(q: Tensor, v: Tensor, extended: bool) -> dict[str, int]:
    """What a backend's refusal depends on; extended: there is more than geometry (`Options.extended`)."""
    return {"head_dim": q.shape[-1], "value_dim": v.shape[-1], "extended": extended}


def _check(q: Tensor, k: Tensor, v: Tensor, o: Options) -> None:
    check_arguments(q, k, v, o.cu_seqlens_q, o.cu_seqlens_k, o.scale)
    check_options(o, q, k)


def run_reference(q: Tensor, k: Tensor, v: Tensor, o: Options) -> tuple[Tensor, Tensor]:
    check_arguments(q, k, v, o.cu_seqlens_q, o.cu_seqlens_k, o.scale)
    longest: tuple[int | None, int | None] = None, None
    if o.cu_seqlens_q is not None and o.cu_seqlens_k is not None:
        longest = (
            check_offsets("cu_seqlens_q", o.cu_seqlens_q, q.shape[-2]),
            check_offsets("cu_seqlens_k", o.cu_seqlens_k, k.shape[-2]),
        )
    check_options(o, q, k, longest)
    backends.record("attention:reference")
    return reference.attention(q, k, v, **o.keywords())


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *options: Any, **named: Any) -> tuple[Tensor, Tensor]:
    _check(q, k, v, Options(*options, **named))
    rows = q.shape[:-1]
    return q.new_empty((*rows, v.shape[-1])), q.new_empty(rows, dtype=torch.float32)


def _backward_options(options: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Options, bool]:
    """What follows lse in the arguments of a backward op."""
    *_, bias_grad = (False, *options[len(Options._fields) :])
    keywords = dict(named)
    bias_grad = keywords.pop("bias_grad", bias_grad)
    return Options(*options[: len(Options._fields)], **keywords), bias_grad


def _fake_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *options: Any,
    **named: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    o, bias_grad = _backward_options(options, named)
    shape = o.bias.shape if bias_grad and o.bias is not None else (0,)
    grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    grad_bias = q.new_empty(shape, dtype=torch.float32)
    return *grads, grad_bias, q.new_empty(q.shape[:-1], dtype=torch.float32)


def _triton_forward(q: Tensor, k: Tensor, v: Tensor, *options: Any, **named: Any) -> tuple[Tensor, Tensor]:
    o = Options(*options, **named)
    _check(q, k, v, o)
    backends.select("attention", q.device.type, q.dtype, sizes(q, v, o.extended()), "triton")
    from effkern._triton import attention as launcher

    backends.record("attention:triton")
    return launcher.forward(q, k, v, **o.launch())


def _triton_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *options: Any,
    **named: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    o, bias_grad = _backward_options(options, named)
    backends.select("attention", q.device.type, q.dtype, sizes(q, v, o.extended()), "triton")
    from effkern._triton import attention as launcher

    backends.record("attention_backward:triton")
    return launcher.backward(grad_out, grad_lse, q, k, v, out, lse, **o.launch(), bias_grad=bias_grad)


def _cuda_kernel_forward(
    q: Tensor, k: Tensor, v: Tensor, *options: Any, **named: Any
) -> tuple[Tensor, Tensor]:
    """`attention_cuda`: the C++ kernel that fits, or a refusal."""
    o = Options(*options, **named)
    _check(q, k, v, o)
    request = cuda_kernels.sizes_of(q, v, o)
    backends.select("attention", q.device.type, q.dtype, request, "cuda")
    kernel = cuda_kernels.choose(q.device, q.dtype, request)
    assert not isinstance(kernel, str), kernel
    return cuda_kernels.forward(kernel, q, k, v, o)


def _cuda_forward(q: Tensor, k: Tensor, v: Tensor, *options: Any, **named: Any) -> tuple[Tensor, Tensor]:
    """The key CUDA of `attention`: C++ where it was asked for, else Triton, else the reference."""
    o = Options(*options, **named)
    name = backends.select("attention", q.device.type, q.dtype, cuda_kernels.sizes_of(q, v, o))
    if name == "reference":
        return run_reference(q, k, v, o)
    return _cuda_kernel_forward(q, k, v, *o) if name == "cuda" else _triton_forward(q, k, v, *o)


def _cuda_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *options: Any,
    **named: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The key CUDA of `attention_backward`: Triton where it can, else the closed form in PyTorch."""
    saved = grad_out, grad_lse, q, k, v, out, lse
    o, bias_grad = _backward_options(options, named)
    request = q.device.type, q.dtype, sizes(q, v, o.extended())
    if backends.forced() != "reference" and triton_refusal("attention")(*request) is None:
        return _triton_backward(*saved, *o, bias_grad)
    backends.record("attention_backward:reference")
    return reference.attention_backward(*saved, bias_grad=bias_grad, **o.keywords())


def _cuda_kernel_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *options: Any,
    **named: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`attention_cuda_backward`: of C++ where there is one, else what the key CUDA of `attention_backward` does."""
    o, bias_grad = _backward_options(options, named)
    request = cuda_kernels.sizes_of(q, v, o)
    backends.select("attention", q.device.type, q.dtype, request, "cuda")
    kernel = cuda_kernels.choose(q.device, q.dtype, request)
    if isinstance(kernel, str) or not kernel.backward:
        return _cuda_backward(grad_out, grad_lse, q, k, v, out, lse, *o, bias_grad)
    *grads, delta = cuda_kernels.backward(grad_out, grad_lse, q, k, v, out, lse, o)
    return grads[0], grads[1], grads[2], q.new_empty(0, dtype=torch.float32), delta


for _op, _backward_op in (
    ("attention", "attention_backward"),
    ("attention_triton", "attention_triton_backward"),
    ("attention_cuda", "attention_cuda_backward"),
):
    torch.library.register_fake(f"effkern::{_op}", _fake_forward)
    gradient.register(_op, _backward_op)
    register_autocast(_op, 3)
    register_flops(_op, forward_formula)
for _op in ("attention_backward", "attention_triton_backward", "attention_cuda_backward"):
    torch.library.register_fake(f"effkern::{_op}", _fake_backward)
    gradient.register_refusal(_op)
    register_flops(_op, backward_formula)

register_kernel("attention", _cuda_forward, "CUDA")
register_kernel("attention_backward", _cuda_backward, "CUDA")
register_kernel("attention_triton", _triton_forward, "CPU", "CUDA")
register_kernel("attention_triton_backward", _triton_backward, "CPU", "CUDA")
register_kernel("attention_cuda", _cuda_kernel_forward, "CPU", "CUDA")
register_kernel("attention_cuda_backward", _cuda_kernel_backward, "CPU", "CUDA")
