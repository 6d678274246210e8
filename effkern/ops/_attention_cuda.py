"""Which CUDA C++ kernel of attention serves a request, and what it is handed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from effkern import _lib
from effkern.ops._attention_options import Options
from effkern.ops._dispatch import dtype_name

UNBOUNDED = 1 << 30
TERMS = tuple(name for name in Options._fields[5:] if name not in ("block", "dropout_seed"))


@dataclass(frozen=True)
class Kernel:
    """What one kernel can do. `terms`: fields of `Options` beside geometry that it takes."""

    name: str
    oldest: tuple[int, int]  # compute capability
    newest: tuple[int, int]
    widest: int  # head dimension
    terms: frozenset[str] = frozenset()
    backward: bool = False  # whether there is one beside the forward

    def refusal(
        self, capability: tuple[int, int], dtype: torch.dtype, sizes: Mapping[str, int]
    ) -> str | None:
        """Why it cannot serve a request, None when it can; `sizes` as made by `sizes_of`."""
        if not self.oldest <= capability <= self.newest:
            wanted = ".".join(map(str, self.oldest))
            wanted += "" if self.oldest == self.newest else " or newer"
            return f"it needs compute capability {wanted}, this GPU has {'.'.join(map(str, capability))}"
        if dtype not in (torch.bfloat16, torch.float16):
            return f"it takes bfloat16 and float16, not {dtype_name(dtype)}"
        for name in ("head_dim", "value_dim"):
            if sizes[name] % 8 or not 8 <= sizes[name] <= self.widest:
                return f"it takes multiples of 8 up to {self.widest} as {name}, not {sizes[name]}"
        unknown = [term for term in TERMS if term in sizes and term not in self.terms]
        if unknown:
            return f"it takes no {' or '.join(unknown)}"
        if "unfolded" in sizes:
            return "its masks are one window or one size of groups a head, or sinks with one window"
        if "layout" in sizes and "packed" in sizes:
            return "it takes no layout with cu_seqlens"
        return None


# In order of preference.
KERNELS = (
    Kernel("sm90", (9, 0), (9, 0), 256, frozenset(("bands", "groups", "layout")), backward=True),
    Kernel("sm80", (8, 0), (99, 0), 128),
)


class Window(NamedTuple):
    """Position p sees keys p - left .. p + right and, of those up to p + right, the first `sink`; in the group of its
    own where `group` is not 0 (for the second half of the heads groups are shifted by half)."""

    left: int = UNBOUNDED
    right: int = UNBOUNDED
    sink: int = 0
    group: int = 0


def fold(bands: Sequence[int], groups: Sequence[int], causal: bool) -> Window | None:
    """Bands (triples left, right, sink) and groups as one window, None where that cannot be."""
    bounded = [(left, sink) for left, sink in zip(bands[::3], bands[2::3], strict=True) if left < UNBOUNDED]
    sinks = [sink for _, sink in bounded if sink]
    if (sinks and (len(bounded) > 1 or groups)) or len(groups) > 1:
        return None
    left = min((left for left, _ in bounded), default=UNBOUNDED)
    right = min([*bands[1::3], 0 if causal else UNBOUNDED, UNBOUNDED])
    return Window(left, right, sinks[0] if sinks else 0, groups[0] if groups else 0)


def sizes_of(q: Tensor, v: Tensor, o: Options) -> dict[str, int]:
    """What a refusal depends on: dimensions, and a 1 for everything that the call has."""
    sizes = {"head_dim": q.shape[-1], "value_dim": v.shape[-1]}
    values = {name: getattr(o, name) for name in TERMS}
    sizes |= {name: 1 for name, value in values.items() if isinstance(value, Tensor) or value}
    if o.cu_seqlens_q is not None:
        sizes["packed"] = 1
    if fold(o.bands or (), o.groups or (), o.causal) is None:
        sizes["unfolded"] = 1
    return sizes


def choose(device: torch.device | None, dtype: torch.dtype, sizes: Mapping[str, int]) -> Kernel | str:
    """The best kernel for a request on this device (None: the current one), or why there is none."""
    capability = torch.cuda.get_device_capability(device)
    reasons = {kernel: kernel.refusal(capability, dtype, sizes) for kernel in KERNELS}
    for kernel, reason in reasons.items():
        if reason is None:
            return kernel
    return "; ".join(f"{kernel.name}: {reason}" for kernel, reason in reasons.items())


def refusal(device: str, dtype: torch.dtype, sizes: Mapping[str, int]) -> str | None:
    if not torch._C._dispatch_has_kernel_for_dispatch_key("effkern::attention_cuda_sm80", "CUDA"):
        return f"the CUDA library is not loaded: {_lib.status().cuda.reason}"
    if sizes.get("extended"):  # a report is asked for before a call is known
        return None
    found = choose(None, dtype, sizes)
    return found if isinstance(found, str) else None


def _copyable(x: Tensor) -> Tensor:
    """With rows that start on multiples of 16 bytes and without broadcast axes, as the copy engine wants them."""
    steps = [step for size, step in zip(x.shape[:-1], x.stride(), strict=False) if size > 1]
    good = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(step > 0 and step % 8 == 0 for step in steps)
    return x if good else x.clone(memory_format=torch.contiguous_format)


Lists = tuple[Tensor | None, Tensor | None, Tensor | None]


def _lists(q: Tensor, k: Tensor, o: Options, queries: int, keys: int, by_key: bool) -> Lists:
    """Tile lists of a block-sparse layout."""
    if o.layout is None:
        return None, None, None
    from effkern._triton.attention_lists import build

    bands = [*(o.bands or ()), *([UNBOUNDED, 0, 0] if o.causal else [])]
    lists = build(
        *(q.shape[-2], k.shape[-2], q.shape[-3], o.top_left, bands, list(o.groups or ()), o.layout),
        *(o.block, None, None, queries, keys, q.device, by_key),
    )
    return lists.entries, lists.full, lists.total


def _folded(o: Options) -> Window:
    window = fold(o.bands or (), o.groups or (), o.causal)
    assert window is not None, "a request that does not fold is refused"
    return window


def forward(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, o: Options) -> tuple[Tensor, Tensor]:
    """(out, lse) of a request that `kernel` does not refuse."""
    q, k, v = map(_copyable, (q, k, v))
    ops = torch.ops.effkern
    if kernel.name == "sm80":
        geometry = o.cu_seqlens_q, o.cu_seqlens_k, o.scale, o.causal, o.top_left
        return ops.attention_cuda_sm80(q, k, v, *geometry)
    lists = _lists(q, k, o, *forward_tile(_widest(q, v)), by_key=False)
    return ops.attention_cuda_sm90(
        *(
            q,
            k,
            v,
            o.cu_seqlens_q,
            o.cu_seqlens_k,
            o.scale,
            o.top_left,
            *_folded(o),
            o.layout,
            o.block,
            *lists,
        )
    )


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    o: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(grad_q, grad_k, grad_v, delta) of a request that sm90 does not refuse. The gradient of q is added up in no fixed
    order unless deterministic algorithms were asked for."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    grad_out, q, k, v = map(_copyable, (grad_out, q, k, v))
    tiles = backward_tiles(_widest(q, v), deterministic)
    return torch.ops.effkern.attention_cuda_sm90_backward(
        *(grad_out, grad_lse, q, k, v, out, lse, o.cu_seqlens_q, o.cu_seqlens_k, o.scale, o.top_left),
        *(*_folded(o), o.layout, o.block),
        *_lists(q, k, o, *tiles.by_query, by_key=False),
        *(*_lists(q, k, o, *tiles.by_key, by_key=True), deterministic),
    )


def _widest(q: Tensor, v: Tensor) -> int:
    return max(q.shape[-1], v.shape[-1])


class BackwardTiles(NamedTuple):
    """(queries, keys) of the kernels that walk over keys and over queries."""

    by_query: tuple[int, int]
    by_key: tuple[int, int]


def backward_tiles(widest: int, deterministic: bool) -> BackwardTiles:
    """`choose_backward_sm90` and `adding_queries_sm90` in csrc/attention/backward_sm90_launch.h."""
    if widest <= 64:
        return BackwardTiles((128, 128), (96 if deterministic else 64, 128))
    if widest <= 96:
        return BackwardTiles((128, 128), (80, 128))
    return BackwardTiles((128, 128), (64, 128)) if widest <= 128 else BackwardTiles((128, 64), (64, 64))


def forward_tile(widest: int) -> tuple[int, int]:
    """(queries, keys) of a masked tile of sm90: `choose_forward_sm90` in csrc/attention/forward_sm90_launch.h."""
    if widest <= 64:
        return 192, 128
    return (128, 128) if widest <= 128 else (128, 80)
