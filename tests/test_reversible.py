"""Reversible stacks: gradients of the stored net, side inputs, autograd's ways of calling, memory."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from reversible_nets import WIDTH, Branch, Plain, assert_same, blocks, gradients, stored, two
from torch import Tensor, nn

from effkern.nn import (
    DualResidualBlock,
    ReversibleBlock,
    ReversibleSequence,
    ReversibleTransition,
    _reversible_schedule,
    _reversible_step,
)


def _check_depth(depth: int, overlap: bool) -> None:
    net = ReversibleSequence(blocks(depth), overlap=overlap).double()
    x = two(3, WIDTH)
    outs, grads = gradients(net, net, x)
    expected_outs, expected = gradients(lambda *a: stored(net.blocks, *a), net, x)
    assert_same(outs, expected_outs, 0)
    assert_same(grads, expected)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("depth", range(1, 14))
def test_gradients_are_those_of_the_stored_net(depth: int, overlap: bool) -> None:
    _check_depth(depth, overlap)


def test_overlap_changes_no_bit() -> None:
    serial = ReversibleSequence(blocks(5), overlap=False)
    x = two(3, WIDTH, dtype=torch.float32)
    _, expected = gradients(serial, serial, x)
    _, found = gradients(ReversibleSequence(serial.blocks, overlap=True), serial, x)
    assert_same(found, expected, 0)


def test_one_block_alone_and_one_tensor_for_both_streams() -> None:
    block = blocks(1)[0].double()
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64)
    _, found = gradients(lambda x: block(x, x), block, [x])
    _, sequence = gradients(ReversibleSequence([block]), block, [x])
    _, expected = gradients(lambda x: stored([block], x, x), block, [x])
    assert_same(found, expected)
    assert_same(sequence, expected)


def _mixed() -> ReversibleSequence:
    """Two stages of different width and kind."""
    parts = [*blocks(3), ReversibleTransition(nn.Linear(WIDTH, 12)), DualResidualBlock(Plain(12))]
    parts += [ReversibleTransition(Plain(12), nn.Linear(12, 12)), *blocks(2, 12)]
    return ReversibleSequence(parts, overlap=True).double()


@pytest.mark.parametrize("overlap", [False, True])
def test_stages_of_different_kind_between_a_stem_and_a_head(overlap: bool) -> None:
    net = _mixed()
    net.overlap = overlap
    model = nn.ModuleDict({"stem": nn.Linear(5, WIDTH), "body": net, "head": nn.Linear(12, 3)}).double()

    def run(x: Tensor, whole: bool) -> tuple[Tensor, Tensor]:
        x = model["stem"](x)
        y1, y2 = net(x) if whole else stored(net.blocks, x, x)
        return model["head"](y1), model["head"](y2)

    x = torch.randn(4, 5, dtype=torch.float64)
    _, found = gradients(lambda x: run(x, True), model, [x])
    _, expected = gradients(lambda x: run(x, False), model, [x])
    assert_same(found, expected)


def test_downsampling_between_stages_of_images() -> None:
    def conv(width: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.Tanh())

    parts: list[nn.Module] = [ReversibleBlock(conv(4), conv(4)), ReversibleBlock(conv(4), conv(4))]
    parts += [ReversibleTransition(nn.Conv2d(4, 8, 2, stride=2)), ReversibleBlock(conv(8), conv(8))]
    net = ReversibleSequence(parts).double()
    x = two(2, 4, 6, 6)
    outs, found = gradients(net, net, x)
    assert outs[0].shape == (2, 8, 3, 3)
    _, expected = gradients(lambda *a: stored(net.blocks, *a), net, x)
    assert_same(found, expected)


def _side_gradients(net: ReversibleSequence) -> None:
    x, sides = (
        two(3, WIDTH),
        {"condition": torch.rand(3, WIDTH).double(), "scale": torch.rand(WIDTH).double()},
    )
    _, found = gradients(net, net, x, **sides)
    _, expected = gradients(lambda *a, **k: stored(net.blocks, *a, **k), net, x, **sides)
    assert_same(found, expected)


@pytest.mark.parametrize("overlap", [False, True])
def test_side_inputs_get_gradients(overlap: bool) -> None:
    _side_gradients(ReversibleSequence(blocks(5), overlap=overlap).double())


def test_side_inputs_without_gradients_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = _reversible_step.Replay.completed

    def wrong(self: _reversible_step.Replay, inputs: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        found = right(self, inputs)
        return (*found[: len(found) - len(self._side_leaves)], *(None for _ in self._side_leaves))

    monkeypatch.setattr(_reversible_step.Replay, "completed", wrong)
    with pytest.raises(AssertionError):
        _side_gradients(ReversibleSequence(blocks(5)).double())


class Nested(nn.Module):
    def forward(self, x: Tensor, tables: dict[str, list[Tensor]], mask: Tensor) -> Tensor:
        return torch.where(mask, torch.sin(x) * tables["cos"][0] + tables["sin"][0], 0.0)


def test_nested_and_positional_side_inputs() -> None:
    net = ReversibleSequence([ReversibleBlock(Nested(), Plain()) for _ in range(3)]).double()
    mask = torch.rand(3, WIDTH) > 0.3

    def run(whole: bool) -> list[Tensor]:
        torch.manual_seed(1)
        x, cos, sin = (torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True) for _ in range(3))
        tables = {"cos": [cos], "sin": [sin]}
        if whole:
            y1, y2 = net(x, x, tables, mask)
        else:
            y1, y2 = x, x
            for block in net.blocks:
                y1 = y1 + block.f(y2, tables, mask)
                y2 = y2 + block.g(y1)
        return list(torch.autograd.grad((y1 * y2).sum(), [x, cos, sin]))

    assert_same(run(True), run(False))


def test_torch_autograd_grad_leaves_the_parameters_alone() -> None:
    net = ReversibleSequence(blocks(4)).double()
    x = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)
    chosen = [x, net.blocks[2].f.up.weight, net.blocks[0].g.branch.down.bias]
    found = torch.autograd.grad(sum(y.square().sum() for y in net(x)), chosen)
    expected = torch.autograd.grad(sum(y.square().sum() for y in stored(net.blocks, x, x)), chosen)
    assert_same(found, expected)
    assert x.grad is None and all(p.grad is None for p in net.parameters())


def test_gradients_accumulate() -> None:
    net = ReversibleSequence(blocks(3)).double()
    batches = [torch.randn(3, WIDTH, dtype=torch.float64) for _ in range(3)]
    for batch in batches:
        sum(y.square().sum() for y in net(batch)).backward()
    found = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    for batch in batches:
        sum(y.square().sum() for y in stored(net.blocks, batch, batch)).backward()
    assert_same(found, [p.grad for p in net.parameters()])


def test_two_forward_passes_before_their_backward_passes() -> None:
    net = ReversibleSequence(blocks(3), overlap=True).double()
    a, b = two(3, WIDTH)
    losses = [sum(y.square().sum() for y in net(x)) for x in (a, b)]
    for loss in losses:
        loss.backward()
    found = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    sum(y.square().sum() for x in (a, b) for y in stored(net.blocks, x, x)).backward()
    assert_same(found, [p.grad for p in net.parameters()])


@pytest.mark.parametrize("overlap", [False, True])
def test_a_retained_graph_is_good_for_a_second_backward(overlap: bool) -> None:
    net = ReversibleSequence(blocks(4), overlap=overlap).double()
    x = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)
    loss = sum(y.square().sum() for y in net(x))
    middle = net.blocks[2].f.up.weight
    (partial,) = torch.autograd.grad(loss, middle, retain_graph=True)
    found = torch.autograd.grad(loss, [x, middle], retain_graph=True)
    again = torch.autograd.grad(loss, [x, middle])
    assert_same([partial, *again], [found[1], *found], 0)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, x)


def test_frozen_parameters_and_frozen_first_blocks() -> None:
    net = ReversibleSequence(blocks(4), overlap=True).double()
    for block in net.blocks[:2]:
        block.requires_grad_(False)
    net.blocks[3].g.requires_grad_(False)
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    trained = [p for p in net.parameters() if p.requires_grad]
    found = torch.autograd.grad(sum(y.square().sum() for y in net(x)), trained)
    expected = torch.autograd.grad(sum(y.square().sum() for y in stored(net.blocks, x, x)), trained)
    assert_same(found, expected)


def test_a_module_that_occurs_twice() -> None:
    block, shared = blocks(1)[0], Plain()
    net = ReversibleSequence([block, ReversibleBlock(shared, shared), block], overlap=True).double()
    x = two(3, WIDTH)
    _, found = gradients(net, net, x)
    _, expected = gradients(lambda *a: stored(net.blocks, *a), net, x)
    assert_same(found, expected)


def test_a_weight_that_modules_of_one_branch_share_counts_once() -> None:
    net = ReversibleSequence(blocks(2)).double()
    for block in net.blocks:
        shared = nn.Linear(WIDTH, WIDTH).double()
        twin = nn.Linear(WIDTH, WIDTH).double()
        twin.weight = shared.weight
        block.g = nn.Sequential(shared, nn.Tanh(), twin, shared)
    x = two(3, WIDTH)
    _, found = gradients(net, net, x)
    _, expected = gradients(lambda *a: stored(net.blocks, *a), net, x)
    assert_same(found, expected)


def test_parameter_hooks_run_once() -> None:
    net = ReversibleSequence(blocks(2)).double()
    weight, calls = net.blocks[0].f.up.weight, []
    weight.register_hook(lambda grad: (calls.append(1), 3 * grad)[1])
    x = two(3, WIDTH)
    _, found = gradients(net, net, x)
    assert len(calls) == 1
    _, expected = gradients(lambda *a: stored(net.blocks, *a), net, x)
    assert len(calls) == 2
    assert_same(found, expected)


def test_mixed_dtypes_of_streams_and_branches() -> None:
    """A float32 branch promotes a bfloat16 stream; gradients come back in the dtypes of the inputs."""

    class Wide(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(x.float())

    net = ReversibleSequence([ReversibleBlock(Wide(), Wide()) for _ in range(3)])
    x = torch.randn(3, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    y1, y2 = net(x)
    assert y1.dtype == y2.dtype == torch.float32
    (y1 + y2).sum().backward()
    assert x.grad.dtype == torch.bfloat16


def test_no_gradient_wanted() -> None:
    net = ReversibleSequence(blocks(3)).double()
    x = two(3, WIDTH)
    expected = stored(net.blocks, *x)
    with torch.no_grad():
        assert_same(net(*x), expected, 0)
    with torch.inference_mode():
        assert_same(net(*x), expected, 0)


def test_double_backward_is_refused() -> None:
    net = ReversibleSequence(blocks(2)).double()
    x = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(sum(y.square().sum() for y in net(x)), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def _order(net: ReversibleSequence) -> list[str]:
    """Second runs of branches (r) and arrivals of their parameters' gradients (g), with the number of the block."""
    events: list[str] = []
    loss = sum(y.square().sum() for y in net(torch.randn(3, WIDTH)))
    for index, block in enumerate(net.blocks):
        block.f.register_forward_hook(lambda *_, i=index: events.append(f"r{i}"))
        block.f.down.bias.register_post_accumulate_grad_hook(
            lambda p, i=index: None if p.grad is None else events.append(f"g{i}")
        )
    loss.backward()
    return events


def test_gradients_of_parameters_arrive_block_by_block() -> None:
    assert _order(ReversibleSequence(blocks(3), overlap=False)) == ["r2", "g2", "r1", "g1", "r0", "g0"]


def test_gradients_of_parameters_that_come_at_the_end_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right, late = _reversible_step.Replay.completed, []

    def wrong(self: _reversible_step.Replay, inputs: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        found = right(self, inputs)
        late.extend(zip(self.step.leaves, found[2:]))
        if self.step.index == 0:
            torch.autograd.backward([p for p, _ in late], [g for _, g in late])
        return (*found[:2], *(None for _ in self.step.leaves))

    monkeypatch.setattr(_reversible_step.Replay, "completed", wrong)
    events = _order(ReversibleSequence(blocks(3), overlap=False))
    assert events[:3] == ["r2", "r1", "r0"] and {"g0", "g1", "g2"} == set(events[3:])


class Peak(torch.utils._python_dispatch.TorchDispatchMode):
    """Bytes of all storages that are alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.now = self.most = 0

    def _free(self, key: int) -> None:
        self.now -= self.alive.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.alive:
                    self.alive[key] = storage.nbytes()
                    weakref.finalize(storage, self._free, key)
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
        return out


def _activation_peak(depth: int, overlap: bool, whole: bool = True) -> int:
    """Peak of a training step, less the gradients of the parameters, which no schedule can avoid."""
    net = ReversibleSequence(blocks(depth, 4), overlap=overlap)
    for p in net.parameters():
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    x = torch.randn(4096, 4, requires_grad=True)
    gc.collect()
    with Peak() as peak:
        y1, y2 = net(x) if whole else stored(net.blocks, x, x)
        (y1 + y2).sum().backward()
    return peak.most


def test_peak_memory_does_not_grow_with_depth() -> None:
    assert _activation_peak(48, False) <= 1.05 * _activation_peak(12, False)
    assert _activation_peak(48, False, whole=False) > 3 * _activation_peak(12, False, whole=False)


def test_nothing_outlives_the_graph() -> None:
    net = ReversibleSequence([*blocks(2), ReversibleTransition(nn.Identity()), *blocks(2)], overlap=True)
    gc.disable()
    try:
        y1, y2 = net(torch.randn(3, WIDTH))
        tape = weakref.ref(y1.grad_fn.tape)
        (y1 + y2).sum().backward()
        assert not tape().waiting
        del y1, y2
        assert tape() is None
    finally:
        gc.enable()


def test_compiled_branches() -> None:
    net = ReversibleSequence(blocks(3)).double()
    x, sides = two(3, WIDTH), {"condition": torch.rand(3, WIDTH).double()}
    _, expected = gradients(net, net, x, **sides)
    for block in net.blocks:
        block.f = torch.compile(block.f, backend="aot_eager")
        block.g = torch.compile(block.g, backend="aot_eager")
    _, found = gradients(net, net, x, **sides)
    assert_same(found, expected)


@pytest.mark.parametrize("exact", [None, 14])
def test_compiled_branches_draw_again_what_they_drew(exact: int | None) -> None:
    """Without exact the first run has no graph and the second one has: two programs, which must draw alike."""
    net = ReversibleSequence(blocks(3, dropout=0.4), overlap=False, exact=exact)
    dtype = torch.float64 if exact is None else torch.float32
    net, x = net.to(dtype), torch.randn(3, WIDTH, dtype=dtype, requires_grad=True)
    for block in net.blocks:
        block.f = torch.compile(block.f, backend="aot_eager")
        block.g = torch.compile(block.g, backend="aot_eager")

    def step() -> tuple[list[Tensor], list[Tensor]]:
        """What branches returned in their first run and in their second one, both in the order of the blocks."""
        runs: list[Tensor] = []
        handles = [
            part.register_forward_hook(lambda module, args, out: runs.append(out.detach().clone()))
            for block in net.blocks
            for _, part in block.parts()
        ]
        y1, y2 = net(x)
        count = len(runs)
        (y1 * y2).sum().backward()
        for handle in handles:
            handle.remove()
        assert len(runs) == 2 * count == 12
        return runs[:count], runs[count:][::-1]

    for _ in range(2):  # the first time programs are made
        first, second = step()
        assert_same(second, first, 1e-10 if exact is None else 0)
    assert (first[0] != step()[0][0]).any()  # other masks in every step


def test_the_probe_decides_after_four_passes_and_keeps_the_faster() -> None:
    net = ReversibleSequence(blocks(2))
    for _ in range(5):
        sum(y.sum() for y in net(torch.randn(3, WIDTH))).backward()
    probe = net._probe
    assert len(probe.seconds) == 4 and probe.choice in (
        _reversible_schedule.Schedule,
        _reversible_schedule.Worker,
    )
    for serial, worker, expected in ((1.0, 0.5, "Worker"), (1.0, 0.99, "Schedule"), (1.0, 2.0, "Schedule")):
        probe = _reversible_schedule.Probe()
        for seconds in (9.0, 9.0, serial, worker):
            probe.schedule().finished(seconds, 1)
        assert probe.choice.__name__ == expected


def test_hooks_on_branches_fire_in_both_runs() -> None:
    net, seen = ReversibleSequence(blocks(2)), []
    net.blocks[0].f.register_forward_hook(lambda *_: seen.append(1))
    sum(y.sum() for y in net(torch.randn(3, WIDTH))).backward()
    assert len(seen) == 2


def test_branch_takes_only_what_it_names() -> None:
    """`condition` reaches f, whose signature has it, and not g."""
    net = ReversibleSequence([ReversibleBlock(Branch(), Plain())]).double()
    x = two(3, WIDTH)
    condition = torch.rand(WIDTH, dtype=torch.float64)
    assert_same(net(*x, condition), stored(net.blocks, *x, condition=condition), 0)


class Behind(nn.Module):
    """Its input has no name."""

    def forward(self, x: Tensor, /, condition: Tensor | None = None) -> Tensor:
        return torch.sin(x) if condition is None else torch.sin(x) * condition


class Nameless(nn.Module):
    """Nor has its first extra argument."""

    def forward(self, x: Tensor, mask: Tensor, /, condition: Tensor | None = None) -> Tensor:
        return torch.sin(x) * mask


def test_inputs_without_a_name_hide_no_side_input() -> None:
    net = ReversibleSequence([ReversibleBlock(Behind(), Plain())]).double()
    x, condition = two(3, WIDTH), torch.rand(WIDTH, dtype=torch.float64)
    expected = stored(net.blocks, *x, condition=condition)
    assert_same(net(*x, condition), expected, 0)
    assert_same(net(*x, condition=condition), expected, 0)
    with pytest.raises(TypeError, match="no sub-block takes 1 extra positional"):
        ReversibleBlock(Nameless(), Plain())(*x, condition)


def test_one_tensor_into_a_dual_residual_stack_starts_the_second_stream_at_beta_x() -> None:
    net = ReversibleSequence([DualResidualBlock(Plain(), 0.5, 0.25)]).double()
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    assert_same(net(x), net(x, 0.25 * x), 0)


@pytest.mark.parametrize("exact", [None, 14])
def test_the_whole_stack_under_compile(exact: int | None) -> None:
    net = ReversibleSequence(blocks(2), overlap=False, exact=exact)
    x = two(3, WIDTH, dtype=torch.float32)
    _, expected = gradients(net, net, x)
    _, found = gradients(torch.compile(net, backend="aot_eager"), net, x)
    assert_same(found, expected, 1e-6)
