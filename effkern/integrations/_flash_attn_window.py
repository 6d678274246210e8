"""flash-attn's windows as masks."""

from __future__ import annotations

from effkern.masks import SlidingWindow


def window_mask(name: str, causal: bool, window_size: tuple[int, int]) -> SlidingWindow | None:
    """(left, right) with negative numbers for open ends; None where nothing is left for a mask to say."""
    if len(window_size) != 2:
        raise RuntimeError(f"{name}: window_size must be (left, right), got {window_size!r}")
    # A causal call hides what a right end would.
    left, right = window_size[0], -1 if causal else window_size[1]
    if left < 0 and right < 0:
        return None
    return SlidingWindow(None if left < 0 else left, None if right < 0 else right)
