"""Masks that hold a table. Public through effkern.masks."""

from __future__ import annotations

import torch
from torch import Tensor

from effkern._mask_base import Lowered, Mask, check_bool, check_integer, dtype_name

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class BlockSparse(Mask):
    """layout[b, h, i // block, j // block].

    Args:
        layout: bool (B|1, Hq|1, nq, nk), nq >= ceil(Sq / block), nk >= ceil(Sk / block). With cu_seqlens the first
            axis counts sequences, and nq and nk must suffice for the longest.
        block: side of a block, a multiple of 16. The queries count from the first row, whatever `align` says.

    Source: Child et al. 2019 (Sparse Transformers), section 5.5.
    """

    def __init__(self, layout: Tensor, block: int) -> None:
        check_bool("BlockSparse", "layout", layout)
        if layout.dim() != 4:
            raise ValueError(
                f"BlockSparse: layout must have shape (batch or 1, heads or 1, query blocks, key blocks), "
                f"got {tuple(layout.shape)}"
            )
        check_integer("BlockSparse", "block", block, 16)
        if block % 16 != 0:
            raise ValueError(f"BlockSparse: block must be a multiple of 16, got {block}")
        self.layout, self.block = layout, block
        self._lowered = Lowered(layout=layout, block=block)

    def to(self, device: torch.device | str) -> Mask:
        return BlockSparse(self.layout.to(device), self.block)

    def _sees(self, i: Tensor, p: Tensor, j: Tensor, heads: int) -> Tensor:
        blocks = -(-len(i) // self.block), -(-len(j) // self.block)
        if self.layout.shape[2] < blocks[0] or self.layout.shape[3] < blocks[1]:
            raise ValueError(
                f"to_dense: layout has {tuple(self.layout.shape[2:])} blocks, "
                f"{len(i)} queries and {len(j)} keys need {blocks}"
            )
        wide = self.layout.repeat_interleave(self.block, 2).repeat_interleave(self.block, 3)
        return wide[:, :, : len(i), : len(j)]

    def __repr__(self) -> str:
        return f"BlockSparse(layout={tuple(self.layout.shape)}, block={self.block})"


class Document(Mask):
    """ids[b, p] == ids[b, j]: tokens see their own document only.

    Args:
        ids: integer (B|1, Sk), or (Sk,): the document of every key, in any order. With cu_seqlens (Tk,), one a token.
            A query whose position lies outside the keys sees nothing.

    Source: Krell et al. 2021 (Efficient sequence packing without cross-contamination), section 3.2.
    """

    def __init__(self, ids: Tensor) -> None:
        if not isinstance(ids, Tensor):
            raise TypeError(f"Document: ids must be an integer tensor, got {type(ids).__name__}")
        if ids.dtype not in _INTEGERS:
            raise TypeError(f"Document: ids must be an integer tensor, got {dtype_name(ids)}")
        if ids.dim() not in (1, 2):
            raise ValueError(
                f"Document: ids must have shape (batch or 1, keys) or (keys,), got {tuple(ids.shape)}"
            )
        self.ids = ids
        self._lowered = Lowered(ids=(ids if ids.dim() == 2 else ids[None]).to(torch.int64))

    def to(self, device: torch.device | str) -> Mask:
        return Document(self.ids.to(device))

    def _sees(self, i: Tensor, p: Tensor, j: Tensor, heads: int) -> Tensor:
        ids = self.ids if self.ids.dim() == 2 else self.ids[None]
        if ids.shape[1] != len(j):
            raise ValueError(f"to_dense: ids has {ids.shape[1]} entries, there are {len(j)} keys")
        same = ids[:, None, :] == ids[:, :, None]  # (B|1, Sk, Sk): what a query at every position sees
        seen = torch.zeros(len(ids), len(i), len(j), dtype=torch.bool, device=j.device)
        inside = ((p >= 0) & (p < len(j)))[:, 0]
        seen[:, inside] = same[:, p[inside, 0]]
        return seen[:, None]

    def __repr__(self) -> str:
        return f"Document(ids={tuple(self.ids.shape)})"


class Dense(Mask):
    """mask[b, h, i, j], True where the key is visible.

    Args:
        mask: bool, broadcastable to (B, Hq, Sq, Sk). With cu_seqlens the first axis counts sequences, and the last two
            must suffice for the longest.
    """

    def __init__(self, mask: Tensor) -> None:
        check_bool("Dense", "mask", mask)
        if mask.dim() > 4:
            raise ValueError(
                f"Dense: mask must broadcast to (batch, heads, queries, keys), got {tuple(mask.shape)}"
            )
        self.mask = mask
        self._lowered = Lowered(visible=mask.reshape((1,) * (4 - mask.dim()) + mask.shape))

    def to(self, device: torch.device | str) -> Mask:
        return Dense(self.mask.to(device))

    def _sees(self, i: Tensor, p: Tensor, j: Tensor, heads: int) -> Tensor:
        for size, count in zip(self.mask.shape[::-1], (len(j), len(i)), strict=False):
            if size not in (1, count):
                raise ValueError(
                    f"to_dense: mask has shape {tuple(self.mask.shape)}, "
                    f"which does not broadcast to ({len(i)}, {len(j)})"
                )
        return self.mask

    def __repr__(self) -> str:
        return f"Dense(mask={tuple(self.mask.shape)})"
