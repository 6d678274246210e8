"""What the software model of the sm_90a kernels is told beside a call: masks, stored lists, tiles."""

from __future__ import annotations

import ctypes

import torch
from cuda_model import Case
from torch import Tensor

from effkern._triton.attention_lists import build
from effkern.ops import _attention_cuda as cuda_kernels


class Lists(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("entries", "full", "total")),
        *((name, ctypes.c_int) for name in ("batch_lines", "head_lines", "most")),
    ]


class Masks(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("left", "right", "sink", "group")),
        ("layout", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("layout_batch", "layout_head", "layout_row")),
        ("block", ctypes.c_int),
        ("lists", Lists),
        *((name, ctypes.c_int) for name in ("multiprocessors", "head_dim", "keys")),
    ]


def stored_lists(case: Case, queries: int, keys: int, by_key: bool) -> tuple[Lists, list[Tensor]]:
    """Lists of a case with a layout for tiles of so many queries and keys, and the memory they lie in."""
    lowered = case.lowered()
    assert lowered.layout is not None
    bands = [*lowered.bands, *([1 << 30, 0, 0] if case.causal else [])]
    lists = build(
        *(case.sq, case.sk, case.hq, case.top_left, bands, list(lowered.groups), lowered.layout),
        *(lowered.block, None, None, queries, keys, torch.device("cpu"), by_key),
    )
    batch, heads = lists.entries.shape[:2]
    return Lists(
        *(t.data_ptr() for t in lists),
        *(heads if batch > 1 else 0, int(heads > 1), lists.entries.shape[-1]),
    ), list(lists)


def masks_of(case: Case, padded: int, queries: int, keys: int) -> tuple[Masks, list[Tensor]]:
    """Masks of a case, lists by query tile included, and the memory they lie in."""
    lowered = case.lowered()
    window = cuda_kernels.fold(lowered.bands, lowered.groups, case.causal)
    assert window is not None
    masks = Masks(**window._asdict(), multiprocessors=case.blocks, head_dim=padded, keys=keys)
    memory: list[Tensor] = []
    if lowered.layout is not None:
        layout = lowered.layout.contiguous()
        steps = [step if size > 1 else 0 for size, step in zip(layout.shape, layout.stride(), strict=True)]
        masks.layout, masks.block = layout.data_ptr(), lowered.block
        masks.layout_batch, masks.layout_head, masks.layout_row = steps[0], steps[1], layout.stride(2)
        masks.lists, lists = stored_lists(case, queries, keys, by_key=False)
        memory += [layout, *lists]
    return masks, memory
