"""Corrupt state_dicts: one entry is changed, the module loads what is left, and is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from robust_tally import attempt, survived
from torch import Tensor, nn

Draw = Callable[..., Any]
DOCUMENTED = (TypeError, ValueError, RuntimeError)


def _wild(draw: Draw, entry: Tensor) -> Tensor:
    """Any number of the dtype in one place."""
    if entry.numel() == 0:
        return entry
    changed = entry.clone(memory_format=torch.contiguous_format)
    place = draw(st.integers(0, entry.numel() - 1), label="place")
    if entry.is_floating_point():
        value: Any = draw(st.sampled_from([float("nan"), float("inf"), -1e30, 0.0]), label="value")
    elif entry.dtype == torch.uint8:
        value = draw(st.integers(0, 255), label="value")
    else:
        value = draw(st.sampled_from([-(2**62), -1, 0, 1, 2, 3, 5, 2**31, 2**62]), label="value")
    changed.view(-1)[place] = value
    return changed


CORRUPTIONS: dict[str, Callable[[Draw, Tensor], Any]] = {
    "an entry cut short": lambda draw, t: t[:-1] if t.dim() and len(t) else t.reshape(-1)[:0],
    "an entry too long": lambda draw, t: torch.cat([t.reshape(-1), t.reshape(-1)[:1]]),
    "an entry flattened": lambda draw, t: t.reshape(-1),
    "an entry transposed": lambda draw, t: t.mT if t.dim() > 1 else t[None],
    "an entry of another dtype": lambda draw, t: t.to(
        draw(
            st.sampled_from(
                [torch.float64, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool]
            )
        )
    ),
    "an entry with a wild number": _wild,
    "an entry that is no tensor": lambda draw, t: draw(st.sampled_from([None, 3, "x", [1.0], object()])),
}
MISSING, STRANGE = "an entry missing", "an entry too many"


def corrupted(draw: Draw, state: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A kind of corruption, and the state with it."""
    kind = draw(st.sampled_from([*CORRUPTIONS, MISSING, STRANGE]), label="corruption")
    key = draw(st.sampled_from(sorted(state)), label="entry")
    changed = dict(state)
    if kind == MISSING:
        del changed[key]
    elif kind == STRANGE:
        changed[f"{key}_more"] = state[key]
    elif isinstance(state[key], Tensor):
        changed[key] = CORRUPTIONS[kind](draw, state[key])
    return kind, changed


def corrupted_load(
    data: st.DataObject, area: str, module: nn.Module, use: Callable[[nn.Module], Tensor]
) -> None:
    """`module` loads its own state_dict with one corruption. An error leaves it as it was: it has only been given what
    it had. Without one, `use` gives a result or an error of the documented kinds."""
    with torch.no_grad():
        before = use(module)
        state = {name: t.clone() if isinstance(t, Tensor) else t for name, t in module.state_dict().items()}
        kind, state = corrupted(data.draw, state)
        attempt(area, f"state_dict: {kind}")
        try:
            module.load_state_dict(state)
        except DOCUMENTED:
            assert torch.equal(use(module), before), "an error changed the module"
            survived(area, f"state_dict: {kind}", refused=True)
            return
        try:
            after = use(module)
        except DOCUMENTED:
            survived(area, f"state_dict: {kind}", refused=True)
            return
        assert after.shape == before.shape
        survived(area, f"state_dict: {kind}")
