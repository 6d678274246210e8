"""Pretrained residual networks made reversible: what is converted, what it computes, what is left alone and why."""

from __future__ import annotations

import copy
import io
import math
import re

import pytest
import torch
from pretrained_nets import (
    GPT2,
    WIDTH,
    GPT2Block,
    Halved,
    InPlace,
    InTraining,
    Parallel,
    PostNorm,
    PostScaled,
    ViT,
    ViTBlock,
    Windowed,
)
from reversible_nets import assert_same
from torch import Tensor, nn

import effkern
from effkern.convert import reversible
from effkern.nn import DualResidualBlock, DualResidualSchedule


def _gradients(
    model: nn.Module, *inputs: Tensor, seed: int = 3, **kwargs: object
) -> tuple[Tensor, list[Tensor]]:
    """Output, and gradients of floating-point inputs, then of the parameters in the order they were made in."""
    torch.manual_seed(seed)
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    out = model(*leaves, **kwargs)
    weight = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view_as(out)
    wanted = [x for x in leaves if x.requires_grad]
    # A conversion moves parameters, and does not replace them.
    wanted += sorted(
        model.parameters(), key=lambda p: (p.shape, p.flatten()[0].item(), p.flatten()[-1].item())
    )
    return out.detach(), list(torch.autograd.grad((out * weight).sum(), wanted, allow_unused=True))


def _same_model(model: nn.Module, converted: nn.Module, *inputs: Tensor, **kwargs: object) -> None:
    expected_out, expected = _gradients(model, *inputs, **kwargs)
    out, found = _gradients(converted, *inputs, **kwargs)
    assert torch.equal(out, expected_out)
    assert_same([t for t in found if t is not None], [t for t in expected if t is not None], 1e-12)
    assert [t is None for t in found] == [t is None for t in expected]


def _pictures() -> Tensor:
    return torch.randn(3, 6, 5, dtype=torch.float64)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_vit_computes_what_it_did(scaled: bool, training: bool) -> None:
    """Dropped paths too: the same numbers are drawn in the same order."""
    model = ViT(scaled=scaled, drop_path=True).double().train(training)
    converted = copy.deepcopy(model)
    report = reversible(converted, example=_pictures())
    assert report.difference == 0.0
    assert [stack[:5] for stack in report.replaced] == [("blocks.0", 4, 8, ("attn_mask", "is_causal"), 8)]
    assert report.skipped == []
    assert len(converted.blocks) == 1 and isinstance(converted.blocks, nn.Sequential)
    assert all(module.training == training for module in converted.modules())
    _same_model(model, converted, _pictures())
    mask = torch.randn(6, 6, dtype=torch.float64)
    _same_model(model, converted, _pictures(), mask)


@pytest.mark.parametrize("tuples", [True, False])
def test_gpt2_computes_what_it_did(tuples: bool) -> None:
    model = GPT2(tuples=tuples).double()
    converted = copy.deepcopy(model)
    tokens = torch.randint(7, (2, 6))
    report = reversible(converted, example=[tokens])
    assert [(stack.name, stack.blocks) for stack in report.replaced] == [("h.0", 4)]
    assert "attention_mask" in report.replaced[0].arguments
    mask = torch.randn(6, 6, dtype=torch.float64)
    _same_model(model, converted, tokens, mask)
    # An argument that only the attention knows, through the block's **kwargs.
    _same_model(model, converted, tokens, mask, scale=torch.tensor(0.7, dtype=torch.float64))
    assert isinstance(converted.h[0](torch.zeros(1, 2, WIDTH, dtype=torch.float64)), tuple) == tuples


def test_side_inputs_get_gradients() -> None:
    model = ViT(2).double()
    reversible(model)
    mask = torch.zeros(6, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(model(_pictures(), mask).square().sum(), mask)[0].abs().max() > 0


def _by_equation(model: ViT, x: Tensor) -> Tensor:
    """The dual-residual network as autograd runs it by itself."""
    x = model.stem(x)
    blocks = list(model.blocks[0].sequence.blocks)
    y = blocks[0].beta * x
    for block in blocks:
        x, y = block.f(x) + block.alpha * x + y, block.beta * x
    return model.head(model.norm(x).mean(1))


@pytest.mark.parametrize("overlap", [False, True])
def test_the_schedule_leads_to_a_reversible_network(overlap: bool) -> None:
    model = ViT(5).double()
    report = reversible(model, overlap=overlap, error_budget=1e-9)
    assert (report.replaced[0].stored, report.replaced[0].stored_at_end) == (10, 0)
    schedule = DualResidualSchedule(model, 2)
    x = _pictures()
    for _ in range(3):
        reference = torch.autograd.grad(_by_equation(model, x).square().sum(), list(model.parameters()))
        assert_same(torch.autograd.grad(model(x).square().sum(), list(model.parameters())), reference, 1e-8)
        schedule.step()
    sequence = model.blocks[0].sequence
    assert {(block.alpha, block.beta) for block in sequence.blocks} == {(0.3, 0.7)}


def test_runs_of_blocks_between_others() -> None:
    parts = [
        ViTBlock(),
        ViTBlock(),
        nn.Linear(WIDTH, WIDTH),
        PostNorm(),
        PostScaled(),
        ViTBlock(),
        nn.Identity(),
    ]
    model = nn.Sequential(*parts).double()
    x = torch.randn(2, 6, WIDTH, dtype=torch.float64)
    original = copy.deepcopy(model)
    report = reversible(model, example={"input": x})
    assert [(stack.name, stack.blocks) for stack in report.replaced] == [("0", 2), ("4", 1), ("5", 1)]
    assert [name for name, _ in report.skipped] == ["3"]
    assert [type(child).__name__ for child in model] == [
        *("ReversibleStack", "Linear", "PostNorm", "ReversibleStack", "ReversibleStack", "Identity")
    ]
    assert list(dict(model.named_children())) == [str(place) for place in range(6)]
    _same_model(original, model, x)


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (PostNorm(), "norm2 gets neither what came before it nor the sum so far"),
        (Parallel(), "mlp gets neither what came before it nor the sum so far"),
        (Halved(), "norm2 gets neither"),
        (Windowed(), "attn gets neither"),
        (InTraining(), "in training it calls attn with other arguments"),
        (InPlace(), "what norm1 returns is changed before attn gets it"),
        (GPT2Block(cross=True), r"its branches do not use its crossattention\.inner\.qkv\.weight"),
        (nn.TransformerEncoderLayer(WIDTH, 2, norm_first=True), "dropout1 gets neither"),
        (nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()), "its output is not its input plus"),
        (nn.LSTM(WIDTH, WIDTH), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_only_looks_like_a_residual_block_stays(block: nn.Module, reason: str | None) -> None:
    model = nn.ModuleList([block])
    before = dict(model.named_modules())
    report = reversible(model)
    assert report.replaced == [] and dict(model.named_modules()) == before
    if reason is None:  # a layer without children is no candidate
        assert report.skipped == []
        return
    ((name, found),) = report.skipped
    assert name == "0"
    assert re.search(reason, found), found


def test_filters_hooks_and_what_is_reversible_already() -> None:
    model = ViT(4)
    model.blocks[1].register_forward_hook(lambda *_: None)
    report = reversible(model, only="blocks.[123]")
    assert dict(report.skipped) == {"blocks.0": "only does not match it", "blocks.1": "it has hooks"}
    assert [(stack.name, stack.blocks) for stack in report.replaced] == [("blocks.2", 2)]
    again = reversible(model, only=lambda name, module: name == "blocks.0")
    assert [stack.name for stack in again.replaced] == ["blocks.0"] and len(model.blocks) == 3
    assert reversible(nn.ModuleList([PostScaled()]), only=ViTBlock).replaced
    with pytest.raises(
        ValueError, match=r"only GPT2Block matches none of the model's 2 blocks in lists: blocks\.0"
    ):
        reversible(ViT(2), only=GPT2Block)
    with pytest.raises(TypeError, match="reversible: only must be a pattern"):
        reversible(model, only=3)  # type: ignore[arg-type]


def test_report_prints() -> None:
    model = nn.ModuleDict({"vit": ViT(24), "bert": nn.ModuleList([PostNorm()])})
    report = reversible(model)
    text = str(report)
    assert "vit.blocks.0" in text and "attn_mask, is_causal" in text and "bert.0" in text
    stack = report.replaced[0]
    assert stack.branches == stack.stored == 48 and 0 < stack.stored_at_end < 6


class Skips(nn.Module):
    """Reads its blocks by pairs, as a U-Net."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ViTBlock() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        first = [x]
        for block in self.blocks:
            first.append(block(first[-1]))
        return first[-1] + first[1]


class Indexed(Skips):
    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[3](self.blocks[0](x))


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (Skips, RuntimeError, "differs by .* does not run its blocks one after"),
        (Indexed, IndexError, "range"),
    ],
)
def test_a_model_that_reads_its_blocks_otherwise_is_left_as_it_was(
    kind: type[nn.Module], error: type[Exception], message: str
) -> None:
    model, x = kind(), torch.randn(2, 6, WIDTH)
    expected, names = model(x), list(model.state_dict())
    with pytest.raises(error, match=message):
        reversible(model, example=x)
    assert torch.equal(model(x), expected) and list(model.state_dict()) == names and model.training


class Cache:
    """Keys and values that a call adds to."""


def test_arguments_that_cannot_be_handed_on() -> None:
    model = GPT2(2)
    reversible(model)
    tokens = torch.randint(7, (1, 4))
    stack = model.h[0]
    x = torch.randn(1, 4, WIDTH)
    stack(x, None, None, None, False, False)
    with pytest.raises(TypeError, match="argument 'output_attentions' must be False, got bool"):
        model(tokens, output_attentions=True)
    with pytest.raises(TypeError, match="argument 'encoder_hidden_states' must be None, got Tensor"):
        stack(x, encoder_hidden_states=x)
    with pytest.raises(TypeError, match="argument 'layer_past' must be None, got Cache"):
        stack(x, Cache())
    with pytest.raises(RuntimeError, match=r"'use_cache' holds a Cache.*leave caches out while training"):
        model(tokens, use_cache=Cache())
    with torch.no_grad():
        model(tokens, use_cache=Cache())
    with pytest.raises(TypeError, match="multiple values"):
        stack(x, hidden_states=x)


def test_copies_and_state_dicts() -> None:
    model, x = ViT(3), torch.randn(2, 6, 5)
    frozen = {"blocks.1.mlp.fc1.weight", "blocks.2.norm1.bias"}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    kept = {id(p): p.requires_grad for p in model.parameters()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    reversible(model)
    assert {id(p): p.requires_grad for p in model.parameters()} == kept
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == set(kept)
    assert "blocks.0.sequence.blocks.3.f.mlp.fc1.weight" in model.state_dict()
    expected = model(x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    other = ViT(3)
    reversible(other)
    other.load_state_dict(model.state_dict())
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False), other):
        assert torch.equal(twin(x), expected)
        assert torch.equal(twin(x, torch.zeros(6, 6)), expected)


def test_own_transformer_of_the_harness_is_converted() -> None:
    """Names are nothing that it goes by."""
    from effkern.bench.model import AttentionMixer as Mixer
    from effkern.bench.model import ByteModel, Config, Parts, sdpa_causal

    config = Config(layers=3, width=16, context=8)
    model = ByteModel(config, Parts(lambda c: Mixer(c, sdpa_causal)))
    report = reversible(model, alpha=0.5, beta=0.5, example=torch.randint(256, (1, 8)))
    assert report.difference == 0.0 and report.replaced[0].branches == 6
    blocks = [module for module in model.modules() if isinstance(module, DualResidualBlock)]
    assert {(block.alpha, block.beta) for block in blocks} == {(0.5, 0.5)}
    with pytest.raises(ValueError, match="must be finite"):
        reversible(ViT(1), alpha=math.nan)


def test_names_are_public() -> None:
    assert effkern.convert.reversible is reversible
