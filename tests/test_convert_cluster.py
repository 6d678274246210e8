"""Whole models with clustered weights, and with palettes in their place: reports, ties, what stays, files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import effkern
from effkern.convert import ClusterReport, cluster, finalize, restore
from effkern.nn import (
    ClusteredEmbedding,
    ClusteredLinear,
    PalettizedEmbedding,
    PalettizedLinear,
    TemperatureSchedule,
)


class Model(nn.Module):
    """A language model of the smallest kind, its head tied to its embedding."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(48, 32)
        self.mlp = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 48, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.head(self.norm(x + self.mlp(x)))


def tokens() -> Tensor:
    return torch.randint(0, 48, (2, 7))


def names(report: ClusterReport) -> list[str]:
    return [layer.name for layer in report.replaced]


def test_cluster_reports_what_it_did() -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    weight, tied = model.mlp[0].weight, model.embedding.weight
    dense = weight.detach().clone()
    report = cluster(model, bits=3, groups=4)
    assert names(report) == ["embedding", "head", "mlp.0", "mlp.2"] and report.skipped == []
    assert isinstance(model.embedding, ClusteredEmbedding) and isinstance(model.mlp[0], ClusteredLinear)
    assert model.mlp[0].weight is weight and torch.equal(weight, dense)
    assert model.embedding.weight is model.head.weight is tied
    layer = report.replaced[2]
    palette = effkern.palettize(dense, effkern.kmeans_init(dense, 8, groups=4), groups=4)
    assert layer.bits_per_weight == palette.bits_per_weight
    expected = torch.linalg.norm(palette.to_dense() - dense) / torch.linalg.norm(dense)
    assert layer.error == pytest.approx(expected.item(), rel=1e-4)
    assert layer.bytes_before == 4 * 32 * 128 and layer.bytes_after == palette.indices.nbytes + 4 * 4 * 8
    assert [entry.tied_to for entry in report.replaced] == ["", "embedding", "", ""]
    assert report.bytes_before == 4 * (2 * 32 * 128 + 48 * 32)
    assert report.bytes_after == sum(entry.bytes_after for entry in report.replaced if not entry.tied_to)
    assert report.bits_per_weight == pytest.approx(8 * report.bytes_after / (report.bytes_before / 4))
    text = str(report)
    assert (
        "mlp.0" in text
        and "4 layers" in text
        and "the weight of embedding" in text
        and "not repl" not in text
    )
    model(tokens()).square().sum().backward()
    before = weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.mlp[0].weight, before)


def test_finalize_packs_what_evaluation_computes_with() -> None:
    model = Model()
    cluster(model, bits=2)
    model(tokens()).sum().backward()
    model.norm.weight.requires_grad_(False)
    model.mlp[0].weight.requires_grad_(False)
    data = tokens()
    model.eval()
    expected = model(data)
    weights = {name: getattr(model, name).weight.detach().clone() for name in ("embedding", "head")}
    report = finalize(model)
    assert names(report) == ["embedding", "head", "mlp.0", "mlp.2"]
    assert isinstance(model.embedding, PalettizedEmbedding) and isinstance(model.head, PalettizedLinear)
    assert model.embedding.weight_palette is model.head.weight_palette
    assert not model.training and not model.head.training
    torch.testing.assert_close(model(data), expected)
    dense = model.head.weight_palette.palette().to_dense()
    error = torch.linalg.norm(dense - weights["head"]) / torch.linalg.norm(weights["head"])
    assert report.replaced[0].error == pytest.approx(error.item(), rel=1e-4)
    assert not model.mlp[0].weight_palette.lut.requires_grad and model.mlp[2].weight_palette.lut.requires_grad
    assert finalize(model).replaced == [] and cluster(model).replaced == []


@pytest.mark.parametrize("tied", [True, False])
def test_finalize_with_low_rank_corrections(tied: bool) -> None:
    model, data = Model(tied), [tokens() for _ in range(12)]
    plain = copy.deepcopy(model)
    for each in (model, plain):
        cluster(each, bits=2)
    seen: list[Tensor] = []
    hook = model.head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    without = finalize(plain)
    weights = {name: model.get_submodule(name).weight.detach().clone() for name in ("head", "mlp.0", "mlp.2")}
    hook.remove()
    report = finalize(model, low_rank=4, calibration=data)
    assert names(report) == names(without) and model.training and model.head.training
    assert not hasattr(model.embedding, "low_rank")
    watch = plain.head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    for entry in data:
        plain(entry)
    watch.remove()
    x = torch.cat(seen).flatten(0, 1)
    layer = model.head
    first, second = effkern.eora_factors(
        weights["head"], plain.head.weight_palette.palette(), x.mT @ x / len(x), 4
    )
    torch.testing.assert_close(layer.low_rank_b @ layer.low_rank_a, second @ first, rtol=1e-3, atol=1e-4)
    for mine, other in zip(report.replaced, without.replaced, strict=True):
        factors = (
            0
            if mine.name == "embedding"
            else sum(factor.nbytes for factor in model.get_submodule(mine.name).low_rank)
        )
        assert mine.factor_bytes == factors and mine.bytes_after == other.bytes_after + factors
        assert mine.bits_per_weight == pytest.approx(8 * mine.bytes_after / (mine.bytes_before / 4))
        assert mine.error < other.error or mine.name == "embedding"
    assert report.bytes_after - without.bytes_after == sum(entry.factor_bytes for entry in report.replaced)
    fresh = Model(tied)
    restore(fresh, model.state_dict())
    assert torch.equal(fresh(data[0]), model(data[0]))


def test_calibration_in_every_form_and_no_more_rank_than_there_is() -> None:
    data, found = tokens(), []
    start = Model(False)
    for form in (data, (data,), {"tokens": data}):
        model = copy.deepcopy(start)
        model.mlp[0].weight.requires_grad_(False)
        cluster(model, bits=1)
        finalize(model, low_rank=40, calibration=iter([form]))
        assert model.mlp[0].low_rank_a.shape == (32, 32)
        assert not model.mlp[0].low_rank_a.requires_grad and model.mlp[2].low_rank_b.requires_grad
        found.append(model(data))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_a_calibration_that_fails_changes_nothing() -> None:
    model = Model(False)
    cluster(model)
    before = dict(model.named_modules())
    model.mlp[2].eval()
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"low_rank": 2}, ValueError, "low_rank and calibration belong together"),
        ({"calibration": [tokens()]}, ValueError, "low_rank and calibration belong together"),
        ({"low_rank": -1}, ValueError, "low_rank must not be negative, got -1"),
        ({"low_rank": 2, "calibration": []}, ValueError, r"no input for \['head', 'mlp.0', 'mlp.2'\]"),
        ({"low_rank": 2, "calibration": [torch.tensor([[99]])]}, IndexError, "out of range"),
    ]
    for options, error, match in cases:
        with pytest.raises(error, match=match):
            finalize(model, **options)
        assert dict(model.named_modules()) == before
        assert model.training and not model.mlp[2].training
    with torch.no_grad():
        model.norm.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"inputs that are not finite for \['head'\]"):
        finalize(model, low_rank=2, calibration=[tokens()])
    assert dict(model.named_modules()) == before


def test_training_lowers_what_rounding_costs() -> None:
    """Palettes after training against training with clustered weights, of one dense model."""
    data, wanted = torch.randint(0, 48, (32, 8)), torch.randint(0, 48, (32, 8))

    def loss(model: nn.Module) -> Tensor:
        return F.cross_entropy(model(data).flatten(0, 1), wanted.flatten())

    def train(model: nn.Module, steps: int, schedule: TemperatureSchedule | None) -> None:
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(steps):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()

    dense = Model()
    train(dense, 60, None)
    rounded, clustered = copy.deepcopy(dense), copy.deepcopy(dense)
    for model in (rounded, clustered):
        cluster(model, bits=2)
    finalize(rounded)
    train(clustered, 40, TemperatureSchedule(clustered, 40))
    finalize(clustered)
    with torch.no_grad():
        assert loss(clustered) < loss(rounded)


def test_a_weight_goes_only_where_all_its_layers_go() -> None:
    model = Model()
    report = cluster(model, only=nn.Linear)
    assert names(report) == ["mlp.0", "mlp.2"]
    reasons = dict(report.skipped)
    assert reasons["embedding"] == "only does not match it"
    assert reasons["head"] == "its weight also belongs to a layer that stays"
    assert model.head.weight is model.embedding.weight
    views = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    views[1].weight = nn.Parameter(views[0].weight.data)
    assert all("shares memory" in reason for _, reason in cluster(views).skipped)
    block = nn.Sequential(nn.Linear(32, 32))
    twice = nn.ModuleList([block, nn.Sequential(block[0])])
    report = cluster(twice)
    assert names(report) == ["0.0", "1.0"] and twice[0][0] is twice[1][0]
    assert report.replaced[1].tied_to == "0.0"
    finalize(twice)
    assert isinstance(twice[0][0], PalettizedLinear) and twice[0][0] is twice[1][0]


def test_tied_layers_stay_equal_in_training() -> None:
    model = Model()
    importance = {"head": torch.rand(48, 32)}  # of one of them only: the first one's start is that of both
    cluster(model, bits=2, importance=importance)
    schedule = TemperatureSchedule(model, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(tokens()).square().mean().backward()
        optimizer.step()
        schedule.step()
        assert torch.equal(model.embedding.centroids, model.head.centroids)
        assert model.embedding.temperature == model.head.temperature


def test_importance_moves_the_start() -> None:
    model = Model(tied=False)
    importance = torch.rand(128, 32) ** 4
    cluster(model, bits=2, importance={"mlp.0": importance})
    weight = model.mlp[0].weight
    assert torch.equal(model.mlp[0].centroids, effkern.kmeans_init(weight, 4, importance=importance))
    with pytest.raises(ValueError, match=r"importance is given for \['mlp.1', 'nothing'\]"):
        cluster(Model(), importance={"mlp.1": importance, "nothing": importance})


def test_importance_of_a_tied_weight_goes_by_any_of_its_names() -> None:
    importance = torch.rand(48, 32) ** 4
    for name in ("embedding", "head"):
        model = Model()
        cluster(model, bits=2, importance={name: importance})
        expected = effkern.kmeans_init(model.head.weight, 4, importance=importance)
        assert torch.equal(model.embedding.centroids, expected) and torch.equal(
            model.head.centroids, expected
        )
    cluster(Model(), bits=2, importance={"embedding": importance, "head": importance.clone()})
    with pytest.raises(ValueError, match="embedding and head have one weight, but different importances"):
        cluster(Model(), bits=2, importance={"embedding": importance, "head": importance + 1})


def test_finalize_refuses_tied_layers_of_which_one_never_ran() -> None:
    model = Model()
    cluster(model, bits=2)
    model.head(torch.randn(3, 32)).sum().backward()
    assert not torch.equal(model.embedding.latest, model.head.latest)
    with pytest.raises(ValueError, match="embedding and head have one weight, but ended with different"):
        finalize(model)
    assert type(model.embedding) is ClusteredEmbedding and type(model.head) is ClusteredLinear
    model.embedding.latest.copy_(model.head.latest)
    expected = model.head.eval().effective_weight()
    finalize(model)
    assert torch.equal(model.head.weight_palette.palette().to_dense(), expected)


def test_layers_that_stay() -> None:
    linear = [nn.Linear(32, 32) for _ in range(4)]
    nn.utils.parametrizations.weight_norm(linear[0])
    linear[1].register_forward_hook(lambda module, inputs, output: output + 1)
    with torch.no_grad():
        linear[2].weight[0, 0] = torch.nan
    model = nn.ModuleDict(
        {
            "norm": linear[0],
            "hooked": linear[1],
            "nan": linear[2],
            "odd": nn.Linear(32, 7),
            "padded": nn.Embedding(32, 32, padding_idx=0),
            "attention": nn.MultiheadAttention(32, 4),
            "encoder": nn.TransformerEncoderLayer(32, 4, 64),
            "plain": linear[3],
        }
    )
    report = cluster(model, groups=2)
    reasons = dict(report.skipped)
    assert names(report) == ["plain"]
    assert "ParametrizedLinear, not nn.Linear or nn.Embedding" in reasons["norm"]
    assert reasons["hooked"] == "it has hooks" and "not finite" in reasons["nan"]
    assert reasons["odd"] == "groups 2 and dim 1 do not divide its weight of 7 x 32"
    assert "padding row" in reasons["padded"] and "class is" in reasons["attention.out_proj"]
    assert reasons["encoder.linear1"] == "its parent reads its weight"
    assert "not replaced" in str(report)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: cluster(nn.Linear(8, 8)), TypeError, "use from_linear or from_embedding"),
        (lambda: cluster(Model(), bits=7), ValueError, "bits must be one of 1, 2, 3, 4, 6, 8, got 7"),
        (lambda: cluster(Model(), dim=3), ValueError, "dim must be 1, 2 or 4"),
        (lambda: cluster(Model(), temperature=-1.0), ValueError, "temperature must be positive"),
        (lambda: cluster(Model(), clusters=8), TypeError, "clusters"),
        (lambda: cluster(Model(), only=3), TypeError, "cluster: only must be a pattern"),
        (lambda: finalize(ClusteredLinear(8, 8)), TypeError, r"use PalettizedLinear\(layer"),
    ],
)
def test_clear_errors(call: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()


def finalized(tied: bool) -> nn.Module:
    model = Model(tied)
    cluster(model, bits=3, groups=2)
    finalize(model)
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_restore_into_a_dense_model(tied: bool, device: str) -> None:
    made = finalized(tied)
    with torch.device(device):
        fresh = Model(tied)
    restore(fresh, made.state_dict())
    data = tokens()
    assert torch.equal(fresh(data), made(data))
    assert (fresh.embedding.weight_palette is fresh.head.weight_palette) == tied
    fresh.load_state_dict(made.state_dict())
    indices = fresh.mlp[0].weight_palette.indices
    assert indices.data_ptr() != made.mlp[0].weight_palette.indices.data_ptr()


def test_restore_names_what_does_not_fit() -> None:
    state = finalized(False).state_dict()
    with pytest.raises(ValueError, match=r"no linear layer or embedding \['mlp.0', 'mlp.2'\]"):
        restore(nn.ModuleDict({"embedding": nn.Embedding(48, 32), "head": nn.Linear(32, 48)}), state)
    wider = Model(False)
    wider.mlp[0] = nn.Linear(32, 256)
    with pytest.raises(
        ValueError, match=r"the palette of mlp.0 is of shape \(128, 32\), its weight of \(256"
    ):
        restore(wider, state)
    del state["head.weight_palette.lut"]
    with pytest.raises(ValueError, match="expected the entries"):
        restore(Model(False), state)


CORRUPT = [
    ("indices", lambda t: t[:, :-1], "indices has shape .* truncated"),
    ("indices", lambda t: t[:-1], "indices has shape"),
    ("indices", lambda t: t.char(), "indices must be uint8, got int8"),
    ("lut", lambda t: torch.full_like(t, torch.nan), "lut has entries that are not finite"),
    ("lut", lambda t: t.int(), "lut must be floating"),
    ("lut", lambda t: t[:, :5].contiguous(), "indices is corrupt: index [567] of a table of 5"),
    ("lut", lambda t: t[:1], "lut has shape"),
    ("shape", lambda t: t.flip(0), "indices has shape|groups 2 does not divide"),
    ("shape", lambda t: t * 2**40, "indices has shape"),
    ("shape", lambda t: t[:0], "shape must be positive"),
    ("layout", lambda t: t * 2, "bits|indices has shape"),
    ("layout", lambda t: t.float(), "layout must be a vector of int64"),
]


def unchanged(model: nn.Module, modules: dict[str, nn.Module], values: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    same = now.keys() == values.keys() and all(torch.equal(now[key], values[key]) for key in values)
    return same and dict(model.named_modules()) == modules


@pytest.mark.parametrize(("entry", "change", "match"), CORRUPT)
def test_corrupt_palettes_leave_the_model_as_it_was(
    entry: str, change: Any, match: str, tmp_path: Path
) -> None:
    files = pytest.importorskip("safetensors.torch")
    state, path = finalized(False).state_dict(), tmp_path / "model.safetensors"
    key = f"mlp.2.weight_palette.{entry}"
    files.save_file({**state, key: change(state[key]).contiguous()}, path)
    fresh = Model(False)
    modules, values = dict(fresh.named_modules()), copy.deepcopy(fresh.state_dict())
    with pytest.raises(ValueError, match=match):
        restore(fresh, files.load_file(path))
    assert unchanged(fresh, modules, values)
    # A palettised model keeps the palette that it has.
    made = finalized(False)
    before = made.mlp[2].weight_palette.palette().to_dense()
    with pytest.raises(RuntimeError, match=match):
        made.load_state_dict(files.load_file(path))
    assert torch.equal(made.mlp[2].weight_palette.palette().to_dense(), before)


def test_files_cut_anywhere_leave_the_model_as_it_was(tmp_path: Path) -> None:
    """In the length, in the header, at both ends and inside of every tensor, and a byte short."""
    files = pytest.importorskip("safetensors.torch")
    error = pytest.importorskip("safetensors").SafetensorError
    made = finalized(False)
    whole = files.save(made.state_dict())
    header = int.from_bytes(whole[:8], "little")
    ends = [entry["data_offsets"] for entry in json.loads(whole[8 : 8 + header]).values()]
    inside = {8 + header + (first + last) // 2 for first, last in ends if first < last}
    cuts = {0, 4, 8, 8 + header // 2, 8 + header, len(whole) - 1, *inside}
    cuts |= {8 + header + place for pair in ends for place in pair if 8 + header + place < len(whole)}
    fresh, path = Model(False), tmp_path / "model.safetensors"
    modules, values = dict(fresh.named_modules()), copy.deepcopy(fresh.state_dict())
    for cut in sorted(cuts):
        path.write_bytes(whole[:cut])
        with pytest.raises(error):
            restore(fresh, files.load_file(path))
    assert unchanged(fresh, modules, values)
    # What lacks entries altogether: every one of them is missed.
    state = files.load(whole)
    for key in state:
        fewer = {name: entry for name, entry in state.items() if name != key}
        with pytest.raises((ValueError, RuntimeError), match=r"expected the entries|Missing key"):
            restore(fresh, fewer)
        assert dict(fresh.named_modules()) == modules
    restore(fresh, state)
    data = tokens()
    assert torch.equal(fresh(data), made(data))


@pytest.mark.parametrize("tied", [True, False])
def test_through_safetensors(tied: bool, tmp_path: Path) -> None:
    files = pytest.importorskip("safetensors.torch")
    made, path = finalized(tied), tmp_path / "model.safetensors"
    files.save_model(made, path)
    fresh = Model(tied)
    restore(fresh, files.load_file(path))
    data = tokens()
    assert torch.equal(fresh(data), made(data))
    again = finalized(tied)
    files.load_model(again, path)
    assert torch.equal(again(data), made(data))
    dense = sum(t.nbytes for t in Model(tied).state_dict().values())
    assert path.stat().st_size < dense / (3 if tied else 4)
