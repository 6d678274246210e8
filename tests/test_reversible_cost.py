"""What a training step of a reversible stack costs beside the second run: nothing over the equations of the paper."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reversible_nets import WIDTH, blocks, stored, two
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from effkern.bench.memory import peak_tensor_bytes
from effkern.nn import ReversibleSequence, _reversible_couplings, _reversible_step

DEPTH = 3


class Passes(TorchDispatchMode):
    """Counts operations that write a tensor; views and questions to the host are free."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        first = out[0] if isinstance(out, (tuple, list)) else out
        view = any(found.alias_info and not found.alias_info.is_write for found in func._schema.returns)
        if isinstance(first, Tensor) and not view:
            self.counts[func._schema.name] += 1
        return out


def _passes(run: Callable[[], object]) -> Counter[str]:
    run()  # what is done once and kept
    with Passes() as passes:
        run()
    return passes.counts


def _step(net: ReversibleSequence, whole: bool = True) -> Callable[[], object]:
    x = [t.requires_grad_() for t in two(3, WIDTH, dtype=torch.float32)]
    leaves = [*x, *net.parameters()]

    def run() -> object:
        outs = net(*x) if whole else stored(net.blocks, *x)
        return torch.autograd.grad(outs, leaves, [torch.ones_like(y) for y in outs])

    return run


def _check_passes() -> None:
    net = ReversibleSequence(blocks(DEPTH), overlap=False)
    x = two(3, WIDTH, dtype=torch.float32)
    with torch.no_grad():
        second = _passes(lambda: stored(net.blocks, *x))
    expected = _passes(_step(net, whole=False)) + second
    expected["aten::add"] -= 2 * DEPTH  # the second run takes off what the first has added
    expected["aten::sub"] += 2 * DEPTH
    assert _passes(_step(net)) == expected


def test_a_step_is_the_stored_one_and_a_second_run() -> None:
    """Same operations as autograd's own step and one more forward pass: no copy, no sum, no zeros besides."""
    _check_passes()


def test_a_copy_between_the_sub_blocks_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = _reversible_couplings.subtract
    monkeypatch.setattr(_reversible_couplings, "subtract", lambda *args: right(*args).clone())
    with pytest.raises(AssertionError):
        _check_passes()


def test_rounding_adds_no_pass() -> None:
    """Sum, rounding and range are one, in both directions; the stack's input is rounded and looked at in one."""
    found = _passes(_step(ReversibleSequence(blocks(DEPTH), overlap=False, exact=14)))
    assert found["effkern::coupling"] == 2 + 4 * DEPTH
    assert found["aten::add"] == 2 * DEPTH  # of gradients
    assert not {"aten::sub", "aten::abs", "aten::clone", "aten::copy_", "aten::mul", "aten::round"} & set(
        found
    )


def _copied(monkeypatch: pytest.MonkeyPatch) -> int:
    """Gradients of parameters that autograd has copied instead of taken over."""
    made: dict[int, int] = {}
    right = _reversible_step.Replay.completed

    def noted(self: _reversible_step.Replay, inputs: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        found = right(self, inputs)
        made.update((id(p), g.data_ptr()) for p, g in zip(self.step.leaves, found[2:]) if g is not None)
        return found

    monkeypatch.setattr(_reversible_step.Replay, "completed", noted)
    net = ReversibleSequence(blocks(DEPTH), overlap=False)
    sum(y.square().sum() for y in net(torch.randn(3, WIDTH))).backward()
    parameters = list(net.parameters())
    assert len(made) == len(parameters)
    return sum(made[id(p)] != p.grad.data_ptr() for p in parameters)


def test_gradients_of_parameters_are_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _copied(monkeypatch) == 0


def test_gradients_that_somebody_holds_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right, held = _reversible_step.Replay.completed, []

    def holding(self: _reversible_step.Replay, inputs: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        held.append(right(self, inputs))
        return held[-1]

    monkeypatch.setattr(_reversible_step.Replay, "completed", holding)
    assert _copied(monkeypatch) > 0


def _peak(depth: int, whole: bool = True, exact: int | None = None) -> int:
    """Peak of a training step by the trace of torch's allocator, weights' gradients freed as they come."""
    net = ReversibleSequence(blocks(depth, 4), overlap=False, exact=exact)
    for p in net.parameters():
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    x = torch.randn(16384, 4, requires_grad=True)

    def step() -> None:
        y1, y2 = net(x) if whole else stored(net.blocks, x, x)
        x.grad = None
        torch.autograd.backward([y1, y2], [torch.ones_like(y1), torch.ones_like(y2)])

    step()
    peak = peak_tensor_bytes(step, torch.device("cpu"))
    assert peak is not None
    return peak


@pytest.mark.parametrize("exact", [None, 14])
def test_peak_of_48_blocks_is_that_of_12(exact: int | None) -> None:
    assert _peak(48, exact=exact) <= 1.05 * _peak(12, exact=exact)


def test_stored_activations_grow_with_depth() -> None:
    assert _peak(48, whole=False) > 3 * _peak(12, whole=False)
