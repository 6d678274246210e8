"""Checkpointing of ordinary networks on the engine of the reversible ones."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from effkern.nn import _reversible_schedule as schedules
from effkern.nn._reversible_couplings import Streamwise
from effkern.nn._reversible_engine import Tape
from effkern.nn.reversible import check_modules

_OWNER = "checkpoint_sequence"
_probes: weakref.WeakKeyDictionary[nn.Module, schedules.Probe] = weakref.WeakKeyDictionary()


def checkpoint_sequence(
    blocks: Iterable[nn.Module], x: Tensor, *args: Any, overlap: bool | str = "auto", **kwargs: Any
) -> Tensor:
    """Runs blocks in turn and stores the input of each instead of what is inside it.

        for block in blocks: x = block(x, *args, **kwargs)

    Backward runs each block again, with overlap block i - 1 while it computes the gradients of block i: nothing has to
    be recovered before. torch.utils.checkpoint on every block does the same one after the other.

    Args:
        blocks: modules from one tensor to one tensor, of any shapes. They run twice in a training step, as in
            `effkern.nn.ReversibleBlock`.
        x: input of the first block, a tensor of any dtype, complex ones and tokens too.
        args, kwargs: further arguments of every block, may be nested in tuples, lists and dicts; their tensors get
            gradients.
        overlap: as in `effkern.nn.ReversibleSequence`; "auto" remembers what was faster by the first block.

    Returns:
        What the loop above returns, x itself where there are no blocks; differentiable, once, in x, the extra tensors
        and the parameters.

    Raises:
        TypeError: a block is no module or returns no tensor; x is no tensor; a further argument of a class in which
            autograd sees no tensors, while gradients are recorded.
        ValueError: overlap is unknown.
        RuntimeError: a block is sharded by FSDP on its own (shard a module around this call), or changed its input in
            place; in backward, a stored input or a parameter was modified in place, a parameter is another one than in
            the forward pass, or only a state between blocks got a gradient; double backward.

    Numerics:
        Outputs and gradients are those of the loop, where blocks give equal bits for equal input; random numbers and
        autocast are those of the forward pass. Deterministic.

    Cost:
        One more forward pass. Memory: the inputs of the blocks and the inside of one (two where backward overlaps).

    Source: Chen et al. 2016 (Training Deep Nets with Sublinear Memory Cost); the schedule is that of Zhu and Mangalam
    2023 (PaReprop).
    """
    blocks = list(blocks)
    schedules.check_overlap(_OWNER, overlap)
    for index, block in enumerate(blocks):
        check_modules(_OWNER, **{f"block {index}": block})
        if hasattr(block, "unshard"):
            raise RuntimeError(
                f"{_OWNER}: block {index} is sharded by FSDP, which then owns its parameters' gradients; give "
                "fully_shard a module around the call instead"
            )
    if not isinstance(x, Tensor):
        raise TypeError(f"{_OWNER}: x must be a tensor, got {type(x).__name__}")
    if not blocks:
        return x
    probe = _probes.setdefault(blocks[0], schedules.Probe())
    schedule = schedules.choose(x.device, overlap if len(blocks) > 1 else False, probe)
    tape = Tape(_OWNER, len(blocks), schedule)
    for block in blocks:
        (x,) = tape.run(block, Streamwise(), [("forward", block)], (x,), [(args, kwargs)])
    return x
