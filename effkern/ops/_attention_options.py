"""What a call of attention carries beside q, k and v: as the dispatcher has it, where it comes from, and its checks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effkern.masks import Lowered, Mask
from effkern.ops._attention_checks import largest_factor, require
from effkern.ops._dispatch import dtype_name, require_dense
from effkern.reference.attention import new_dropout_seed


class Options(NamedTuple):
    """The arguments after q, k and v, in the order and with the defaults of the schema (csrc/library.cpp)."""

    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    scale: float | None = None
    causal: bool = False
    top_left: bool = False
    bands: Sequence[int] | None = None
    groups: Sequence[int] | None = None
    layout: Tensor | None = None
    block: int = 0
    ids: Tensor | None = None
    visible: Tensor | None = None
    bias: Tensor | None = None
    softcap: float = 0.0
    sink_logits: Tensor | None = None
    alibi_slopes: Tensor | None = None
    dropout_p: float = 0.0
    dropout_seed: Tensor | None = None

    def mask(self) -> Lowered:
        return Lowered(
            tuple(self.bands or ()), tuple(self.groups or ()), self.layout, self.block, self.ids, self.visible
        )

    def launch(self) -> dict[str, Any]:
        """The same for a Triton launcher."""
        return {**self._asdict(), "bands": self.bands or (), "groups": self.groups or ()}

    def extended(self) -> bool:
        """Whether there is more than geometry: a mask besides `causal`, a score term, dropout."""
        return not (
            self.layout
            is self.ids
            is self.visible
            is self.bias
            is self.sink_logits
            is self.alibi_slopes
            is None
            and self.softcap == 0.0
            and self.dropout_p == 0.0
            and not self.bands
            and not self.groups
        )

    def keywords(self) -> dict[str, Any]:
        """The same for the functions of `effkern.reference.attention`."""
        return dict(
            causal=self.causal,
            align="top_left" if self.top_left else "bottom_right",
            scale=self.scale,
            cu_seqlens_q=self.cu_seqlens_q,
            cu_seqlens_k=self.cu_seqlens_k,
            mask=self.mask(),
            bias=self.bias,
            softcap=self.softcap,
            sink_logits=self.sink_logits,
            alibi_slopes=self.alibi_slopes,
            dropout_p=self.dropout_p,
            dropout_seed=self.dropout_seed,
        )


def _tensor(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"attention: {name} must be a tensor, got {type(value).__name__}")
    return value


def lower(mask: Any) -> Lowered:
    if not isinstance(mask, Mask):
        hint = (
            "; effkern.masks.Dense takes a bool tensor, `bias` an additive one"
            if torch.is_tensor(mask)
            else ""
        )
        raise TypeError(f"attention: mask must be one of effkern.masks, got {type(mask).__name__}{hint}")
    return mask.lower()


def collect(
    q: Tensor,
    geometry: tuple[Tensor | None, Tensor | None, float | None, bool, bool],
    mask: Mask | None = None,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Options:
    """The options of a public call; `geometry` is the first five of them."""
    lowered = Lowered() if mask is None else lower(mask)
    if bias is not None:
        require(
            _tensor("bias", bias).dim() <= 4,
            f"bias must broadcast to (batch, heads, queries, keys), got shape {tuple(bias.shape)}",
        )
        require_dense("attention", bias=bias)
        bias = bias.reshape((1,) * (4 - bias.dim()) + bias.shape)
    if sink_logits is not None:
        _tensor("sink_logits", sink_logits)
    if alibi_slopes is not None:
        _tensor("alibi_slopes", alibi_slopes)
        trained = alibi_slopes.requires_grad and torch.is_grad_enabled()
        require(
            not trained,
            "alibi_slopes must not require a gradient, there is none; use bias for trained slopes",
        )
        alibi_slopes = alibi_slopes.to(torch.float32)
    seed = new_dropout_seed(q.device) if dropout_p != 0.0 else None
    terms = bias, float(softcap), sink_logits, alibi_slopes, float(dropout_p), seed
    # None where there are none: programs of AOTInductor cannot pass on a list without entries.
    lists = lowered.bands or None, lowered.groups or None
    return Options._make((*geometry, *lists, *lowered[2:], *terms))


def _check_table(
    name: str, table: Tensor, q: Tensor, expected: tuple[int | None, ...], packed: bool, broadcast: bool
) -> None:
    """Each axis is 1 or as expected (None: unknown); the last two may be larger in a packed call and in a layout."""

    def fits(axis: int, size: int, wanted: int | None) -> bool:
        if size == 1 and (axis < 2 or broadcast):
            return True
        return (
            wanted is None or size == wanted or (axis >= 2 and size >= wanted and (packed or not broadcast))
        )

    shape = tuple(table.shape)
    good = len(shape) == 4 and all(
        fits(i, n, m) for i, (n, m) in enumerate(zip(shape, expected, strict=True))
    )
    wanted = ", ".join("longest sequence" if n is None else str(n) for n in expected)
    require(good, f"{name} has shape {shape}, which does not broadcast to ({wanted})")
    _check_device(name, table, q)


def _check_device(name: str, tensor: Tensor, q: Tensor) -> None:
    require(tensor.device == q.device, f"{name} is on {tensor.device}, q is on {q.device}")


def _check_dtype(name: str, tensor: Tensor, q: Tensor) -> None:
    require(
        tensor.dtype in (torch.float32, q.dtype),
        f"{name} must be float32 or q's {dtype_name(q.dtype)}, got {dtype_name(tensor.dtype)}",
    )


def _check_mask(o: Options, q: Tensor, k: Tensor, longest: tuple[int | None, int | None]) -> None:
    packed = o.cu_seqlens_q is not None
    entries = q.shape[0] if o.cu_seqlens_q is None else o.cu_seqlens_q.shape[0] - 1
    count = len(o.bands or ())
    require(count % 3 == 0, f"bands must hold triples (left, right, sink), got {count} numbers")
    for size in o.groups or ():
        require(size >= 1, f"groups must be at least 1, got {size}")
    for name, table in (("layout", o.layout), ("visible", o.visible)):
        if table is None:
            continue
        require(table.dtype == torch.bool, f"{name} must be bool, got {dtype_name(table.dtype)}")
        sides = longest
        if name == "layout":
            good = o.block >= 16 and o.block % 16 == 0
            require(good, f"block must be a multiple of 16, got {o.block}")
            rows, columns = (None if n is None else -(-n // o.block) for n in longest)
            sides = rows, columns
        _check_table(name, table, q, (entries, q.shape[-3], *sides), packed, name == "visible")
    if o.ids is not None:
        require(o.ids.dtype == torch.int64, f"ids must be int64, got {dtype_name(o.ids.dtype)}")
        batch = 1 if packed else entries
        good = o.ids.dim() == 2 and o.ids.shape[0] in (1, batch) and o.ids.shape[1] == k.shape[-2]
        shape = tuple(o.ids.shape)
        require(good, f"ids must have shape ({batch} or 1, {k.shape[-2]}), got {shape}")
        _check_device("ids", o.ids, q)


def check_options(
    o: Options, q: Tensor, k: Tensor, longest: tuple[int | None, int | None] = (None, None)
) -> None:
    """What csrc/attention/options.h checks. `longest`: queries and keys of the longest sequence of a packed call, if
    known."""
    if not o.extended():
        return
    packed = o.cu_seqlens_q is not None
    if not packed:
        longest = q.shape[-2], k.shape[-2]
    _check_mask(o, q, k, longest)
    if o.bias is not None:
        _check_dtype("bias", o.bias, q)
        entries = q.shape[0] if o.cu_seqlens_q is None else o.cu_seqlens_q.shape[0] - 1
        _check_table("bias", o.bias, q, (entries, q.shape[-3], *longest), packed, True)
    good = math.isfinite(o.softcap) and 0.0 <= o.softcap <= largest_factor(q.dtype)[0]
    require(good, f"softcap must be finite and at least 0, got {o.softcap}")
    for name, tensor in (("sink_logits", o.sink_logits), ("alibi_slopes", o.alibi_slopes)):
        if tensor is not None:
            heads, shape = q.shape[-3], tuple(tensor.shape)
            require(
                shape == (heads,), f"{name} must have shape ({heads},), one number a query head, got {shape}"
            )
            _check_dtype(name, tensor, q)
            _check_device(name, tensor, q)
    require(0.0 <= o.dropout_p < 1.0, f"dropout_p must be in [0, 1), got {o.dropout_p}")
    if o.dropout_p > 0.0:
        seed = o.dropout_seed
        good = (
            seed is not None and seed.dtype == torch.int64 and seed.numel() == 1 and seed.device == q.device
        )
        require(good, "dropout needs dropout_seed, one int64 on q's device")
