"""The masks of transformers as effkern's: its mask functions are taken apart, and what is unknown becomes a table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effkern.masks import Dense, Document, Mask, SlidingWindow


class Visible(NamedTuple):
    """What the queries of a call see, from the lower right; a tuple, so that what moves tensors between devices finds
    them."""

    causal: bool
    window: SlidingWindow | None
    others: Mask | None  # documents, padding
    queries: int  # that it was made for
    keys: int

    # `generate` builds the masks of a static cache itself, and hands them to a model that is about to build them. These
    # two let it do so; `build_mask` gives them back as they are.
    @property
    def ndim(self) -> int:
        return 4

    def contiguous(self) -> Visible:
        return self

    def require_sizes(self, queries: int, keys: int) -> None:
        """Positions count from the lower right of the sizes that the mask was made for: others would move it."""
        same = (queries, keys) == (self.queries, self.keys)
        if not same and (self.causal or self.mask() is not None):
            raise ValueError(
                f"attn_implementation='effkern': the mask is of {self.queries} queries and {self.keys} keys, the layer "
                f"has {queries} and {keys}"
            )

    def mask(self) -> Mask | None:
        if self.window is None or self.others is None:
            return self.others if self.window is None else self.window
        return self.window & self.others


class _Pattern(NamedTuple):
    """A mask function: bands around the position of a query, and the documents of packed sequences."""

    causal: bool = False
    left: int | None = None
    right: int | None = None
    ids: Tensor | None = None

    def both(self, other: _Pattern) -> _Pattern | None:
        if self.ids is not None and other.ids is not None:
            return None
        return _Pattern(
            self.causal or other.causal,
            _least(self.left, other.left),
            _least(self.right, other.right),
            other.ids if self.ids is None else self.ids,
        )


def _least(a: int | None, b: int | None) -> int | None:
    return min((n for n in (a, b) if n is not None), default=None)


def build_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Visible | Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Visible | Tensor:
    """The mask function that `register` gives to transformers; the arguments are those of its `sdpa_mask`.

    Causal order, sliding windows and packed sequences are recognised; padding (`attention_mask`) becomes a row of keys
    that are hidden. A mask function of another kind, a static cache, whose keys go on behind the last query, a model
    that asks for a table (`allow_is_..._skip`), and code that is being compiled get what `sdpa_mask` computes.

    Returns:
        `Visible`, or bool (B, 1, Sq, Sk).
    """
    from transformers import masking_utils

    if isinstance(attention_mask, Visible):
        return attention_mask
    if mask_function is None:
        mask_function = masking_utils.causal_mask_function
    pattern = None
    if not (use_vmap or isinstance(q_offset, Tensor) or torch.compiler.is_compiling()):
        pattern = _recognise(masking_utils, mask_function)
    # Packed sequences switch the skip off themselves.
    wanted = pattern is not None and (
        pattern.ids is not None or (allow_is_causal_skip if pattern.causal else allow_is_bidirectional_skip)
    )
    if pattern is None or not wanted or not _fits(pattern, q_length, kv_length, q_offset, kv_offset):
        # Without the skips this is always a table.
        table: Tensor = masking_utils.sdpa_mask(
            *(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask),
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            use_vmap=use_vmap,
            device=device,
        )
        return table
    others: Mask | None = None if pattern.ids is None else Document(pattern.ids)
    padding = _padding(attention_mask, kv_length, kv_offset)
    if padding is not None:
        others = padding if others is None else others & padding
    # Ends that hide nothing are left out: a call without a mask takes the shorter path.
    longest = max(q_length, kv_length) - 1
    left, right = (None if n is None or n >= longest else n for n in (pattern.left, pattern.right))
    if pattern.causal:
        right = None
    window = None if left is right is None else SlidingWindow(left, right)
    return Visible(pattern.causal, window, others, q_length, kv_length)


def _fits(pattern: _Pattern, q_length: int, kv_length: int, q_offset: Any, kv_offset: int) -> bool:
    """Whether queries and keys lie to each other as effkern counts positions, where that matters."""
    if pattern.ids is not None:
        return q_length == kv_length and q_offset == kv_offset == 0 and pattern.ids.shape[1] == kv_length
    if not pattern.causal and pattern.left is pattern.right is None:
        return True
    return bool(q_offset + q_length == kv_offset + kv_length)


def _padding(attention_mask: Tensor | None, kv_length: int, kv_offset: int) -> Dense | None:
    """The keys that are there, of what is bool (B, keys so far); what lies behind its end is not."""
    if attention_mask is None:
        return None
    there = attention_mask[:, kv_offset : kv_offset + kv_length]
    there = torch.nn.functional.pad(there, (0, kv_length - there.shape[1]))
    return None if bool(there.all()) else Dense(there[:, None, None, :])


def _recognise(utils: Any, function: Any) -> _Pattern | None:
    """What a mask function hides, None where it is not one of the known."""
    if function is utils.causal_mask_function:
        return _Pattern(causal=True)
    if function is utils.bidirectional_mask_function:
        return _Pattern()
    code = getattr(function, "__code__", None)
    if code is None or getattr(function, "__module__", None) != utils.__name__:
        return None
    # The functions are closures, known by the one that made them and by what they hold.
    maker = function.__qualname__.partition(".")[0]
    held = {
        name: cell.cell_contents
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True)
    }
    if held.get("sliding_window", 1) < 1:
        return None
    if maker == "sliding_window_overlay" and held.keys() == {"sliding_window"}:
        return _Pattern(left=held["sliding_window"] - 1)
    if maker == "sliding_window_bidirectional_overlay" and held.keys() == {"sliding_window"}:
        return _Pattern(left=held["sliding_window"], right=held["sliding_window"])
    if maker == "packed_sequence_mask_function" and held.keys() == {"packed_sequence_mask"}:
        return _Pattern(ids=held["packed_sequence_mask"])
    if maker == "and_masks" and held.keys() == {"mask_functions"}:
        return _join(utils, held["mask_functions"])
    return None


def _join(utils: Any, functions: tuple[Any, ...]) -> _Pattern | None:
    packed = any(
        getattr(f, "__qualname__", "").startswith("packed_sequence_mask_function.") for f in functions
    )
    joined: _Pattern | None = _Pattern()
    for function in functions:
        name = getattr(function, "__qualname__", "")
        if packed and name.startswith("remap_positions_for_packed_sequence."):
            # Inside a packed sequence positions rise by one, so bands mean the same before and after.
            cells = zip(function.__code__.co_freevars, function.__closure__, strict=True)
            function = {key: cell.cell_contents for key, cell in cells}["mask_function"]
        pattern = _recognise(utils, function)
        if joined is None or pattern is None:
            return None
        joined = joined.both(pattern)
    return joined
