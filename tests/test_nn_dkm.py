"""Layers with clustered and palettised weights: what they compute, what they keep, and what files hold of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import effkern
from effkern.nn import (
    ClusteredEmbedding,
    ClusteredLinear,
    PalettizedEmbedding,
    PalettizedLinear,
    TemperatureSchedule,
)

LAYOUTS = [{}, {"groups": 4}, {"dim": 2}, {"groups": 2, "dim": 4}]


def options(layer: ClusteredLinear | ClusteredEmbedding) -> dict[str, Any]:
    return {
        "temperature": layer.temperature,
        "iterations": layer.iterations,
        "groups": layer.groups,
        "dim": layer.dim,
    }


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("bits", [1, 3, 4])
def test_training_sees_the_clustered_weight(layout: dict[str, int], bits: int) -> None:
    layer = ClusteredLinear(48, 24, bits, **layout)
    start = layer.centroids.clone()
    shape = [layer.groups] * (layer.groups > 1) + [2**bits] + [layer.dim] * (layer.dim > 1)
    assert list(start.shape) == shape
    x = torch.randn(3, 5, 48, requires_grad=True)
    leaf = layer.weight.detach().clone().requires_grad_()
    clustered, found = effkern.dkm(leaf, start, **options(layer))
    expected = F.linear(x, clustered, layer.bias)
    out = layer(x)
    assert effkern.backends.last().startswith("dkm:cpu/")
    assert torch.equal(out, expected)
    sent = torch.randn_like(out)
    inputs = (x, layer.weight, layer.bias)
    grads = torch.autograd.grad(out, inputs, sent)
    for mine, theirs in zip(grads, torch.autograd.grad(expected, (x, leaf, layer.bias), sent), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(layer.centroids, start) and torch.equal(layer.latest, found)
    layer.update_centroids()
    assert torch.equal(layer.centroids, found) and not torch.equal(found, start)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_evaluation_is_what_packing_gives(layout: dict[str, int]) -> None:
    layer = ClusteredLinear(48, 24, 3, **layout)
    x = torch.randn(5, 48)
    layer(x)
    assert not torch.equal(layer.latest, layer.centroids)
    palette = layer.eval().palette()
    assert palette.bits == 3 and palette.groups == layer.groups and palette.dim == layer.dim
    expected = effkern.palettize(layer.weight, layer.latest, groups=layer.groups, dim=layer.dim)
    assert torch.equal(palette.to_dense(), expected.to_dense())
    assert torch.equal(layer(x), F.linear(x, palette.to_dense(), layer.bias))
    packed = PalettizedLinear(palette, layer.bias)
    torch.testing.assert_close(packed(x), layer(x))
    assert effkern.backends.last().startswith("palettized_linear:cpu/")


def test_a_forward_that_is_repeated_gives_the_same_bits() -> None:
    layer = ClusteredLinear(32, 16, 2)
    x = torch.randn(7, 32)
    assert torch.equal(layer(x), layer(x))
    layer(x).square().sum().backward()
    plain = layer.weight.grad
    layer.weight.grad = None
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    assert torch.equal(layer.weight.grad, plain)


def test_from_linear_keeps_the_parameters_and_starts_at_k_means() -> None:
    linear = nn.Linear(32, 16).eval()
    linear.weight.requires_grad_(False)
    layer = ClusteredLinear.from_linear(linear, 2, groups=2)
    assert layer.weight is linear.weight and layer.bias is linear.bias and not layer.training
    assert torch.equal(layer.centroids, effkern.kmeans_init(linear.weight, 4, groups=2))
    palette = PalettizedLinear.from_linear(linear, 2, groups=2).weight_palette.palette()
    assert torch.equal(layer.palette().to_dense(), palette.to_dense())
    importance = torch.rand_like(linear.weight)
    found = ClusteredLinear.from_linear(linear, 2, importance=importance).centroids
    assert torch.equal(found, effkern.kmeans_init(linear.weight, 4, importance=importance))
    embedding = nn.Embedding(20, 8)
    assert ClusteredEmbedding.from_embedding(embedding).weight is embedding.weight
    assert ClusteredLinear.from_linear(nn.Linear(4, 4, bias=False)).bias is None


def test_start_temperature_follows_the_scale_of_the_weight() -> None:
    linear = nn.Linear(64, 64)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([-3.0, -1.0, 1.0, 3.0]).repeat(1024).view(64, 64))
    assert ClusteredLinear.from_linear(linear, 2).temperature == pytest.approx(0.4)
    with torch.no_grad():
        linear.weight.mul_(10)
    assert ClusteredLinear.from_linear(linear, 2).temperature == pytest.approx(40.0)
    assert ClusteredLinear.from_linear(linear, 2, temperature=0.5).temperature == 0.5
    nn.init.constant_(linear.weight, 1.5)  # no two centroids
    constant = ClusteredLinear.from_linear(linear, 2)
    assert torch.equal(constant(torch.eye(64)), linear(torch.eye(64)))
    assert constant.palette().to_dense().unique().tolist() == [1.5]


@pytest.mark.parametrize("kind", [ClusteredLinear, ClusteredEmbedding])
def test_state_of_a_layer_in_training(kind: type) -> None:
    layer = kind(24, 16, 3)
    layer.clustered_weight()
    layer.update_centroids()
    layer.temperature *= 0.37
    state = layer.state_dict()
    assert set(state) - {"bias"} == {"weight", "centroids", "latest", "_extra_state"}
    assert all(isinstance(entry, Tensor) for entry in state.values())
    other = kind(24, 16, 3)
    other.load_state_dict(state)
    assert other.temperature == layer.temperature
    assert torch.equal(other.latest, layer.centroids)
    assert torch.equal(other.clustered_weight(), layer.clustered_weight())
    assert torch.equal(copy.deepcopy(layer).clustered_weight(), layer.clustered_weight())
    with pytest.raises(RuntimeError, match="size mismatch for centroids"):
        kind(24, 16, 4).load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    x = torch.randn(3, 32).to(dtype)
    for layer in (ClusteredLinear(32, 16, dtype=dtype), ClusteredLinear(32, 16).to(dtype)):
        out = layer(x)
        out.float().square().sum().backward()
        assert out.dtype == dtype and layer.weight.grad.isfinite().all()
        layer.update_centroids()
        assert layer.eval()(x).dtype == dtype and layer.palette().lut.dtype == dtype


def test_state_between_a_forward_and_its_update() -> None:
    """Evaluation and packing use where the last forward ended, also where nothing moves the start on."""
    layer = ClusteredLinear(24, 16, 3)
    layer.clustered_weight()
    assert not torch.equal(layer.latest, layer.centroids)
    other = ClusteredLinear(24, 16, 3)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.latest, layer.latest) and torch.equal(other.centroids, layer.centroids)
    x = torch.randn(5, 24)
    assert torch.equal(other.eval()(x), layer.eval()(x))
    assert torch.equal(other.palette().lut, layer.palette().lut)


def test_under_autocast_the_weight_is_clustered_in_its_own_dtype() -> None:
    layer, x = ClusteredLinear(32, 16), torch.randn(3, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    expected = F.linear(x.bfloat16(), layer.clustered_weight().bfloat16(), layer.bias.bfloat16())
    assert torch.equal(out, expected)


def test_compiles_whole_and_with_another_temperature() -> None:
    layer, x = ClusteredLinear(32, 16), torch.randn(3, 32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for temperature in (layer.temperature, 0.5 * layer.temperature, 0.2 * layer.temperature):
        layer.temperature = temperature
        expected = layer(x)
        found = layer.latest.clone()
        layer.latest.zero_()
        assert torch.equal(compiled(x), expected) and torch.equal(layer.latest, found)
    packed = PalettizedLinear(layer.palette(), layer.bias)
    assert torch.equal(torch.compile(packed, fullgraph=True, backend="aot_eager")(x), packed(x))


@pytest.mark.parametrize("layout", [{}, {"groups": 2, "dim": 4}], ids=str)
def test_evaluation_compiles_whole(layout: dict[str, int]) -> None:
    layer, x = ClusteredLinear(48, 24, 3, **layout), torch.randn(5, 48)
    layer.latest.reshape(-1)[:2] = layer.latest.reshape(-1)[2:4]  # equal centroids
    layer.eval()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    with torch.no_grad():
        layer.weight[3, 5] = torch.inf
    for call in (layer, compiled):
        with pytest.raises(RuntimeError, match="palettize: weight has entries that are not finite"):
            call(x)
    embedding, tokens = ClusteredEmbedding(20, 8).eval(), torch.randint(20, (7,))
    compiled = torch.compile(embedding, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(tokens), embedding(tokens))


def test_built_on_the_meta_device_and_filled_later() -> None:
    with torch.device("meta"):
        layer = ClusteredLinear(32, 16)
    assert layer.weight.is_meta and layer.centroids.is_meta
    layer.to_empty(device="cpu").reset_parameters()
    assert torch.equal(layer.centroids, effkern.kmeans_init(layer.weight, 8))
    assert layer.temperature < 0.1 and layer(torch.randn(2, 32)).isfinite().all()


def test_embedding_computes_as_torch_does() -> None:
    layer = ClusteredEmbedding(20, 8, 3)
    tokens = torch.randint(0, 20, (2, 7))
    leaf = layer.weight.detach().clone().requires_grad_()
    expected = F.embedding(tokens, effkern.dkm(leaf, layer.centroids, **options(layer))[0])
    out = layer(tokens)
    assert torch.equal(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(layer.weight.grad, leaf.grad)
    packed = PalettizedEmbedding(layer.palette())
    assert torch.equal(packed(tokens), layer.eval()(tokens))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("bits", [1, 3, 6])
def test_palettized_embedding_unpacks_rows(layout: dict[str, int], bits: int) -> None:
    embedding = nn.Embedding(40, 52)
    layer = PalettizedEmbedding.from_embedding(embedding, bits, **layout)
    dense = layer.weight_palette.palette().to_dense()
    for tokens in (torch.randint(0, 40, (3, 5)), torch.tensor(39), torch.empty(0, 2, dtype=torch.int32)):
        assert torch.equal(layer(tokens), F.embedding(tokens, dense))
    tokens = torch.randint(0, 40, (64,))
    sent = torch.randn(64, 52)
    mine, theirs = (
        torch.autograd.grad(out, layer.weight_palette.lut, sent)[0]
        for out in (layer(tokens), F.embedding(tokens, dense))
    )
    torch.testing.assert_close(mine, theirs)
    for wrong in (-1, 40):
        with pytest.raises((IndexError, RuntimeError), match="out of range"):
            layer(torch.tensor([wrong]))


def test_palettized_embedding_takes_integers_only() -> None:
    layer = PalettizedEmbedding.from_embedding(nn.Embedding(20, 16))
    assert torch.equal(layer(torch.tensor([3], dtype=torch.int32)), layer(torch.tensor([3])))
    for wrong in (torch.tensor([3.7]), torch.tensor([True]), torch.tensor([3], dtype=torch.uint8)):
        with pytest.raises(RuntimeError, match="indices must be int32 or int64"):
            layer(wrong)


def test_layers_of_one_palette_train_apart() -> None:
    weight = torch.randn(24, 32)
    palette = effkern.palettize(weight, torch.linspace(-1, 1, 8))
    bias, factors = torch.zeros(24), (torch.randn(2, 32), torch.randn(24, 2))
    kept = [t.clone() for t in (palette.lut, bias, *factors)]
    first, second = (PalettizedLinear(palette, bias, low_rank=factors) for _ in range(2))
    x = torch.randn(5, 32)
    before = second(x)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(1.0)
    assert torch.equal(second(x), before)
    assert all(torch.equal(t, old) for t, old in zip((palette.lut, bias, *factors), kept, strict=True))


def test_palettized_linear_and_its_dense_twin() -> None:
    linear = nn.Linear(64, 24).bfloat16()
    layer = PalettizedLinear.from_linear(linear, 4)
    assert layer.bias is linear.bias and layer.weight_palette.lut.dtype == torch.bfloat16
    x = torch.randn(2, 3, 64).bfloat16()
    dense = layer.to_linear()
    assert dense.weight.unique().numel() <= 16
    torch.testing.assert_close(layer(x), dense(x))
    layer(x).float().square().sum().backward()
    assert layer.weight_palette.lut.grad.isfinite().all() and layer.bias.grad.isfinite().all()
    assert "bits_per_weight=4." in repr(layer) and "in_features=64" in repr(layer)
    assert PalettizedLinear.from_linear(nn.Linear(8, 8, bias=False), 1).to_linear().bias is None


def test_state_of_palettized_layers() -> None:
    linear, x = nn.Linear(64, 24), torch.randn(3, 64)
    layer = PalettizedLinear.from_linear(linear, 3)
    state = layer.state_dict()
    names = ("lut", "indices", "shape", "layout")
    assert set(state) == {"bias", *(f"weight_palette.{name}" for name in names)}
    assert all(isinstance(entry, Tensor) for entry in state.values())
    same = PalettizedLinear.from_linear(nn.Linear(64, 24), 3)
    lut = same.weight_palette.lut
    same.load_state_dict(state)
    assert same.weight_palette.lut is lut and torch.equal(same(x), layer(x))
    other = PalettizedLinear.from_linear(nn.Linear(64, 24), 4, groups=2)  # the file says what it holds
    other.load_state_dict(state)
    assert other.weight_palette.bits == 3 and torch.equal(other(x), layer(x))
    assert other.weight_palette.indices.data_ptr() != layer.weight_palette.indices.data_ptr()
    with pytest.raises(RuntimeError, match="truncated, or of another weight"):
        broken = {**state, "weight_palette.indices": state["weight_palette.indices"][:, :-1]}
        same.load_state_dict(broken)
    with pytest.raises(RuntimeError, match=r"Missing key.*weight_palette\.lut"):
        same.load_state_dict({key: entry for key, entry in state.items() if not key.endswith("lut")})
    with pytest.raises(RuntimeError, match=r"shape is \(24, 64\), the layer's weight has \(24, 32\)"):
        PalettizedLinear.from_linear(nn.Linear(32, 24), 3).load_state_dict(state)


def test_low_rank_correction_of_a_layer() -> None:
    linear, x = nn.Linear(64, 24), torch.randn(200, 64) * torch.linspace(0.1, 2, 64)
    covariance = x.mT @ x / 200
    plain = PalettizedLinear.from_linear(linear, 2)
    layer = PalettizedLinear.from_linear(linear, 2, rank=5, covariance=covariance)
    palette = plain.weight_palette.palette()
    first, second = effkern.eora_factors(linear.weight, palette, covariance, 5)
    assert torch.equal(layer.low_rank_a, first) and torch.equal(layer.low_rank_b, second)
    assert plain.low_rank is None and "rank=5" in repr(layer) and "rank" not in repr(plain)
    out = layer(x)
    assert torch.equal(out, effkern.palettized_linear(x, palette, linear.bias, low_rank=(first, second)))
    error, before = ((call(x) - linear(x)).norm() for call in (layer, plain))
    assert error < 0.85 * before
    out.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
    torch.testing.assert_close(layer.to_linear()(x), out, rtol=1e-4, atol=1e-4)
    # All directions alike where nothing is known of the inputs: full rank undoes the palette.
    full = PalettizedLinear.from_linear(linear, 2, rank=24)
    torch.testing.assert_close(full.to_linear().weight, linear.weight, rtol=1e-4, atol=1e-5)
    assert (
        PalettizedLinear.from_linear(nn.Linear(64, 24).bfloat16(), rank=1).low_rank_a.dtype == torch.bfloat16
    )
    given = nn.Parameter(first), nn.Parameter(second)
    made = PalettizedLinear(palette, low_rank=given)
    assert (made.low_rank_a, made.low_rank_b) == given
    for wrong in ((first, second.mT), (first[:, 1:], second), (first[:2], second), (first[0], second)):
        with pytest.raises(ValueError, match=r"low_rank must be floating matrices \(r, 64\) and \(24, r\)"):
            PalettizedLinear(palette, low_rank=wrong)


def test_state_of_low_rank_corrections() -> None:
    linear, x = nn.Linear(64, 24), torch.randn(3, 64)
    layer = PalettizedLinear.from_linear(linear, 3, rank=4)
    state = layer.state_dict()
    assert {"low_rank_a", "low_rank_b"} < set(state)
    for rank in (0, 2, 4):  # the file says what it holds
        other = PalettizedLinear.from_linear(nn.Linear(64, 24), 3, rank=rank)
        held = other.low_rank_a
        other.load_state_dict(state)
        assert torch.equal(other(x), layer(x)) and (other.low_rank_a is held) == (rank == 4)
        assert other.low_rank_b.data_ptr() != layer.low_rank_b.data_ptr()
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    for name in ("low_rank_a", "low_rank_b"):
        half = {key: entry for key, entry in state.items() if key != name}
        with pytest.raises(RuntimeError, match=f"Missing key.*{name}"):
            layer.load_state_dict(half)
        with pytest.raises(RuntimeError, match=r"Unexpected key.*low_rank"):
            PalettizedLinear.from_linear(linear, 3).load_state_dict(half)
    with pytest.raises(RuntimeError, match="low_rank must be floating matrices"):
        layer.load_state_dict({**state, "low_rank_a": state["low_rank_a"][:, 1:]})
    assert torch.equal(layer.low_rank_a, state["low_rank_a"])


def test_palettes_move_and_cast_with_their_layer() -> None:
    layer = PalettizedLinear.from_linear(nn.Linear(64, 24), 3)
    dense = layer.weight_palette.palette().to_dense()
    cast = copy.deepcopy(layer).to(torch.bfloat16)
    assert torch.equal(cast.weight_palette.palette().to_dense(), dense.bfloat16())
    assert cast.weight_palette.indices.dtype == torch.uint8
    assert layer.to("meta")(torch.empty(2, 64, device="meta")).shape == (2, 24)


def test_through_safetensors(tmp_path: Any) -> None:
    files = pytest.importorskip("safetensors.torch")
    linear = nn.Linear(64, 24)
    for layer in (
        PalettizedLinear.from_linear(linear, 3),
        PalettizedLinear.from_linear(linear, 3, groups=2, rank=3),
        ClusteredLinear(64, 24),
    ):
        files.save_file(layer.state_dict(), tmp_path / "layer.safetensors")
        other = copy.deepcopy(layer)
        for parameter in other.parameters():
            nn.init.zeros_(parameter)
        other.load_state_dict(files.load_file(tmp_path / "layer.safetensors"))
        x = torch.randn(3, 64)
        assert torch.equal(other(x), layer(x))


def test_schedule_cools_and_moves_the_centroids() -> None:
    model = nn.Sequential(ClusteredLinear(32, 16), nn.ReLU(), ClusteredLinear(16, 8, temperature=1e-3))
    starts = [model[0].temperature, 1e-3]
    schedule = TemperatureSchedule(model, 4, end=0.01)
    assert model[2].temperature == 1e-3
    for step in range(1, 7):
        before = model[0].centroids.clone()
        model(torch.randn(3, 32))
        schedule.step()
        assert torch.equal(model[0].centroids, model[0].latest)
        assert step > 1 or not torch.equal(model[0].centroids, before)
        for layer, start in zip((model[0], model[2]), starts, strict=True):
            assert layer.temperature == pytest.approx(start * 0.01 ** (min(step, 4) / 4))
    half = TemperatureSchedule(model, 4)
    half.load_state_dict({**schedule.state_dict(), "taken": 2})
    assert model[2].temperature == pytest.approx(1e-3 * 0.1**0.5)
    with pytest.raises(ValueError, match="the state is of 2 layers, the model has 1"):
        TemperatureSchedule(model[0], 4).load_state_dict(schedule.state_dict())


def test_training_with_a_schedule_ends_close_to_its_palette() -> None:
    """What the temperature is lowered for: rounding then changes little."""
    x, wanted = torch.randn(256, 16), torch.randn(256, 8)
    model = nn.Sequential(ClusteredLinear(16, 32, 2), nn.Tanh(), ClusteredLinear(32, 8, 2))
    before = F.mse_loss(model.eval()(x), wanted).item()
    optimizer = torch.optim.Adam(model.train().parameters(), 1e-2)
    schedule = TemperatureSchedule(model, 150, end=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), wanted)
        loss.backward()
        optimizer.step()
        schedule.step()
    after = F.mse_loss(model.eval()(x), wanted).item()
    assert after < 0.9 * before
    assert after < 1.1 * loss.item()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: ClusteredLinear(8, 8, 5), "bits must be one of 1, 2, 3, 4, 6, 8, got 5"),
        (lambda: ClusteredLinear(8, 6, groups=4), "groups 4 does not divide the 6 rows"),
        (lambda: ClusteredLinear(6, 8, dim=4), "dim must be 1, 2 or 4 and divide 6, got 4"),
        (lambda: ClusteredLinear(8, 8, temperature=0.0), "temperature must be positive and finite, got 0.0"),
        (lambda: ClusteredEmbedding(8, 8, iterations=0), "ClusteredEmbedding: iterations must be at least 1"),
        (lambda: ClusteredLinear(0, 8), "sizes must be at least 1"),
        (lambda: ClusteredEmbedding.from_embedding(nn.Embedding(8, 8, padding_idx=0)), "padding row"),
        (lambda: ClusteredEmbedding.from_embedding(nn.Embedding(8, 8, max_norm=1.0)), "maximal norm"),
        (lambda: ClusteredEmbedding.from_embedding(nn.Embedding(8, 8, sparse=True)), "sparse"),
        (lambda: PalettizedLinear.from_linear(nn.Linear(8, 8), 5), "bits must be one of"),
        (
            lambda: PalettizedLinear(effkern.palettize(torch.ones(8), torch.ones(1))),
            r"palette must be of a matrix, not of shape \(8,\)",
        ),
        (
            lambda: PalettizedEmbedding(effkern.palettize(torch.ones(8), torch.ones(1))),
            r"palette must be of a matrix, not of shape \(8,\)",
        ),
        (
            lambda: PalettizedLinear(effkern.palettize(torch.ones(8, 4), torch.ones(1)), torch.ones(4)),
            r"bias must have shape \(8,\), got \(4,\)",
        ),
        (lambda: TemperatureSchedule(nn.Linear(8, 8), 5), "the model has no clustered layer"),
        (lambda: TemperatureSchedule(ClusteredLinear(8, 8), 0), "steps must be at least 1, got 0"),
        (lambda: TemperatureSchedule(ClusteredLinear(8, 8), 5, end=0.0), "end must be positive and finite"),
    ],
)
def test_layers_say_what_is_wrong(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


def test_wrong_inputs_and_weights() -> None:
    with pytest.raises(RuntimeError, match="x must have 8 features, got shape"):
        ClusteredLinear(8, 8)(torch.randn(2, 9))
    linear = nn.Linear(8, 8)
    with torch.no_grad():
        linear.weight[0, 0] = torch.nan
    with pytest.raises(RuntimeError, match="kmeans_init: weight"):
        ClusteredLinear.from_linear(linear)
