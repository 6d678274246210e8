"""What all conversions share: filters, dry runs, reports as data and as tables, undo."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pretrained_nets import ViT, ViTBlock
from torch import Tensor, nn

from effkern.convert import Report, cluster, finalize, monarchize, reversible
from effkern.nn import ClusteredLinear, DualResidualSchedule, MonarchLinear, PalettizedLinear

Conversion = Callable[..., Report]


class Net(nn.Module):
    """Layers that every conversion finds something in, one pair of them with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.blocks = nn.ModuleList(ViTBlock() for _ in range(3))
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def tokens() -> Tensor:
    return torch.arange(10).view(2, 5)


def clustered() -> Net:
    model = Net()
    cluster(model, bits=2)
    return model


# What is converted, how, and a filter that matches some of what there is.
CASES: dict[str, tuple[Callable[[], Net], Conversion, dict[str, Any], str]] = {
    "monarchize": (Net, monarchize, {"nblocks": 2, "rank": 1}, "blocks.1.*"),
    "cluster": (Net, cluster, {"bits": 2}, "blocks.1.*"),
    "finalize": (clustered, finalize, {}, "blocks.1.*"),
    "finalize-low-rank": (clustered, finalize, {"low_rank": 2, "calibration": [tokens()]}, "blocks.1.*"),
    "reversible": (Net, reversible, {}, "blocks.1"),
    "reversible-example": (Net, reversible, {"example": tokens()}, "blocks.1"),
}
cases = pytest.mark.parametrize("case", CASES)


def state(model: nn.Module) -> tuple[Any, ...]:
    """Every object of a model, under all its names and in order, its mode, and the bits of all tensors."""
    modules = [(name, id(m), m.training) for name, m in model.named_modules(remove_duplicate=False)]
    tensors = [(name, id(t), t.requires_grad) for name, t in model.named_parameters(remove_duplicate=False)]
    tensors += [(name, id(t), False) for name, t in model.named_buffers(remove_duplicate=False)]
    bits = [(name, t.numpy().tobytes()) for name, t in model.state_dict().items()]
    return modules, tensors, bits


@cases
def test_a_dry_run_reports_the_same_and_touches_nothing(case: str) -> None:
    make, convert, options, _ = CASES[case]
    model = make()
    model.blocks[1].eval()
    before, numbers = state(model), torch.get_rng_state()
    dry = convert(model, dry_run=True, **options)
    assert state(model) == before and torch.equal(torch.get_rng_state(), numbers)
    real = convert(model, **options)
    assert torch.equal(torch.get_rng_state(), numbers)
    assert dry.dry_run and dry.replaced and state(model) != before
    assert {**dry.to_dict(), "dry_run": False} == real.to_dict()
    assert "dry run: nothing was changed" in str(dry) and "dry run" not in str(real)
    assert dry.held_bytes == 0
    with pytest.raises(RuntimeError, match="it was a dry run, which changed nothing"):
        dry.undo()


@cases
def test_undo_puts_the_very_objects_back(case: str) -> None:
    make, convert, options, only = CASES[case]
    model = make()
    for filters in ({}, {"only": only}, {"skip": only}):
        before, expected = state(model), model.eval()(tokens())
        model.train()
        report = convert(model, **filters, **options)
        assert report.replaced and state(model) != before
        report.undo()
        assert state(model) == before and torch.equal(model.eval()(tokens()), expected)
        model.train()
        with pytest.raises(RuntimeError, match=f"undo of {report.operation}: it has been undone already"):
            report.undo()
        assert state(model) == before


@cases
def test_only_and_skip_part_the_layers(case: str) -> None:
    make, convert, options, pattern = CASES[case]
    only, skip, both = (
        convert(make(), dry_run=True, **filters, **options).to_dict()
        for filters in ({"only": pattern}, {"skip": [pattern]}, {"only": ["blocks.*"], "skip": pattern})
    )
    names = [{entry["name"] for entry in report["replaced"]} for report in (only, skip, both)]
    assert names[0] and names[1] and not names[0] & names[1] and names[2] <= names[1]
    assert all(name.startswith("blocks.1") for name in names[0])
    reasons = [{entry["reason"] for entry in report["skipped"]} for report in (only, skip)]
    assert "only does not match it" in reasons[0] and "skip matches it" in reasons[1]


@cases
@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"only": "block.*"}, r"only 'block\.\*' matches none of the model's \d+ .*: .*\.\.\."),
        ({"skip": ["blocks.*", "hed"]}, "skip 'hed' matches none of the model's"),
        ({"only": nn.Conv2d}, "only Conv2d matches none"),
        ({"skip": lambda name, module: False}, "skip <lambda> matches none"),
        ({"only": []}, "only is empty"),
        ({"only": 3}, "only must be a pattern of names, a class, .*, got int"),
        ({"skip": [None]}, "skip must be a pattern of names, a class, .*, got NoneType"),
        ({"only": nn.Linear(2, 2)}, "only must be a pattern of names, a class, .*, got Linear"),
    ],
    ids=["name", "one-of-two", "class", "function", "empty", "number", "none", "module"],
)
def test_a_filter_that_matches_nothing_is_an_error(case: str, filters: dict[str, Any], message: str) -> None:
    make, convert, options, _ = CASES[case]
    model = make()
    before = state(model)
    if case.startswith("reversible"):  # a list of three blocks is shown whole
        message = message.replace(r": .*\.\.\.", ": blocks.0, blocks.1, blocks.2$")
    with pytest.raises((TypeError, ValueError), match=f"{convert.__name__}: {message}"):
        convert(model, **filters, **options)
    assert state(model) == before


def test_a_model_without_layers_needs_no_filter() -> None:
    empty = nn.ModuleDict({"norm": nn.LayerNorm(4)})
    for convert in (monarchize, cluster, finalize, reversible):
        assert convert(empty).replaced == []
        with pytest.raises(ValueError, match="there are none"):
            convert(empty, only="*")


@cases
def test_reports_are_data(case: str) -> None:
    make, convert, options, pattern = CASES[case]
    report = convert(make(), only=pattern, **options)
    data = report.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert data["operation"] == convert.__name__ and data["dry_run"] is False
    assert [entry["name"] for entry in data["replaced"]] == [entry.name for entry in report.replaced]
    assert [(entry["name"], entry["reason"]) for entry in data["skipped"]] == report.skipped
    table = str(report)
    assert table.lstrip().startswith(convert.__name__)
    assert report.replaced[0].name in table and report.skipped[0][0] in table
    for twin in (copy.deepcopy(report), pickle.loads(pickle.dumps(report))):
        assert twin == report and twin.to_dict() == data and twin.held_bytes == 0
        with pytest.raises(RuntimeError, match="a copy of a report is data alone"):
            twin.undo()
    report.undo()


def test_totals() -> None:
    report = monarchize(Net(), 2, rank=1)
    data = report.to_dict()
    for key in ("parameters_before", "parameters_after"):
        assert data[key] == sum(entry[key] for entry in data["replaced"]) == getattr(report, key) > 0
    data = cluster(Net()).to_dict()
    assert data["bytes_before"] == sum(e["bytes_before"] for e in data["replaced"] if not e["tied_to"])
    assert 0 < data["bytes_after"] < data["bytes_before"] and data["bits_per_weight"] > 3
    assert reversible(Net(), example=tokens()).to_dict()["difference"] == 0.0


def test_what_undo_costs_in_memory() -> None:
    model = Net()
    dense = sum(model.blocks[1].mlp.get_submodule(n).weight.nbytes for n in ("fc1", "fc2"))
    biases = sum(model.blocks[1].mlp.get_submodule(n).bias.nbytes for n in ("fc1", "fc2"))
    assert reversible(Net()).held_bytes == 0  # nothing but what the model has
    report = monarchize(model, 2, rank=1, only="blocks.1.mlp.*")
    assert report.held_bytes == dense + biases
    model = Net()
    assert cluster(model, bits=2).held_bytes == 0
    layers = [m for m in model.modules() if isinstance(m, ClusteredLinear)]
    report = finalize(model, only=[lambda name, module: module in layers[:2], "blocks.2.*"])
    out = [m for m in layers if not _inside(model, m)]
    assert 2 < len(out) < len(layers)
    assert report.held_bytes == sum(t.nbytes for m in out for t in (m.weight, m.centroids, m.latest))
    report.release()
    assert report.held_bytes == 0
    with pytest.raises(RuntimeError, match="what it replaced has been released"):
        report.undo()


def _inside(model: nn.Module, module: nn.Module) -> bool:
    return any(other is module for other in model.modules())


def test_finalize_takes_a_weight_only_with_all_its_layers() -> None:
    model = clustered()
    report = finalize(model, skip="embed")
    assert ("head", "its weight also belongs to a layer that stays") in report.skipped
    assert isinstance(model.head, ClusteredLinear) and model.head.weight is model.embed.weight
    report = finalize(model, only=["embed", "head"])
    assert [entry.tied_to for entry in report.replaced] == ["", "embed"] and report.skipped == []
    report.undo()
    assert isinstance(model.head, ClusteredLinear) and model.head.weight is model.embed.weight


def test_conversions_are_undone_in_reverse() -> None:
    model = Net()
    start = state(model)
    first = cluster(model, bits=2)
    middle = state(model)
    second = finalize(model)
    end = state(model)
    with pytest.raises(
        RuntimeError, match="undo of cluster: what it put in the place of embed is no longer there"
    ):
        first.undo()
    assert state(model) == end
    second.undo()
    assert state(model) == middle
    first.undo()
    assert state(model) == start


def test_undo_sees_what_a_later_conversion_did_further_up_or_down() -> None:
    model = Net()
    start = state(model)
    below = monarchize(model, 2, rank=1, only="blocks.0.mlp.fc1")
    above = reversible(model)
    within = cluster(model, bits=2, only="*.mlp.*")  # one mlp has a Monarch layer in it
    assert {type(m) for m in model.modules()} >= {MonarchLinear, ClusteredLinear}
    # The modules inside of branches are those of the blocks: they are undone wherever they stand.
    middle = state(model)
    below.undo()
    within.undo()
    above.undo()
    assert state(model) == start and state(model) != middle
    # A child of the block itself is held by the branch that took its place.
    sequence = nn.Sequential(Direct(), Direct())
    below = monarchize(sequence, 2, rank=1, only="0.linear")
    above = reversible(sequence)
    assert [stack.blocks for stack in above.replaced] == [2]
    before = state(sequence)
    with pytest.raises(RuntimeError, match=r"put in the place of 0\.linear is no longer there"):
        below.undo()
    within = cluster(sequence, only=nn.Linear)
    with pytest.raises(RuntimeError, match="was converted in its turn; undo that first"):
        above.undo()
    for report in (within, above, below):
        report.undo()
    assert isinstance(sequence[0].linear, nn.Linear) and state(sequence) != before


class Direct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x))


def test_undo_after_training() -> None:
    """Shared Parameters keep what was trained, others are those of before; the mode is the one of now."""
    x = torch.randn(2, 6, 5)
    for convert, options in (
        (cluster, {"bits": 2}),
        (reversible, {}),
        (monarchize, {"nblocks": 2, "rank": 1}),
    ):
        model = ViT(2)
        weight = model.blocks[0].mlp.fc1.weight
        start = weight.detach().clone()
        report = convert(model, **options)
        if convert is reversible:
            DualResidualSchedule(model, 1).step()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        model(x).square().sum().backward()
        optimizer.step()
        model.eval()
        report.undo()
        assert model.blocks[0].mlp.fc1.weight is weight
        assert torch.equal(weight, start) == (convert is monarchize)
        assert not any(module.training for module in model.modules())
        assert model(x).shape == (2, 3)


def test_undo_of_finalize_brings_trained_clusters_back() -> None:
    model = clustered()
    model(tokens()).square().sum().backward()
    layer = model.blocks[0].mlp.fc1
    latest = layer.latest.clone()
    report = finalize(model, low_rank=1, calibration=[tokens()])
    assert isinstance(model.blocks[0].mlp.fc1, PalettizedLinear)
    report.undo()
    assert model.blocks[0].mlp.fc1 is layer and torch.equal(layer.latest, latest)
    model(tokens()).square().sum().backward()


def test_what_was_replaced_by_hand_is_not_undone() -> None:
    model = Net()
    report = monarchize(model, 2, rank=1, only="blocks.0.mlp.*")
    model.blocks[0].mlp = nn.Identity()
    before = state(model)
    with pytest.raises(
        RuntimeError, match=r"place of blocks\.0\.mlp\.fc1 is no longer there; undo first what"
    ):
        report.undo()
    assert state(model) == before
