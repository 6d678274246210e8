"""What every mask is: its canonical form, its dense form, and how two masks compose. Public through effkern.masks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

UNBOUNDED = 2**30  # stands for a missing end of a band; sequences are shorter


class Lowered(NamedTuple):
    """What the kernels know of a mask: a pair is visible when every term lets it through.

    bands: triples (left, right, sink), flat: j <= p + right and (j >= p - left or j < sink).
    groups: sizes g: (p + s) // g == (j + s) // g, with s = 0 in query heads h < Hq // 2 and g // 2 in the others.
    layout, block: bool (B|1, Hq|1, nq, nk): layout[b, h, i // block, j // block].
    ids: int64 (B|1, Sk): 0 <= p < Sk and ids[b, p] == ids[b, j].
    visible: bool, four axes, each 1 or that of (B, Hq, Sq, Sk).
    """

    bands: tuple[int, ...] = ()
    groups: tuple[int, ...] = ()
    layout: Tensor | None = None
    block: int = 0
    ids: Tensor | None = None
    visible: Tensor | None = None


def check_integer(owner: str, name: str, value: Any, least: int, or_none: bool = False) -> None:
    expected = f"{owner}: {name} must be an integer of at least {least}{' or None' if or_none else ''}, got"
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{expected} {value!r}")
    if value < least:
        raise ValueError(f"{expected} {value}")


class Mask:
    """Base of all masks. `a & b` is the mask of what both show; `causal=True` of an op composes in the same way."""

    _lowered: Lowered

    def lower(self) -> Lowered:
        """The canonical form, which the ops take apart into their arguments."""
        return self._lowered

    def to_dense(self, Sq: int, Sk: int, heads: int = 1, align: str = "bottom_right") -> Tensor:
        """The mask as a matrix: its definition, for tests and for looking at.

        Args:
            Sq: number of queries.
            Sk: number of keys.
            heads: Hq; only `ShiftedGroups` looks at it.
            align: where the queries stand when Sq != Sk, as in `effkern.attention`.

        Returns:
            bool (B|1, Hq|1, Sq, Sk), True where key j is visible to query i, on the device of the mask's tensors.

        Raises:
            ValueError: a size is negative, `align` is unknown, or a table of the mask does not have these sizes.

        Example:
            >>> effkern.masks.SlidingWindow(1, 0).to_dense(3, 3)[0, 0].int()
            tensor([[1, 0, 0],
                    [1, 1, 0],
                    [0, 1, 1]], dtype=torch.int32)
        """
        for name, value in (("Sq", Sq), ("Sk", Sk), ("heads", heads)):
            check_integer("to_dense", name, value, 0)
        if align not in ("bottom_right", "top_left"):
            raise ValueError(f"to_dense: align must be 'bottom_right' or 'top_left', got {align!r}")
        i = torch.arange(Sq, device=self.device)[:, None]
        j = torch.arange(Sk, device=self.device)
        p = i if align == "top_left" else i + (Sk - Sq)
        seen = self._sees(i, p, j, heads)
        return seen.reshape((1,) * (4 - seen.dim()) + seen.shape).expand(-1, -1, Sq, Sk)

    @property
    def device(self) -> torch.device | None:
        """Where the tensors of the mask are, None if it has none."""
        return next((term.device for term in self._lowered if isinstance(term, Tensor)), None)

    def to(self, device: torch.device | str) -> Mask:
        """The same mask with its tensors on `device`."""
        return self

    def __and__(self, other: Mask) -> Mask:
        return _All(self, other) if isinstance(other, Mask) else NotImplemented

    def _sees(self, i: Tensor, p: Tensor, j: Tensor, heads: int) -> Tensor:
        """i and p (Sq, 1), j (Sk,) -> bool, broadcastable to (B, Hq, Sq, Sk)."""
        raise NotImplementedError


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def check_bool(owner: str, name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{owner}: {name} must be a bool tensor, got {type(value).__name__}")
    if value.dtype != torch.bool:
        raise TypeError(f"{owner}: {name} must be a bool tensor, got {dtype_name(value)}")


class _All(Mask):
    """What every part shows. Tables of the same kind are merged here, once."""

    def __init__(self, *parts: Mask) -> None:
        self.parts = parts
        first, *others = (part.lower() for part in parts)
        for other in others:
            first = _merge(first, other)
        self._lowered = first

    def to(self, device: torch.device | str) -> Mask:
        return _All(*(part.to(device) for part in self.parts))

    def _sees(self, i: Tensor, p: Tensor, j: Tensor, heads: int) -> Tensor:
        first, *others = (part._sees(i, p, j, heads) for part in self.parts)
        for other in others:
            first = first & other
        return first

    def __repr__(self) -> str:
        return " & ".join(map(repr, self.parts))


def _merge(a: Lowered, b: Lowered) -> Lowered:
    layout, block = _merge_layouts(a.layout, a.block, b.layout, b.block)
    return Lowered(
        bands=a.bands + b.bands,
        groups=a.groups + b.groups,
        layout=layout,
        block=block,
        ids=_merge_ids(a.ids, b.ids),
        visible=b.visible if a.visible is None else a.visible if b.visible is None else a.visible & b.visible,
    )


def _merge_layouts(
    a: Tensor | None, block_a: int, b: Tensor | None, block_b: int
) -> tuple[Tensor | None, int]:
    """One layout in the largest blocks that divide both. It may have blocks too many at the end, where the last
    blocks of the two ended in different places."""
    if a is None or b is None:
        return (a, block_a) if b is None else (b, block_b)
    block, rest = block_a, block_b
    while rest:  # math.gcd does not take the symbolic integers of torch.compile
        block, rest = rest, block % rest
    fine = [
        t.repeat_interleave(size // block, 2).repeat_interleave(size // block, 3)
        for t, size in ((a, block_a), (b, block_b))
    ]
    rows, columns = (min(t.shape[axis] for t in fine) for axis in (2, 3))
    return fine[0][:, :, :rows, :columns] & fine[1][:, :, :rows, :columns], block


def _ranks(ids: Tensor) -> Tensor:
    """(B, S): equal where the ids of a row are equal, and in [0, S)."""
    ordered, order = ids.sort(dim=1)
    steps = (ordered[:, 1:] != ordered[:, :-1]).cumsum(1)
    ranks = torch.cat([torch.zeros_like(ids[:, :1]), steps], 1)
    return torch.empty_like(ids).scatter(1, order, ranks)


def _merge_ids(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Ids that are equal where both are: ranks make the pairs small enough for one int64."""
    if a is None or b is None:
        return a if b is None else b
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"Document: ids of {a.shape[1]} and of {b.shape[1]} keys do not compose")
    return _ranks(a) * a.shape[1] + _ranks(b)
