"""The Monarch ops at the dispatcher: fakes, gradients, autocast, flops, and the kernels that are called from Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from effkern import backends
from effkern.ops._dispatch import (
    FAST_DTYPES,
    dtype_name,
    register_autocast,
    register_flops,
    register_gradient,
    register_kernel,
)
from effkern.ops._monarch_checks import check_block_diag, check_monarch
from effkern.reference import monarch as reference

_OPS = torch.ops.effkern
Gradients = tuple[Tensor, Tensor, Tensor, Tensor]
ORDERS = ("s_major", "l_major")


def cpu_refusal(device: str, dtype: torch.dtype, sizes: Mapping[str, int]) -> str | None:
    if dtype in FAST_DTYPES or dtype == torch.complex64:
        return None
    return f"it takes float32, bfloat16, float16 and complex64, not {dtype_name(dtype)}"


def reference_refusal(device: str, dtype: torch.dtype, sizes: Mapping[str, int]) -> str | None:
    number = dtype.is_floating_point or dtype.is_complex
    return None if number else f"it takes floating and complex dtypes, not {dtype}"


def monarch_flops(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    bias: Tensor | None = None,
    *,
    backward: bool = False,
    **_: Any,
) -> int:
    """2 (k q p + l s r) a token forward, four times that for complex numbers; backward three times the first factor
    (mid once more) and twice the second."""
    first, second = w1.numel(), w2.numel()
    tokens = x.numel() // (w1.shape[0] * w1.shape[2])
    kinds = 4 if x.is_complex() else 1
    return 2 * kinds * tokens * (3 * first + 2 * second if backward else first + second)


def monarch_bytes(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    bias: Tensor | None = None,
    *,
    backward: bool = False,
    **_: Any,
) -> int:
    """Tokens in and out once, weights once; backward reads and writes each of them, and grad_out."""
    tokens = x.numel() // (w1.shape[0] * w1.shape[2])
    out = tokens * w2.shape[0] * w2.shape[1]
    weights = w1.numel() + w2.numel() + (0 if bias is None else bias.numel())
    return x.element_size() * ((2 if backward else 1) * (x.numel() + weights) + out)


def block_diag_flops(x: Tensor, w: Tensor, *, backward: bool = False, **_: Any) -> int:
    """2 k q p a token forward, twice that backward."""
    tokens = x.numel() // (w.shape[0] * w.shape[2])
    return (4 if backward else 2) * (4 if x.is_complex() else 1) * tokens * w.numel()


def block_diag_bytes(x: Tensor, w: Tensor, *, backward: bool = False, **_: Any) -> int:
    """Tokens in and out once, weights once; backward reads and writes each of them, and grad_out."""
    tokens = x.numel() // (w.shape[0] * w.shape[2])
    twice = 2 if backward else 1
    return x.element_size() * (twice * (x.numel() + w.numel()) + tokens * w.shape[0] * w.shape[1])


def _sizes(w1: Tensor, w2: Tensor) -> dict[str, int]:
    return dict(zip("kqplsr", (*w1.shape, *w2.shape), strict=True))


def _shape_out(x: Tensor, blocks: int, rows: int) -> tuple[int, ...]:
    return (*x.shape[:-1], blocks * rows)


def _fake_monarch(
    x: Tensor, w1: Tensor, w2: Tensor, bias: Tensor | None = None, l_major: bool = False
) -> Tensor:
    check_monarch("monarch_matmul", x, w1, w2, bias)
    return x.new_empty(_shape_out(x, w2.shape[0], w2.shape[1]))


def _empty_gradients(needed: tuple[tuple[bool, tuple[int, ...]], ...], x: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(shape if wanted else (0,)) for wanted, shape in needed)


def _fake_monarch_backward(
    grad_out: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    l_major: bool = False,
    need_x: bool = True,
    need_w1: bool = True,
    need_w2: bool = True,
    need_bias: bool = False,
) -> tuple[Tensor, ...]:
    check_monarch("monarch_matmul", x, w1, w2, None)
    outputs = (w2.shape[0] * w2.shape[1],)
    needed = (need_x, x.shape), (need_w1, w1.shape), (need_w2, w2.shape), (need_bias, outputs)
    return _empty_gradients(needed, x)


def _fake_block_diag(x: Tensor, w: Tensor) -> Tensor:
    check_block_diag("block_diag_matmul", x, w)
    return x.new_empty(_shape_out(x, w.shape[0], w.shape[1]))


def _fake_block_diag_backward(
    grad_out: Tensor, x: Tensor, w: Tensor, need_x: bool = True, need_w: bool = True
) -> tuple[Tensor, ...]:
    return _empty_gradients(((need_x, x.shape), (need_w, w.shape)), x)


def _composed_monarch(
    x: Tensor, w1: Tensor, w2: Tensor, bias: Tensor | None = None, l_major: bool = False
) -> Tensor:
    """The key CUDA of `monarch_matmul` until the Triton kernels have run on hardware: PyTorch's batched products."""
    check_monarch("monarch_matmul", x, w1, w2, bias)
    backends.record("monarch_matmul:reference")
    return reference.monarch_matmul(x, w1, w2, bias, output_order=ORDERS[l_major])


def _composed_monarch_backward(
    grad_out: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    l_major: bool = False,
    need_x: bool = True,
    need_w1: bool = True,
    need_w2: bool = True,
    need_bias: bool = False,
) -> Gradients:
    backends.record("monarch_matmul_backward:reference")
    (k, q, p), (l, s, r) = w1.shape, w2.shape
    rows = x.reshape(-1, k, p).transpose(0, 1)  # (k, tokens, p)
    sent = grad_out.reshape(-1, *((l, s) if l_major else (s, l))).movedim(
        1 if l_major else 2, 0
    )  # (l, tokens, s)
    grad_x, grad_w1, grad_w2, grad_bias = (x.new_empty(0) for _ in range(4))
    if need_w2:
        mid = reference.block_diag_matmul(x, w1).reshape(-1, r, l).movedim(2, 0)
        grad_w2 = sent.mT @ mid
    if need_x or need_w1:
        grad_mid = (sent @ w2).permute(1, 2, 0).reshape(-1, k, q).transpose(0, 1)  # (k, tokens, q)
        if need_w1:
            grad_w1 = grad_mid.mT @ rows
        if need_x:
            grad_x = (grad_mid @ w1).transpose(0, 1).reshape(x.shape)
    if need_bias:
        grad_bias = grad_out.reshape(-1, l * s).sum(0, dtype=torch.float32).to(x.dtype)
    return grad_x.contiguous(), grad_w1.contiguous(), grad_w2.contiguous(), grad_bias


def _composed_block_diag(x: Tensor, w: Tensor) -> Tensor:
    check_block_diag("block_diag_matmul", x, w)
    backends.record("block_diag_matmul:reference")
    return reference.block_diag_matmul(x, w)


def _composed_block_diag_backward(
    grad_out: Tensor, x: Tensor, w: Tensor, need_x: bool = True, need_w: bool = True
) -> tuple[Tensor, Tensor]:
    backends.record("block_diag_matmul_backward:reference")
    k, q, p = w.shape
    sent, rows = (t.reshape(-1, k, n).transpose(0, 1) for t, n in ((grad_out, q), (x, p)))
    grad_x = (sent @ w).transpose(0, 1).reshape(x.shape) if need_x else x.new_empty(0)
    grad_w = sent.mT @ rows if need_w else x.new_empty(0)
    return grad_x.contiguous(), grad_w.contiguous()


def _triton_monarch(
    x: Tensor, w1: Tensor, w2: Tensor, bias: Tensor | None = None, l_major: bool = False
) -> Tensor:
    check_monarch("monarch_matmul", x, w1, w2, bias)
    backends.select("monarch_matmul", x.device.type, x.dtype, _sizes(w1, w2), "triton")
    from effkern._triton import monarch as launcher

    backends.record("monarch_matmul:triton")
    return launcher.monarch_matmul(x, w1, w2, bias, l_major)


def _triton_monarch_backward(
    grad_out: Tensor, x: Tensor, w1: Tensor, w2: Tensor, *rest: Any, **named: Any
) -> Gradients:
    backends.select("monarch_matmul", x.device.type, x.dtype, _sizes(w1, w2), "triton")
    from effkern._triton import monarch as launcher

    backends.record("monarch_matmul_backward:triton")
    return launcher.monarch_matmul_backward(grad_out, x, w1, w2, *rest, **named)


def _monarch_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w1, w2, *rest = inputs
    ctx.count = len(inputs)
    ctx.l_major = len(rest) > 1 and rest[1]
    ctx.save_for_backward(x, w1, w2)


def _monarch_gradient(backward: Callable[..., Gradients]) -> Callable[..., tuple[Tensor | None, ...]]:
    def gradient(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        needed = [*ctx.needs_input_grad[:4], False][:4]
        needed[3] = ctx.count > 3 and needed[3]
        grads = backward(grad_out, *ctx.saved_tensors, ctx.l_major, *needed)
        found = [g if wanted else None for g, wanted in zip(grads, needed, strict=True)]
        return (*found, None)[: ctx.count]

    return gradient


def _block_diag_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _block_diag_gradient(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:2]
    grads = _OPS.block_diag_matmul_backward(grad_out, *ctx.saved_tensors, *needed)
    return tuple(g if wanted else None for g, wanted in zip(grads, needed, strict=True))


def refuse_twice(op: str) -> str:
    return f"{op}: second derivatives are only available with backend='reference'"


def _refuse(message: str) -> Callable[..., Any]:
    def refuse(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(message)

    return refuse


def _like_backward(formula: Callable[..., int]) -> Callable[..., int]:
    """Of a backward op, whose first argument is grad_out."""
    return lambda grad_out, *args, **_: formula(
        *args[: 2 if formula is block_diag_flops else 3], backward=True
    )


for _op in ("monarch_matmul", "monarch_matmul_triton"):
    _backward = f"{_op}_backward"
    torch.library.register_fake(f"effkern::{_op}", _fake_monarch)
    torch.library.register_fake(f"effkern::{_backward}", _fake_monarch_backward)
    register_gradient(_op, _monarch_context, _monarch_gradient(getattr(_OPS, _backward)))
    torch.library.register_autograd(f"effkern::{_backward}", _refuse(refuse_twice("monarch_matmul")))
    register_autocast(_op, 4)
    register_flops(_op, lambda x, w1, w2, *_, **__: monarch_flops(x, w1, w2))
    register_flops(_backward, _like_backward(monarch_flops))
register_kernel("monarch_matmul", _composed_monarch, "CUDA")
register_kernel("monarch_matmul_backward", _composed_monarch_backward, "CUDA")
register_kernel("monarch_matmul_triton", _triton_monarch, "CPU", "CUDA")
register_kernel("monarch_matmul_triton_backward", _triton_monarch_backward, "CPU", "CUDA")

torch.library.register_fake("effkern::block_diag_matmul", _fake_block_diag)
torch.library.register_fake("effkern::block_diag_matmul_backward", _fake_block_diag_backward)
register_gradient("block_diag_matmul", _block_diag_context, _block_diag_gradient)
torch.library.register_autograd(
    "effkern::block_diag_matmul_backward", _refuse(refuse_twice("block_diag_matmul"))
)
register_autocast("block_diag_matmul", 2)
register_flops("block_diag_matmul", lambda x, w, **_: block_diag_flops(x, w))
register_flops("block_diag_matmul_backward", _like_backward(block_diag_flops))
register_kernel("block_diag_matmul", _composed_block_diag, "CUDA")
register_kernel("block_diag_matmul_backward", _composed_block_diag_backward, "CUDA")
