"""ButterflyConv, HyenaOperator and H3 against plain compositions in float64: outputs, gradients, causality, dtypes."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.torch_version import TorchVersion

import effkern
from effkern.nn import H3, ButterflyConv, HyenaFilter, HyenaOperator
from effkern.testing import assert_close_to_oracle, errors


def causal_conv(x: Tensor, k: Tensor) -> Tensor:
    """x (B, H, L) with the taps k (H, Lk), one by one."""
    return F.conv1d(F.pad(x, (k.shape[1] - 1, 0)), k.flip(1)[:, None], groups=k.shape[0])


def plain_filter(m: HyenaFilter, length: int) -> Tensor:
    """Position by position, in the dtype of the parameters."""
    dtype = m.freq.dtype
    t = torch.arange(length, dtype=torch.float64)
    bands = torch.linspace(1e-4, m.bands - 1, m.bands, dtype=torch.float64)
    waves = torch.exp(-2j * math.pi * bands * t[:, None] / m.l_max)
    x = torch.cat([t[:, None] / (m.l_max - 1), waves.real, waves.imag], 1).to(dtype)
    for layer in m.layers[:-1]:
        x = torch.sin(m.freq * layer(x))
    slow, fast = (-math.log(0.01) / pct for pct in (1.5, 0.3))
    rates = torch.linspace(slow, fast, m.channels, dtype=torch.float64)
    window = torch.exp(-t[:, None] * rates / (m.l_max - 1)) + m.shift
    return (m.layers[-1](x) * window.to(dtype)).T


def plain_hyena(m: HyenaOperator, u: Tensor) -> Tensor:
    x = causal_conv(m.in_proj(u).transpose(1, 2), m.short_filter.weight[:, 0].flip(1))
    parts = (x + m.short_filter.bias[:, None]).chunk(m.order + 1, 1)  # type: ignore[index]
    kernels = plain_filter(m.filter, u.shape[1])
    v = parts[-1]
    for i in range(m.order - 1):
        v = v * parts[m.order - 1 - i]
        kernel = kernels[i * m.d_model : (i + 1) * m.d_model]
        v = causal_conv(v, kernel) + m.skip[i][:, None] * v
    return m.out_proj((v * parts[0]).transpose(1, 2))


def plain_h3(m: H3, u: Tensor) -> Tensor:
    """Both state spaces step by step; states and heads in full."""
    heads, d = m.d_model // m.head_dim, m.head_dim
    q, k, v = m.in_proj(u).unflatten(2, (3, heads, d)).unbind(2)  # (B, L, heads, d)
    a = torch.complex(-m.log_a_real.exp(), m.a_imag)
    step = (m.log_dt.exp()[:, None] * a).exp()
    gain = torch.view_as_complex(m.c) * (step - 1) / a  # (heads, N / 2)
    taps = m.shift.weight[:, 0].flip(1).view(heads, d, -1)
    past = [torch.zeros_like(k[:, 0])] * m.d_state
    state = torch.zeros(u.shape[0], heads, d, d, m.d_state // 2, dtype=gain.dtype)
    rows = []
    for t in range(u.shape[1]):
        past = [k[:, t], *past[:-1]]
        shifted = sum(taps[..., i] * past[i] for i in range(m.d_state))
        product = shifted[..., :, None] * v[:, t, :, None, :]  # (B, heads, d of k, d of v)
        state = state * step[:, None, None] + product[..., None]
        y = 2 * (state * gain[:, None, None]).sum(-1).real + m.skip[:, None, None] * product
        rows.append((q[:, t, :, :, None] * y).sum(-2).flatten(1))
    return m.out_proj(torch.stack(rows, 1))


def plain_butterfly(m: ButterflyConv, u: Tensor) -> Tensor:
    assert m.skip is not None
    return causal_conv(u, m.kernel[:, : u.shape[2]]) + m.skip[:, None] * u


Plain = Callable[[nn.Module, Tensor], Tensor]

SHAPE = (2, 37, 12)  # of u for the layers; ButterflyConv has channels first
MODULES: dict[str, tuple[Callable[[], nn.Module], Plain]] = {
    "hyena": (lambda: HyenaOperator(12, 50, filter_order=16), plain_hyena),
    "hyena of order 4": (
        lambda: HyenaOperator(
            12, 37, 4, 8, short_filter_order=5, emb_dim=7, num_inner_mlps=1, w=5.0, shift=0.05
        ),
        plain_hyena,
    ),
    "h3": (lambda: H3(12, d_state=16), plain_h3),
    "h3, heads of 3": (lambda: H3(12, d_state=6, head_dim=3), plain_h3),
    "butterfly": (lambda: ButterflyConv(37, 40), plain_butterfly),
    "shared butterfly": (lambda: ButterflyConv(37, 12, shared=True, separate=True), plain_butterfly),
}  # type: ignore[dict-item]
every = pytest.mark.parametrize("name", MODULES)
every_layer = pytest.mark.parametrize("name", [name for name in MODULES if "butterfly" not in name])


def make(name: str) -> tuple[nn.Module, Plain]:
    build, plain = MODULES[name]
    return build(), plain


def make_double(name: str) -> tuple[nn.Module, Plain]:
    """Fresh in float64: blocks of a transform made in float32 are not quite those of a DFT."""
    module, plain = make(name)
    module.double().reset_parameters()  # type: ignore[operator]
    return module, plain


def results(call: Callable[[Tensor], Tensor], module: nn.Module, u: Tensor) -> dict[str, Tensor]:
    """The output and the gradient of every parameter that it depends on."""
    u = u.detach().requires_grad_()
    out = call(u)
    named = {"u": u, **dict(module.named_parameters())}
    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = torch.autograd.grad(out, list(named.values()), seed.to(out.dtype), allow_unused=True)
    found = {"out": out.detach()}
    return found | {n: g for n, g in zip(named, grads, strict=True) if g is not None}


@every
def test_in_float64_it_is_the_plain_composition(name: str) -> None:
    module, plain = make_double(name)
    u = torch.randn(SHAPE, dtype=torch.float64)
    ours, expected = results(module, module, u), results(lambda x: plain(module, x), module, u)
    assert set(ours) == {"out", "u", *dict(module.named_parameters())}
    for key, wanted in expected.items():
        scale = max(1.0, wanted.abs().max().item())
        torch.testing.assert_close(
            ours[key], wanted, rtol=1e-9, atol=1e-11 * scale, msg=lambda m, k=key: f"{k}: {m}"
        )


@every
def test_float32_kernels_against_the_oracle(name: str) -> None:
    module, plain = make(name)
    wide = copy.deepcopy(module).double()
    u = torch.randn(SHAPE)
    ours, composed = results(module, module, u), results(lambda x: plain(module, x), module, u)
    exact = results(lambda x: plain(wide, x), wide, u.double())
    for key, wanted in exact.items():
        assert_close_to_oracle(
            ours[key], composed[key], wanted, key, unit=16 * max(1.0, wanted.abs().max().item())
        )


@every_layer
def test_the_kernels_run_and_a_backend_can_be_forced(name: str) -> None:
    module, _ = make(name)
    module(torch.randn(SHAPE))
    assert effkern.backends.last().startswith("long_conv:cpu/")
    for part in module.modules():
        if hasattr(part, "backend"):
            part.backend = "reference"
    module(torch.randn(SHAPE))
    assert effkern.backends.last() == "long_conv:reference"


@every
@pytest.mark.parametrize("cut", [1, 5, 11])
def test_the_past_does_not_see_the_future(name: str, cut: int) -> None:
    module, _ = make_double(name)
    axis = 2 if "butterfly" in name else 1
    u = torch.randn(SHAPE, dtype=torch.float64)
    other = u.clone()
    other.narrow(axis, cut, u.shape[axis] - cut).normal_()
    first, second = module(u), module(other)
    length = u.shape[axis]
    torch.testing.assert_close(first.narrow(axis, 0, cut), second.narrow(axis, 0, cut), rtol=0, atol=1e-12)
    assert not torch.allclose(first.narrow(axis, cut, length - cut), second.narrow(axis, cut, length - cut))


@every
def test_shorter_inputs_have_the_first_outputs(name: str) -> None:
    module, _ = make_double(name)
    axis = 2 if "butterfly" in name else 1
    u = torch.randn(SHAPE, dtype=torch.float64)
    whole = module(u)
    for length in (1, 2, 7, 12):
        torch.testing.assert_close(module(u.narrow(axis, 0, length)), whole.narrow(axis, 0, length))
    empty = module(u.narrow(axis, 0, 0))
    assert empty.shape == u.narrow(axis, 0, 0).shape
    assert module(u[:0]).shape == u[:0].shape


@every
def test_state_dict_round_trip(name: str) -> None:
    module, _ = make(name)
    other, _ = make(name)
    u = torch.randn(SHAPE)
    assert not torch.equal(other(u), module(u))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(u), module(u))
    assert set(module.state_dict()) == set(
        dict(module.named_parameters())
    )  # nothing else to move or to round


@every
def test_reset_parameters_starts_afresh(name: str) -> None:
    torch.manual_seed(3)
    module, _ = make(name)
    before = copy.deepcopy(module.state_dict())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(torch.nan)
    module.reset_parameters()  # type: ignore[operator]
    for key, value in module.state_dict().items():
        assert value.isfinite().all(), key
        assert (
            abs(value.std(correction=0) - before[key].std(correction=0))
            < 0.6 * before[key].std(correction=0) + 0.3
        )


@every
def test_bfloat16_parameters_and_inputs(name: str) -> None:
    module, plain = make(name)
    module.bfloat16()
    u = torch.randn(SHAPE).bfloat16()
    wide = copy.deepcopy(module).double()
    ours, exact = results(module, module, u), results(lambda x: plain(wide, x), wide, u.double())
    assert ours["out"].dtype == torch.bfloat16
    if name == "butterfly" or name == "shared butterfly":  # rounded blocks are no longer those of the DFT
        assert errors(ours["out"], exact["out"]).relative_l2 < 0.05
        return
    assert errors(ours["out"], exact["out"]).relative_l2 < 0.02
    for key, wanted in exact.items():
        assert errors(ours[key], wanted, key).relative_l2 < 0.04, key


@every_layer
def test_autocast(name: str) -> None:
    module, plain = make(name)
    wide = copy.deepcopy(module).double()
    u = torch.randn(SHAPE)
    with torch.autocast("cpu", torch.bfloat16):
        ours = results(module, module, u)
    exact = results(lambda x: plain(wide, x), wide, u.double())
    assert ours["out"].dtype == torch.bfloat16
    for key, wanted in exact.items():
        assert errors(ours[key], wanted, key).relative_l2 < 0.05, key


@every
def test_compiles_as_one_graph(name: str) -> None:
    module, _ = make(name)
    u = torch.randn(SHAPE)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    ours, expected = results(compiled, module, u), results(module, module, u)
    for key, wanted in expected.items():
        torch.testing.assert_close(ours[key], wanted, rtol=1e-4, atol=1e-4)


@every_layer
def test_exported_for_any_length(name: str) -> None:
    if "heads" in name and TorchVersion(torch.__version__) < (2, 13):
        pytest.xfail("torch 2.11 takes min(L, 3 L) == L, in its own look at strides, for a bound on lengths")
    module, _ = make(name)
    module.eval()
    lengths = torch.export.Dim(
        "length", min=2, max=36
    )  # below what filters reach to, or torch's slices object
    program = torch.export.export(module, (torch.randn(2, 20, 12),), dynamic_shapes=({1: lengths},))
    for length in (2, 17, 36):
        u = torch.randn(2, length, 12)
        torch.testing.assert_close(program.module()(u), module(u), rtol=1e-4, atol=1e-4)


def test_hyena_dropout_is_for_training() -> None:
    module = HyenaOperator(12, 50, dropout=0.5)
    u = torch.randn(SHAPE)
    assert not torch.equal(module(u), module(u))
    module.eval()
    torch.testing.assert_close(module(u), plain_hyena(module, u), rtol=1e-4, atol=1e-5)


def test_hyena_filters_decay_to_their_target() -> None:
    m = HyenaFilter(4, 1000, 8, fast_decay_pct=0.25, slow_decay_pct=0.5, target=0.1)
    with torch.no_grad():
        m.freq.zero_()  # the network gives nothing but zeros and its kernel nothing but its window
        m.layers[-1].weight.fill_(1.0)
        for layer in m.layers[:-1]:
            layer.bias.fill_(1.0)  # type: ignore[operator]
        assert not m(1000).any()
        m.freq.fill_(math.pi / 2)
        for layer in m.layers[:-1]:
            layer.weight.zero_()  # type: ignore[operator]
    kernel = m(1000)
    torch.testing.assert_close(kernel[:, 0], torch.full((4,), 8.0))
    torch.testing.assert_close(
        kernel[0], 8.0 * 0.1 ** (torch.arange(1000) / (0.5 * 999)), rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(
        kernel[3], 8.0 * 0.1 ** (torch.arange(1000) / (0.25 * 999)), rtol=1e-4, atol=1e-6
    )


def test_learned_blocks_are_those_of_the_op() -> None:
    module = ButterflyConv(3, 40, separate=True, noise=0.1)
    u, gate = torch.randn(2, 3, 25), torch.randn(2, 3, 25)

    def blocks(parts: nn.ParameterDict) -> dict[int, Tensor]:
        return {int(n): torch.complex(*part.detach().unbind(-1)) for n, part in parts.items()}

    assert module.kernel_factors is not None
    assert {n: tuple(p.shape) for n, p in module.factors.items()} == {"4": (3, 4, 4, 2), "16": (3, 16, 16, 2)}
    pair = blocks(module.factors), blocks(module.kernel_factors)
    assert not torch.equal(pair[0][16], pair[1][16])
    expected = effkern.butterfly_conv(
        *(u, module.kernel, pair), skip=module.skip, pre_gate=gate, post_gate=gate.cos(), length=40
    )
    assert torch.equal(module(u, pre_gate=gate, post_gate=gate.cos()), expected)
    assert not torch.allclose(expected, gate.cos() * plain_butterfly(module, gate * u), atol=1e-2)


def test_learned_blocks_learn() -> None:
    """A transform that has been disturbed finds back to a convolution that it is shown."""
    torch.manual_seed(5)
    module, target = ButterflyConv(2, 16, noise=0.3), ButterflyConv(2, 16)
    with torch.no_grad():
        module.kernel.copy_(target.kernel)
        module.skip.copy_(target.skip)  # type: ignore[union-attr, arg-type]
    optimizer = torch.optim.Adam(module.factors.parameters(), lr=0.02)
    losses = []
    for _ in range(150):
        u = torch.randn(16, 2, 16)
        loss = (module(u) - target(u).detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: HyenaOperator(0, 8), "d_model must be at least 1 and order at least 2, got 0 and 2"),
        (lambda: HyenaOperator(8, 8, 1), "order at least 2, got 8 and 1"),
        (lambda: HyenaOperator(8, 8, dropout=1.0), "dropout must be in [0, 1), got 1.0"),
        (lambda: HyenaOperator(8, 0), "HyenaFilter: channels, l_max and order must be at least 1"),
        (lambda: HyenaOperator(8, 8, emb_dim=4), "emb_dim must be odd and at least 3, got 4"),
        (lambda: HyenaFilter(8, 8, target=1.0), "target between 0 and 1, got 0.3, 1.5 and 1.0"),
        (
            lambda: HyenaOperator(8, 8, short_filter_order=0),
            "ShortConv: channels must be at least 1 and taps",
        ),
        (lambda: H3(8, head_dim=3), "H3: head_dim 3 does not divide d_model 8"),
        (lambda: H3(8, 3), "d_state must be even and between 2 and 256, got 3"),
        (lambda: H3(8, 300), "d_state must be even and between 2 and 256, got 300"),
        (lambda: H3(8, dt_min=0.2), "expected 0 < dt_min <= dt_max, got 0.2 and 0.1"),
        (lambda: ButterflyConv(0, 8), "channels and length must be at least 1, got 0 and 8"),
    ],
)
def test_constructors_say_what_is_wrong(build: Callable[[], nn.Module], match: str) -> None:
    with pytest.raises(ValueError, match=re.escape(match)):
        build()


@pytest.mark.parametrize(
    ("module", "shape", "match"),
    [
        (HyenaOperator(8, 10), (2, 11, 8), "u must have shape (B, L, 8) with L at most 10, got (2, 11, 8)"),
        (HyenaOperator(8, 10), (10, 8), "got (10, 8)"),
        (H3(8), (2, 10, 7), "H3: u must have shape (B, L, 8), got (2, 10, 7)"),
        (ButterflyConv(3, 8), (2, 3, 9), "length must be at least u's 9 positions, got 8"),
    ],
)
def test_inputs_say_what_is_wrong(module: nn.Module, shape: tuple[int, ...], match: str) -> None:
    with pytest.raises((RuntimeError, ValueError), match=re.escape(match)):
        module(torch.randn(shape))
