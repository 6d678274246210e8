"""Stacks of reversible blocks: one pass of recomputation through all of them, overlapped with the gradient."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from effkern.nn import _reversible_anchors as anchoring
from effkern.nn import _reversible_schedule as schedules
from effkern.nn._reversible_couplings import Coupling, Dual, State, Streamwise, straight_through_grid
from effkern.nn._reversible_engine import Tape
from effkern.nn._reversible_replay import replayed_rng, rng_state
from effkern.nn._reversible_sides import named
from effkern.nn.reversible import Coupled, check_streams

_OWNER = "ReversibleSequence"
_MANTISSA = 24  # bits of a float32
_HEADROOM = 2  # bits left above the largest value that the probe for exact="auto" saw
_FINEST, _COARSEST = 18, 6  # what that probe may choose


class ReversibleSequence(nn.Module):
    """A stack of reversible blocks that stores its outputs and no activation in between, whatever its depth.

    Backward can recover the inputs of block i - 1 while it computes the gradients of block i: on two CUDA streams, on
    the CPU with a second thread where that is faster.

    Args:
        blocks: `ReversibleBlock`s, `DualResidualBlock`s and `ReversibleTransition`s in any order; a module may occur
            more than once. They are in `self.blocks`, an nn.ModuleList.
        overlap: True or False; "auto" times the first four backward passes on a CPU with and without a second thread
            and keeps the faster, and does not overlap on CUDA, where two streams have yet to run on hardware. Gradients
            have the same bits either way.
        exact: q makes recovered states bit-identical to the true ones. The stack input and what sub-blocks return are
            rounded to multiples of 2^-q and the streams are float32, so that additions are exact and can be undone, as
            long as |state| < 2^(24 - q). Sub-blocks must give equal bits for equal input. "auto" chooses q, 18 at most,
            from the range of values in one extra forward pass, the first, with room for four times as much. None: off.
        anchors: blocks whose inputs are stored all the same. "auto": as few as keep the predicted error of recovered
            inputs of `DualResidualBlock`s within error_budget; indices: these; None: none. A
            `ReversibleTransition`'s are always stored.
        error_budget: largest error of a recovered state relative to states of size one.

    Calling it:
        sequence(x1, x2, *args, **kwargs) -> (y1, y2). x1, x2 (any shape) of equal shape and floating dtype. With x2
        left out both streams start from x1; a stack that begins with a `DualResidualBlock` then starts its second one
        from beta x1, as if a block before had kept it. Every extra argument goes to all sub-blocks that take it by
        name (positional ones get their names from the first sub-block that has enough parameters), and gets gradients.
        Only tensors that are given as arguments or are parameters get gradients.

    Raises:
        TypeError: blocks or inputs of the wrong kind; an extra argument that no sub-block takes, or, while gradients
            are recorded, of a class in which autograd sees no tensors.
        ValueError: an option is unknown; an (alpha, beta) whose predicted error exceeds the budget without anchors;
            exact with beta other than 1.
        RuntimeError: shapes, dtypes or devices do not fit; exact: a state of 2^(24 - q) or more, naming the first block
            that returned one; a hook on a block changed its output; a sub-block changed its input in place; in
            backward, an output or a parameter was modified in place, a parameter is another one than in the forward
            pass, or only a state between blocks got a gradient; double backward.

    Numerics:
        Without exact, recovered states are off by roundings in the dtype of the streams. float32 streams under
        bfloat16 autocast recover to about 1e-3, and stay float32 after a transition. The gradient of the rounding is
        that of the identity. Random numbers and autocast are those of the forward pass; torch's default generators are
        left as they are. Deterministic.

    Cost:
        One more forward pass. Memory: two states, the inside of one sub-block (of two blocks where backward overlaps),
        anchors.

    Source: Gomez et al. 2017 (The Reversible Residual Network); Zhu and Mangalam 2023 (PaReprop: Fast Parallelized
    Reversible Backpropagation), section 3; Zhao et al. 2024 (Dr2Net).
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        *,
        overlap: bool | str = "auto",
        exact: int | str | None = None,
        anchors: str | Sequence[int] | None = "auto",
        error_budget: float = 1e-3,
    ) -> None:
        super().__init__()
        blocks = list(blocks)
        if not blocks:
            raise ValueError(f"{_OWNER}: blocks must not be empty")
        for index, block in enumerate(blocks):
            if not isinstance(block, Coupled):
                raise TypeError(
                    f"{_OWNER}: block {index} must be a ReversibleBlock, DualResidualBlock or ReversibleTransition, "
                    f"got {type(block).__name__}"
                )
        schedules.check_overlap(_OWNER, overlap)
        whole = isinstance(exact, int) and not isinstance(exact, bool) and 0 <= exact < _MANTISSA
        if not (exact is None or exact == "auto" or whole):
            raise ValueError(
                f"{_OWNER}: exact must be None, 'auto' or a whole number from 0 to 23, got {exact!r}"
            )
        if not error_budget > 0:
            raise ValueError(f"{_OWNER}: error_budget must be positive, got {error_budget}")
        self.blocks = nn.ModuleList(blocks)
        self.overlap, self.exact, self.error_budget = overlap, exact, error_budget
        self.anchors = anchors if anchors is None or isinstance(anchors, str) else frozenset(anchors)
        if isinstance(self.anchors, str) and self.anchors != "auto":
            raise ValueError(f"{_OWNER}: anchors must be 'auto', None or block indices, got {anchors!r}")
        if isinstance(self.anchors, frozenset) and not self.anchors <= set(range(len(blocks))):
            raise ValueError(
                f"{_OWNER}: anchors must be block indices from 0 to {len(blocks) - 1}, got {sorted(self.anchors)}"
            )
        # The q in use; of exact="auto" once it is known.
        self.q: int | None = exact if isinstance(exact, int) else None
        self._probe = schedules.Probe()

    @property
    def _stack(self) -> list[Coupled]:
        return list(self.blocks)  # type: ignore[arg-type]

    def forward(
        self, x1: Tensor, x2: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if x2 is None:
            first = self._stack[0].coupling(None)
            x2 = x1 * first.beta if isinstance(first, Dual) and isinstance(x1, Tensor) else x1
        check_streams(_OWNER, x1, x2)
        parts = (part for block in self._stack for _, part in block.parts())
        args, kwargs = named(_OWNER, parts, args, kwargs)
        if self.exact == "auto" and self.q is None:
            self.q = self._choose_grid((x1, x2), args, kwargs)
        q = self.q
        couplings = tuple(block.coupling(q) for block in self._stack)
        if q is not None:
            anchoring.check_exact(_OWNER, couplings)
            if torch.float64 in (x1.dtype, x2.dtype):
                raise RuntimeError(f"{_OWNER}: exact keeps its streams in float32, got {torch.float64}")
            same = x1 is x2
            x1, largest = straight_through_grid(x1, q)
            x2, other = (x1, largest) if same else straight_through_grid(x2, q)
            of_input = torch.maximum(largest, other)
        schedule = schedules.choose(x1.device, self.overlap if len(self.blocks) > 1 else False, self._probe)
        tape = Tape(_OWNER, len(self.blocks), schedule, q=q)
        states, _ = self._run(tape, (x1, x2), args, kwargs, couplings)
        if q is not None:
            self._check_range(q, [of_input, *tape.ranges])
        return states[0], states[1]

    def _run(
        self,
        tape: Tape,
        state: State,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        couplings: tuple[Coupling, ...] = (),
        measure: bool = False,
    ) -> tuple[State, list[Tensor]]:
        """The outputs, and where asked the largest magnitude of the input and of each block's output."""
        ranges = [_largest(state)] if measure else []
        for index, block in enumerate(self.blocks):
            if couplings and (index == 0 or isinstance(couplings[index - 1], Streamwise)):
                # Errors of recovery do not pass a transition, whose outputs may be of another dtype than its inputs.
                stage = tuple(itertools.takewhile(lambda c: not isinstance(c, Streamwise), couplings[index:]))
                narrowest = max((t.dtype for t in state), key=lambda dtype: torch.finfo(dtype).eps)
                tape.stored |= self._stored(stage, narrowest, index)
            state = block(*state, *args, _tape=tape, **kwargs)
            if measure:
                ranges.append(_largest(state))
        return state, ranges

    def _stored(self, stage: tuple[Coupling, ...], dtype: torch.dtype, start: int = 0) -> frozenset[int]:
        """The blocks to store of a stage, the blocks from `start` to the next transition, with streams of `dtype`."""
        chosen = frozenset() if isinstance(self.anchors, str) or self.anchors is None else self.anchors
        if self.q is None and any(isinstance(coupling, Dual) for coupling in stage):
            if self.anchors == "auto":
                found = anchoring.choose_anchors(stage, dtype, self.error_budget)
                return frozenset(start + index for index in found)
            here = frozenset(index - start for index in chosen)
            anchoring.check_anchors(_OWNER, stage, dtype, self.error_budget, here, start)
        return chosen

    @torch.no_grad()
    def _choose_grid(self, state: State, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        tape = Tape(_OWNER, len(self.blocks), schedules.Schedule())
        with replayed_rng(rng_state(state[0].device), state[0].device):
            _, ranges = self._run(tape, state, args, kwargs, measure=True)
        largest = torch.stack(ranges).max().item()
        if not largest < 2.0 ** (_MANTISSA - _COARSEST - _HEADROOM):
            raise RuntimeError(
                f"{_OWNER}: exact='auto' found a state of {largest:g}, too large for a useful grid"
            )
        bits = math.floor(math.log2(largest)) + 1 if largest > 0 else 0
        return min(_FINEST, _MANTISSA - _HEADROOM - bits)

    def _check_range(self, q: int, ranges: list[Tensor]) -> None:
        limit = 2.0 ** (_MANTISSA - q)
        # One look at all of them: each would make the host wait for the device.
        for place, largest in enumerate(torch.stack(ranges).tolist()):
            if not largest < limit:
                where = f"block {place - 1}" if place else "the input"
                raise RuntimeError(
                    f"{_OWNER}: exact with q = {q} needs states below 2^{_MANTISSA - q} = {limit:g}, {where} has "
                    f"{largest:g}; take a smaller q"
                )

    def extra_repr(self) -> str:
        return f"overlap={self.overlap!r}, exact={self.exact!r}"


def _largest(state: State) -> Tensor:
    parts = [
        t.detach().float().abs().amax() if t.numel() else t.new_zeros((), dtype=torch.float32) for t in state
    ]
    return torch.maximum(*parts)
