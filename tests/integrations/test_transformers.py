"""attn_implementation="effkern" against "sdpa" in randomly initialised models: logits, gradients, tokens, masks."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import effkern
from effkern.integrations import transformers as integration
from effkern.integrations._transformers_mask import Visible
from effkern.masks import Document
from effkern.testing import assert_close_to_oracle

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
DTYPES = [torch.float32, torch.bfloat16]
VOCABULARY, WINDOW = 61, 6
SMALL = {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64}
DECODERS = ["llama", "mistral", "gpt2", "gemma3"]
MODELS = [*DECODERS, "bert", "vit"]


@pytest.fixture(autouse=True)
def _registered(request: pytest.FixtureRequest) -> None:
    if importlib.util.find_spec("transformers") is not None and "without" not in request.node.name:
        integration.register()


def make(name: str, implementation: str = "effkern", **changes: Any) -> Any:
    """A small model in evaluation mode; the same numbers for the same name."""
    import transformers as t

    decoder = {**SMALL, "vocab_size": VOCABULARY, "num_key_value_heads": 2, "max_position_embeddings": 64}
    configs: dict[str, Callable[[], tuple[Any, Any]]] = {
        "llama": lambda: (t.LlamaForCausalLM, t.LlamaConfig(**decoder, **changes)),
        "mistral": lambda: (
            t.MistralForCausalLM,
            t.MistralConfig(**decoder, sliding_window=WINDOW, **changes),
        ),
        "gemma3": lambda: (  # layers with and without a window
            t.Gemma3ForCausalLM,
            t.Gemma3TextConfig(
                **decoder,
                head_dim=12,
                sliding_window=WINDOW,
                layer_types=["sliding_attention", "full_attention"],
                **changes,
            ),
        ),
        "gemma2": lambda: (
            t.Gemma2ForCausalLM,
            t.Gemma2Config(
                **decoder, head_dim=12, sliding_window=WINDOW, attn_logit_softcapping=0.7, **changes
            ),
        ),
        "gpt2": lambda: (
            t.GPT2LMHeadModel,
            t.GPT2Config(n_embd=48, n_head=4, n_layer=2, n_positions=64, vocab_size=VOCABULARY, **changes),
        ),
        "bert": lambda: (t.BertForMaskedLM, t.BertConfig(**SMALL, vocab_size=VOCABULARY, **changes)),
        "vit": lambda: (
            t.ViTForImageClassification,
            t.ViTConfig(**SMALL, image_size=24, patch_size=4, num_labels=5, **changes),
        ),
    }
    kind, config = configs[name]()
    config._attn_implementation = implementation
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():  # the usual initialisation is so small that attention hardly matters
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def data(name: str, padding: str = "none", length: int = 17) -> dict[str, Any]:
    torch.manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 24, 24)}
    ids = torch.randint(1, VOCABULARY, (3, length))
    if padding == "none":
        return {"input_ids": ids}
    hidden = torch.tensor([0, 5, 9])[:, None]
    place = torch.arange(length)
    there = place >= hidden if padding == "left" else place < length - hidden
    return {"input_ids": ids, "attention_mask": there.long()}


def results(model: Any, dtype: torch.dtype, inputs: dict[str, Any]) -> list[Tensor]:
    """Logits and the gradient of every parameter; what padding computes does not count."""
    model = model.to(dtype)
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            inputs = {**inputs, name: value.to(dtype)}
    logits = model(**inputs).logits
    there = inputs.get("attention_mask")
    if there is not None and there.dim() == 2:
        logits = logits * there[:, :, None]
    torch.manual_seed(2)
    loss = (logits.double() * torch.randn(logits.shape)).sum()
    used = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [logits, *torch.autograd.grad(loss, used, materialize_grads=True, allow_unused=True)]


def compare(
    name: str, dtype: torch.dtype, inputs: dict[str, Any], other: str = "sdpa", **changes: Any
) -> None:
    oracle = results(make(name, other, **changes), torch.float64, inputs)
    baseline = results(make(name, other, **changes), dtype, inputs)
    effkern.backends.record("nothing")
    ours = results(make(name, **changes), dtype, inputs)
    assert effkern.backends.last().startswith("attention_backward:cpu/")
    for index, rows in enumerate(zip(ours, baseline, oracle, strict=True)):
        # Whole models: the baseline's largest error over few numbers scatters by more than the factor allows.
        assert_close_to_oracle(*rows, what=f"result {index} of {name}", factor=4.0, unit=16.0)


@needs_transformers
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients(name: str, dtype: torch.dtype) -> None:
    compare(name, dtype, data(name))


@needs_transformers
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", [*DECODERS, "bert"])
def test_padding(name: str, padding: str) -> None:
    compare(name, torch.float32, data(name, padding))


@needs_transformers
def test_softcap() -> None:
    """Against "eager", as "sdpa" has none; its rows that see nothing would be NaN in float64, hence no padding."""
    compare("gemma2", torch.float32, data("gemma2"), other="eager")


@needs_transformers
@pytest.mark.parametrize("name", DECODERS)
def test_packed_sequences(name: str) -> None:
    """Which transformers looks for where there is neither a mask nor a cache."""
    starts = torch.cat([torch.arange(5), torch.arange(12)]).expand(3, -1)
    compare(name, torch.float32, {**data(name), "position_ids": starts, "use_cache": False})


@needs_transformers
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_masks_of_the_user(kind: str) -> None:
    """Four dimensions: they go to the layers as they are."""
    seen = torch.rand(3, 1, 17, 17) < 0.6
    seen |= torch.eye(17, dtype=torch.bool)
    inputs = data("llama")
    inputs["attention_mask"] = seen if kind == "bool" else torch.zeros(seen.shape).masked_fill(~seen, -1e30)
    compare("llama", torch.float32, inputs)


@needs_transformers
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_generate(name: str, cache: str | None, padding: str) -> None:
    """Token for token; the static cache with hidden keys behind the last one, the window cache wrapping around."""
    inputs = data(name, padding, 11)
    options: dict[str, Any] = {
        "max_new_tokens": 15,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    if cache is not None:
        options.update(cache_implementation=cache, disable_compile=True)
    wanted = make(name, "sdpa").generate(**inputs, **options)
    effkern.backends.record("nothing")
    found = make(name).generate(**inputs, **options)
    # In the end the window has left the padding behind.
    decodes = cache is None and (padding == "none" or name == "mistral")
    assert effkern.backends.last().startswith("attention_decode:cpu/" if decodes else "attention:cpu/")
    assert torch.equal(found, wanted)
    assert len(found[:, 11:].unique()) >= 3  # not the same token all the time


@needs_transformers
def test_beams_and_chunks_of_a_prompt() -> None:
    """Caches that are reordered, and several queries behind a cache: few of them decode, many do not."""
    inputs = data("llama", length=24)
    options: dict[str, Any] = {"max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None}
    beams = {**options, "num_beams": 3}
    models = make("llama", "sdpa"), make("llama")
    wanted, found = (model.generate(**inputs, **beams) for model in models)
    assert torch.equal(found, wanted)
    for chunk, path in ((5, "attention_decode:cpu/"), (12, "attention:cpu/")):
        logits = []
        for model in models:
            cache = None
            with torch.no_grad():
                for ids in inputs["input_ids"].split(chunk, 1):
                    out = model(input_ids=ids, past_key_values=cache, use_cache=True)
                    cache = out.past_key_values
            logits.append(out.logits)
        assert effkern.backends.last().startswith(path)
        torch.testing.assert_close(*logits)


@needs_transformers
def test_every_mask_means_what_transformers_says() -> None:
    """Recognised or not: dense, it is the table of `sdpa_mask`; and the usual ones are recognised."""
    from transformers import masking_utils as m

    ids = torch.tensor([[0] * 4 + [1] * 8, [0] * 7 + [1] * 3 + [2] * 2])
    starts = torch.tensor([[0, 1, 2, 3, *range(8)], [*range(7), *range(3), *range(2)]])
    padding = torch.arange(12) >= torch.tensor([[0], [5]])
    window = m.sliding_window_causal_mask_function(WINDOW)
    both_ways = m.sliding_window_bidirectional_mask_function(3)
    chunks = m.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.int64))
    images = m.or_masks(m.causal_mask_function, m.blockwise_overlay(ids))
    causal, full, packed = (
        m.causal_mask_function,
        m.bidirectional_mask_function,
        m.packed_sequence_compatibility_function,
    )
    cases: list[tuple[Any, tuple[int, int, int, int], Tensor | None, bool]] = [
        (causal, (12, 12, 0, 0), None, True),
        (causal, (12, 12, 0, 0), padding, True),
        (causal, (3, 12, 9, 0), padding, True),
        (causal, (3, 12, 2, 0), padding[:, :5], False),  # a static cache
        (window, (12, 12, 0, 0), None, True),
        (window, (12, 12, 0, 0), padding, True),
        (window, (1, 6, 20, 15), torch.ones(2, 21, dtype=torch.bool), True),  # the cache of a window
        (window, (2, 7, 20, 15), torch.arange(22) > torch.tensor([[0], [17]]), True),
        (full, (12, 12, 0, 0), padding, True),
        (full, (3, 12, 0, 0), padding, True),  # another sequence's keys
        (both_ways, (12, 12, 0, 0), padding, True),
        (packed(causal, starts, ids), (12, 12, 0, 0), None, True),
        (packed(window, starts, ids), (12, 12, 0, 0), None, True),
        (chunks, (12, 12, 0, 0), padding, False),
        (images, (12, 12, 0, 0), padding, False),
        (m.and_masks(causal, lambda b, h, q, k: k != 3), (12, 12, 0, 0), None, False),
        (m.sliding_window_overlay(0), (12, 12, 0, 0), None, False),
    ]
    for function, sizes, attention_mask, known in cases:
        arguments = dict(zip(("q_length", "kv_length", "q_offset", "kv_offset"), sizes, strict=True))
        call = {"batch_size": 2, **arguments, "mask_function": function, "attention_mask": attention_mask}
        wanted = m.sdpa_mask(**call, allow_is_causal_skip=False)
        found = integration.build_mask(**call, allow_is_bidirectional_skip=True)
        assert isinstance(found, Visible) == known, function
        if isinstance(found, Visible):
            rows, columns = torch.arange(sizes[0])[:, None] + sizes[1] - sizes[0], torch.arange(sizes[1])
            seen = columns <= rows if found.causal else torch.ones(sizes[:2], dtype=torch.bool)
            mask = found.mask()
            found = seen if mask is None else seen & mask.to_dense(*sizes[:2])
        assert torch.equal(found.expand_as(wanted), wanted), function
    table = integration.build_mask(2, 12, 12, allow_is_causal_skip=False)
    assert isinstance(table, Tensor) and torch.equal(table, torch.ones(2, 1, 12, 12).tril().bool())


@needs_transformers
def test_windows_and_documents_arrive_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the kernels skip what they hide."""
    masks: list[Any] = []
    plain = integration.attention

    def watch(*args: Any, **named: Any) -> Any:
        masks.append((named["causal"], named["mask"]))
        return plain(*args, **named)

    monkeypatch.setattr(integration, "attention", watch)
    make("mistral")(**data("mistral"))
    assert [(causal, repr(mask)) for causal, mask in masks] == [
        (True, "SlidingWindow(left=5, right=None)")
    ] * 2
    masks.clear()
    make("llama")(**data("llama"))
    assert masks == [(True, None)] * 2
    masks.clear()
    packed = torch.cat([torch.arange(5), torch.arange(12)]).expand(3, -1)
    make("llama")(**data("llama"), position_ids=packed, use_cache=False)
    assert len(masks) == 2 and all(causal and isinstance(mask, Document) for causal, mask in masks)
    masks.clear()
    make("bert")(**data("bert", "right"))
    assert [(causal, repr(mask)) for causal, mask in masks] == [(False, "Dense(mask=(3, 1, 1, 17))")] * 2


@needs_transformers
def test_compiled() -> None:
    model, inputs = make("mistral"), data("mistral", "left")
    expected = model(**inputs).logits
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(**inputs).logits
    there = inputs["attention_mask"].bool()
    torch.testing.assert_close(compiled[there], expected[there])


@needs_transformers
def test_dropout_only_in_training() -> None:
    model = make("gpt2", attn_pdrop=0.3, resid_pdrop=0.0, embd_pdrop=0.0)
    inputs = data("gpt2")
    quiet = model(**inputs).logits
    assert torch.equal(quiet, model(**inputs).logits)
    model.train()
    torch.manual_seed(3)
    first = model(**inputs).logits
    torch.manual_seed(3)
    assert torch.equal(first, model(**inputs).logits)
    assert not torch.equal(first, model(**inputs).logits)
    assert not torch.equal(first, quiet)


@needs_transformers
def test_model_refuses_attentions() -> None:
    with pytest.raises(NotImplementedError, match="output_attentions is not supported; use 'eager'"):
        make("bert")(**data("bert"), output_attentions=True)


def layer_inputs(queries: int = 5, keys: int = 9) -> tuple[Tensor, ...]:
    return tuple(torch.randn(2, h, s, 8) for h, s in ((4, queries), (2, keys), (2, keys)))


class Layer(torch.nn.Module):
    is_causal = False


def test_bias_sinks_softcap_and_learned_queries() -> None:
    """What few models have: passed on to the op, in the layout of transformers."""
    q, k, v = layer_inputs()
    bias, sinks, there = torch.randn(1, 4, 5, 9), torch.randn(4), torch.rand(2, 1, 5, 9) < 0.7
    out, weights = integration.attention_forward(
        *(Layer(), q[:1], k, v, there), scaling=0.2, position_bias=bias, softcap=3.0, s_aux=sinks
    )
    expected = effkern.attention(
        *(q[:1].expand(2, -1, -1, -1), k, v),
        scale=0.2,
        bias=bias,
        softcap=3.0,
        sink_logits=sinks,
        mask=effkern.masks.Dense(there),
    )
    assert weights is None and out.is_contiguous() and torch.equal(out, expected.transpose(1, 2))
    additive = torch.randn(2, 1, 5, 9, dtype=torch.float64)
    both, _ = integration.attention_forward(Layer(), q, k, v, additive, position_bias=bias)
    assert torch.equal(both.transpose(1, 2), effkern.attention(q, k, v, bias=additive.float() + bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_additive_masks_keep_their_precision(dtype: torch.dtype) -> None:
    """A mask in float32 beside 16-bit queries, whose numbers are far larger than what tells keys apart."""
    q, k, v = (torch.randn(1, 2, n, 16).to(dtype) for n in (5, 200, 200))
    mask = (-0.3 * (199.0 - torch.arange(200)) + 1000.3).expand(1, 1, 5, 200)
    for table in (mask, mask.double()):
        out, _ = integration.attention_forward(torch.nn.Identity(), q, k, v, table)
        exact = effkern.attention(q.double(), k.double(), v.double(), bias=mask.double())
        torch.testing.assert_close(
            out.transpose(1, 2).double(), exact, rtol=0, atol=8 * torch.finfo(dtype).eps
        )


def test_without_a_mask_the_layer_decides() -> None:
    q, k, v = layer_inputs()
    causal = effkern.attention(q, k, v, causal=True, align="top_left").transpose(1, 2)
    full = effkern.attention(q, k, v).transpose(1, 2)
    run = integration.attention_forward
    assert torch.equal(run(Layer(), q, k, v, None)[0], full)
    assert torch.equal(run(Layer(), q, k, v, None, is_causal=True)[0], causal)
    assert torch.equal(run(torch.nn.Identity(), q, k, v, None)[0], causal)
    one = run(torch.nn.Identity(), q[:, :, :1], k, v, None)[0]
    torch.testing.assert_close(one, full[:, :1])


def test_decoding_keeps_gradients_and_what_decoding_lacks() -> None:
    """A gradient, dropout, padding: each goes the long way."""
    q, k, v = layer_inputs(queries=2)
    alone, padded = (
        Visible(True, None, None, 2, 9),
        Visible(True, None, effkern.masks.Dense(torch.rand(2, 1, 1, 9) < 0.8), 2, 9),
    )
    run = integration.attention_forward
    expected = effkern.attention(q, k, v, causal=True).transpose(1, 2)
    torch.testing.assert_close(run(Layer(), q, k, v, alone)[0], expected)
    assert effkern.backends.last().startswith("attention_decode:cpu/")
    leaf = q.clone().requires_grad_()
    (grad,) = torch.autograd.grad(run(Layer(), leaf, k, v, alone)[0].sum(), leaf)
    assert grad.isfinite().all() and effkern.backends.last().startswith("attention_backward:cpu/")
    run(Layer(), q, k, v, alone, dropout=0.5)
    assert effkern.backends.last().startswith("attention:cpu/")
    out, _ = run(Layer(), q, k, v, padded)
    assert torch.equal(out.transpose(1, 2), effkern.attention(q, k, v, causal=True, mask=padded.others))


def test_masks_of_other_sizes_are_refused() -> None:
    """As of a layer whose cache is longer than that of the layer the mask was made for."""
    q, k, v = layer_inputs(queries=2)
    window = effkern.masks.SlidingWindow(3, None)
    for visible in (Visible(True, None, None, 2, 8), Visible(False, window, None, 1, 9)):
        with pytest.raises(ValueError, match="the layer has 2 and 9"):
            integration.attention_forward(Layer(), q, k, v, visible)
    out, _ = integration.attention_forward(Layer(), q, k, v, Visible(False, None, None, 5, 8))
    assert torch.equal(out.transpose(1, 2), effkern.attention(q, k, v))


def test_refusals() -> None:
    q, k, v = layer_inputs()
    for name, value in (("output_attentions", True), ("head_mask", torch.ones(4)), ("cache", object())):
        with pytest.raises(NotImplementedError, match=f"{name} is not supported"):
            integration.attention_forward(Layer(), q, k, v, None, **{name: value})
    out, _ = integration.attention_forward(Layer(), q, k, v, None, output_attentions=False, head_mask=None)
    assert out.shape == (2, 5, 4, 8)
    wrong: list[tuple[Any, str]] = [
        (torch.ones(2, 9), r"four dimensions, got shape \(2, 9\)"),
        ("causal", "got str"),
        (torch.ones(2, 1, 5, 9, dtype=torch.int64), "must be bool or additive, got torch.int64"),
    ]
    for mask, message in wrong:
        with pytest.raises(TypeError, match=message):
            integration.attention_forward(Layer(), q, k, v, mask)


def test_register_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'effkern\[integrations\]'"):
        integration.register()
