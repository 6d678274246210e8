"""MonarchLinear as a drop-in for nn.Linear, and the conversion of whole models."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import effkern
from effkern.convert import monarchize
from effkern.nn import MonarchLinear


@pytest.mark.parametrize("shape", [(32, 32), (24, 96), (96, 24), (30, 45), (7, 5), (1, 1)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_layer_and_its_dense_twin(shape: tuple[int, int], bias: bool) -> None:
    layer = MonarchLinear(*shape, nblocks=4 if min(shape) >= 4 else 1, bias=bias)
    x = torch.randn(3, 5, shape[0], requires_grad=True)
    dense = layer.to_linear()
    out = layer(x)
    assert out.shape == (3, 5, shape[1])
    torch.testing.assert_close(out, dense(x))
    out.square().sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    again = MonarchLinear.from_linear(dense, layer.nblocks, layer.rank)
    torch.testing.assert_close(again(x), dense(x), rtol=1e-4, atol=1e-4)


def test_fresh_layer_gives_the_variance_of_linear() -> None:
    torch.manual_seed(0)
    x = torch.randn(512, 384)
    for sizes in ((384, 384), (384, 1536), (384, 96), (384, 390)):
        variances = [
            torch.stack([make(*sizes)(x).var() for _ in range(8)]).mean()
            for make in (nn.Linear, MonarchLinear)
        ]
        assert 0.85 < variances[1] / variances[0] < 1.15


def test_state_dict_dtype_compile_and_copy() -> None:
    layer = MonarchLinear(24, 40, nblocks=4, dtype=torch.bfloat16)
    assert set(layer.state_dict()) == {"w1", "w2", "bias"}
    other = MonarchLinear(24, 40, nblocks=4, dtype=torch.bfloat16)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(6, 24).bfloat16()
    assert torch.equal(other(x), layer(x)) and torch.equal(copy.deepcopy(layer)(x), layer(x))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    assert "nblocks=4" in repr(layer)


def test_layer_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="nblocks must be at least 1"):
        MonarchLinear(8, 8, nblocks=0)
    with pytest.raises(ValueError, match="rank must be between 1 and 2, got 3"):
        MonarchLinear(8, 8, nblocks=4, rank=3)
    with pytest.raises(RuntimeError, match="x must have 8 features"):
        MonarchLinear(8, 8)(torch.randn(2, 9))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.mlp = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.tiny = nn.Linear(32, 3)
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.mlp(self.embedding(tokens))
        return self.head(x + self.attention(x, x, x)[0]) + self.tiny(x).sum(-1, keepdim=True)


def test_monarchize_reports_what_it_did() -> None:
    model, tokens = Model(), torch.randint(0, 50, (2, 7))
    model.mlp[0].weight.requires_grad_(False)
    weights = {
        name: module.weight.detach().clone()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    report = monarchize(model, nblocks=4)
    assert [layer.name for layer in report.replaced] == ["mlp.0", "mlp.2"]
    reasons = dict(report.skipped)
    assert set(reasons) == {"attention.out_proj", "tiny", "head"}
    assert "NonDynamicallyQuantizableLinear" in reasons["attention.out_proj"]
    assert "parameters would replace 96" in reasons["tiny"]
    assert "shares its parameters" in reasons["head"]
    name, error, before, after = report.replaced[0]
    layer = model.mlp[0]
    assert (
        isinstance(layer, MonarchLinear)
        and before == 32 * 128
        and after == layer.w1.numel() + layer.w2.numel() < before
    )
    expected = torch.linalg.norm(layer.dense_weight() - weights[name]) / torch.linalg.norm(weights[name])
    assert error == pytest.approx(expected.item(), rel=1e-4)
    assert not layer.w1.requires_grad and not layer.w2.requires_grad and layer.bias.requires_grad
    assert report.replaced[0].speedup == before / after
    text = str(report)
    assert "mlp.0" in text and "2 layers" in text and "shares its parameters" in text
    model(tokens).sum().backward()


def test_monarchize_of_a_monarch_model_changes_nothing() -> None:
    model = nn.Sequential(
        MonarchLinear(32, 64, rank=1).to_linear(), nn.ReLU(), MonarchLinear(64, 32, rank=1).to_linear()
    )
    x = torch.randn(5, 32)
    expected = model(x)
    report = monarchize(model, rank=1)
    assert len(report.replaced) == 2 and all(layer.error < 1e-6 for layer in report.replaced)
    torch.testing.assert_close(model(x), expected)
    assert monarchize(model).replaced == []


@pytest.mark.parametrize(
    ("only", "names"),
    [
        ("mlp.*", {"mlp.0", "mlp.2"}),
        (["*.2", "tiny"], {"mlp.2"}),
        ((lambda name, module: name == "mlp.0", "*.2"), {"mlp.0", "mlp.2"}),
        (nn.Linear, {"mlp.0", "mlp.2"}),
        (lambda name, module: module.out_features == 128, {"mlp.0"}),
    ],
    ids=["pattern", "patterns", "mixed", "class", "function"],
)
def test_filters(only, names: set[str]) -> None:
    report = monarchize(Model(), only=only)
    assert {layer.name for layer in report.replaced} == names
    reasons = dict(report.skipped)
    assert all(reasons[name] == "only does not match it" for name in {"mlp.0", "mlp.2"} - names)


def test_layers_that_stay() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32))
    nn.utils.parametrizations.weight_norm(model[0])
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    report = monarchize(model, nblocks=4)
    reasons = dict(report.skipped)
    assert "ParametrizedLinear" in reasons["0"] and "not finite" in reasons["2"]
    assert [layer.name for layer in report.replaced] == ["1"]
    with pytest.raises(TypeError, match=r"use MonarchLinear\.from_linear"):
        monarchize(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="nblocks must be at least 1"):
        monarchize(model, nblocks=0)
    with pytest.raises(TypeError, match="monarchize: only must be a pattern"):
        monarchize(model, only=3)  # type: ignore[arg-type]


def test_names_are_public() -> None:
    assert effkern.convert.monarchize is monarchize


def test_what_monarchize_must_not_break() -> None:
    encoder = nn.TransformerEncoderLayer(64, 4, 256, batch_first=True)
    report = monarchize(nn.Sequential(encoder), nblocks=4)
    assert report.replaced == [] and ("0.linear1", "its parent reads its weight") in report.skipped
    encoder.eval()(torch.randn(2, 5, 64))
    hooked = nn.Sequential(nn.Linear(32, 32))
    hooked[0].register_forward_hook(lambda module, inputs, output: output + 1)
    assert monarchize(hooked, nblocks=4).skipped == [("0", "it has hooks")]
    tied = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    tied[1].weight = nn.Parameter(tied[0].weight.data)
    report = monarchize(tied, nblocks=4)
    assert len(report.skipped) == 2 and all("shares its parameters" in reason for _, reason in report.skipped)
    block = nn.Sequential(nn.Linear(32, 32))
    assert "stands in several places" in monarchize(nn.Sequential(block, block), nblocks=4).skipped[0][1]


def test_layer_under_autocast_keeps_its_precision() -> None:
    layer = MonarchLinear(16, 16, nblocks=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dense = layer.to_linear()
    assert dense.weight.dtype == torch.float32 and torch.equal(dense.weight, layer.dense_weight())
    with pytest.raises(RuntimeError, match="x must have 16 features"):
        layer(torch.tensor(1.0))
