"""effkern behind `F.scaled_dot_product_attention`, for models that call it: on the CPU inside a block, on GPUs by name.

with effkern.integrations.sdpa.route() as calls:
    model(x).sum().backward()
print(calls)              # 24 calls ran on effkern, 2 on PyTorch: head dims go from 1 to 256, got 320 and 320 (2)

effkern.integrations.sdpa.register()                                   # CUDA
torch.nn.attention.activate_flash_attention_impl("effkern")            # until restore_flash_attention_impl()
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effkern.masks import Dense
from effkern.ops._attention_dispatch import cpu_refusal
from effkern.ops._dispatch import autocast_dtype, dtype_name
from effkern.ops.attention import attention

__all__ = ["Calls", "register", "route"]

# What the blocks that are open have put in place of the function, the one entered last at the end, over what was there
# before the first. They may close in any order, on any thread.
_routes: list[Callable[..., Tensor]] = []
_beneath = F.scaled_dot_product_attention
_change = threading.Lock()


@dataclass
class Calls:
    """What `route` saw. Calls that a compiler traced are counted once, when it traced them.

    Attributes:
        routed: how many calls ran on effkern.
        passed_on: how many were left to PyTorch, by reason.
    """

    routed: int = 0
    passed_on: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        text = f"{self.routed} calls ran on effkern, {self.passed_on.total()} on PyTorch"
        reasons = ", ".join(f"{reason} ({count})" for reason, count in self.passed_on.items())
        return f"{text}: {reasons}" if reasons else text


@contextlib.contextmanager
def route(*, strict: bool = False) -> Iterator[Calls]:
    """Has calls of `F.scaled_dot_product_attention` on CPU tensors run on `effkern.attention` inside the block.

    The function is replaced in `torch.nn.functional`, for all threads, and put back at the end of the block, also after
    an error; where blocks overlap, on one thread or several, at the end of the last one, and the block that was entered
    last sees a call first. So a call is seen where it is made through that module, as PyTorch's own layers, timm,
    diffusers and transformers do, and not where somebody has imported the function itself, nor in the fused inference
    path of `nn.TransformerEncoderLayer`, which does not call it. Gradients of what ran inside are effkern's wherever
    `backward` is called, but recomputation under `torch.utils.checkpoint` calls the function again: keep `backward`
    inside.

    What effkern would not compute as PyTorch defines it, PyTorch computes: other devices, float64, nested and integer
    tensors, tensor subclasses with functions of their own (DTensor among them), forward-mode derivatives, batch shapes
    that have to be broadcast, head dims above 256, a mask together with `is_causal`. The reasons are counted in what
    the block is given.

    Args:
        strict: raise instead of leaving a call to PyTorch.

    Yields:
        `Calls`, which counts while the block runs.

    Raises:
        RuntimeError: with `strict`, a call that effkern does not take; names the reason.

    Numerics:
        Those of `effkern.attention`. Boolean masks, additive masks with their gradients, dropout (another draw of the
        same generator), scale, `is_causal` (from the upper left, also where Sq != Sk) and `enable_gqa` mean what they
        mean to PyTorch; a row that sees no key gives 0, as there.
    """
    calls = Calls()

    def scaled_dot_product_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        reason = _refusal(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
        if reason is None:
            calls.routed += 1
            return _attend(query, key, value, attn_mask, dropout_p, is_causal, scale)
        if strict:
            raise RuntimeError(f"scaled_dot_product_attention: effkern cannot take this call: {reason}")
        calls.passed_on[reason] += 1
        return _below(scaled_dot_product_attention)(
            *(query, key, value, attn_mask, dropout_p, is_causal), scale=scale, enable_gqa=enable_gqa
        )

    _enter(scaled_dot_product_attention)
    try:
        yield calls
    finally:
        _leave(scaled_dot_product_attention)


def _enter(routed: Callable[..., Tensor]) -> None:
    global _beneath
    with _change:
        if not _routes:
            _beneath = F.scaled_dot_product_attention
        _routes.append(routed)
        F.scaled_dot_product_attention = routed


def _leave(routed: Callable[..., Tensor]) -> None:
    with _change:
        _routes.remove(routed)
        F.scaled_dot_product_attention = _routes[-1] if _routes else _beneath


def _below(routed: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Whom a block leaves a call to: the block around it, or what there was before any."""
    routes = list(_routes)  # another thread may change it
    place = routes.index(routed) if routed in routes else 0
    return routes[place - 1] if place > 0 else _beneath


def _own_functions(tensor: Tensor) -> bool:
    """Whether a tensor is of a subclass that says itself what functions of PyTorch do with it."""
    kind = type(tensor)
    if kind is Tensor or kind is nn.Parameter:
        return False
    # Wrappers of other tensors, DTensor for one, come in below the functions, where kernels of effkern know no rule.
    own = kind.__torch_function__ is not torch._C._disabled_torch_function_impl
    return own or hasattr(kind, "__tensor_flatten__")


def _refusal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
) -> str | None:
    """Why effkern leaves a call to PyTorch, None where it takes it."""
    tensors: tuple[Any, ...] = (q, k, v) if attn_mask is None else (q, k, v, attn_mask)
    if not all(isinstance(t, Tensor) for t in tensors):
        return "an argument is not a tensor"
    for t in tensors:
        if _own_functions(t):
            return f"a tensor is a {type(t).__name__}, which has functions of its own"
    if any(t.device.type != "cpu" for t in tensors):
        return "a tensor is not on the CPU"
    if any(t.is_nested or t.layout != torch.strided for t in tensors):
        return "a tensor is nested or sparse"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode derivatives"
    # A compiler has an interpreter of its own on that stack.
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func transforms"
    if not q.dim() == k.dim() == v.dim() or q.dim() not in (3, 4):
        return f"q, k and v have {q.dim()}, {k.dim()} and {v.dim()} dimensions, not all 3 or all 4"
    if not q.dtype == k.dtype == v.dtype and len({autocast_dtype(t) for t in (q, k, v)}) > 1:
        return "q, k and v differ in dtype"
    reason = cpu_refusal("cpu", autocast_dtype(q), {"head_dim": q.shape[-1], "value_dim": v.shape[-1]})
    if reason is not None:
        return reason
    if q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2] or k.shape[:-2] != v.shape[:-2]:
        return "the sizes of q, k and v do not fit"
    if q.shape[0] != k.shape[0]:
        return "the batch has to be broadcast"
    if q.dim() == 4 and q.shape[1] != k.shape[1]:
        if not enable_gqa:
            return "the heads have to be broadcast, and enable_gqa is not set"
        if k.shape[1] == 0 or q.shape[1] % k.shape[1] != 0:
            return "the heads of k do not divide those of q"
    if not 0.0 <= dropout_p < 1.0:
        return f"dropout_p is {dropout_p}"
    if attn_mask is None:
        return None
    if is_causal:
        return "attn_mask together with is_causal"
    return _mask_refusal(q, k, attn_mask)


def _mask_refusal(q: Tensor, k: Tensor, attn_mask: Tensor) -> str | None:
    if attn_mask.dtype not in (torch.bool, torch.float32, autocast_dtype(q)):
        return f"attn_mask is {dtype_name(attn_mask.dtype)} beside {dtype_name(q.dtype)}"
    sizes = (*q.shape[:-1], k.shape[-2])
    shape = (1,) * (len(sizes) - attn_mask.dim()) + tuple(attn_mask.shape)
    if len(shape) != len(sizes) or any(n not in (1, full) for n, full in zip(shape, sizes, strict=True)):
        return f"attn_mask of shape {tuple(attn_mask.shape)} does not broadcast to {sizes}"
    return None


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    """The call as effkern has it; of three dimensions the first becomes the batch, with one head."""
    single = q.dim() == 3
    if single:
        q, k, v = (t[:, None] for t in (q, k, v))
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask[:, None]
    hides = attn_mask is not None and attn_mask.dtype == torch.bool
    out = attention(
        *(q, k, v),
        causal=is_causal,
        align="top_left",
        scale=scale,
        mask=Dense(attn_mask) if attn_mask is not None and hides else None,
        bias=None if hides else attn_mask,
        dropout_p=dropout_p,
    )
    return out[:, 0] if single else out


def register(name: str = "effkern") -> None:
    """Adds effkern to the implementations of flash attention that PyTorch knows for CUDA; changes nothing else.

    `torch.nn.attention.activate_flash_attention_impl(name)` then puts it behind the flash backend of
    `F.scaled_dot_product_attention`, which PyTorch chooses for bfloat16 and float16 without a mask, and behind
    `torch.nn.attention.varlen`; `restore_flash_attention_impl()` ends that. Which of effkern's kernels runs is the
    choice of `effkern.backends`.

    Args:
        name: what to call it there.

    Supported: causal, dropout, grouped heads, head dims to 256, packed sequences with windows and ALiBi (one slope a
    head). Other arguments of PyTorch's operators (`seqused_k`, `block_table`, debug masks) raise. Needs torch 2.13.
    """
    from effkern.integrations import _sdpa_flash

    try:
        from torch.nn.attention import register_flash_attention_impl
    except ImportError:
        raise RuntimeError(
            f"sdpa.register: torch {torch.__version__} has no registry of flash attention implementations"
        ) from None
    register_flash_attention_impl(name, register_fn=_sdpa_flash.install)
