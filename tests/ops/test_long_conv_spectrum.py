"""Prepared spectra, inputs given position by position, and the module with a learned kernel."""

from __future__ import annotations

import copy

import pytest
import torch
from long_conv_oracle import Inputs, random_inputs, results
from torch import Tensor

import effkern
from effkern import _host
from effkern.nn import LongConv


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_one_spectrum_serves_every_length_up_to_its_own(causal: bool, dtype: torch.dtype, isa: str) -> None:
    k = random_inputs(1, 3, 64, 50, dtype, causal=causal).k
    spectrum = effkern.long_conv_prepare(k, 5000, causal=causal)
    for length in (50, 51, 700, 5000):
        u = torch.randn(2, 3, length).to(dtype)
        out = effkern.long_conv(u, spectrum, causal=causal)
        expected = effkern.long_conv(u.double(), k.double(), causal=causal)
        limit = 1e-5 if dtype != torch.bfloat16 else 2e-2
        torch.testing.assert_close(out.double(), expected, rtol=limit, atol=limit)
    with pytest.raises(RuntimeError, match="serves up to 5000 positions, state included, got 5001"):
        effkern.long_conv(torch.randn(1, 3, 5001).to(dtype), spectrum, causal=causal)


def test_spectrum_of_the_same_length_gives_the_same_bits(isa: str) -> None:
    for length, taps in ((100, 100), (3000, 20), (20_000, 20_000)):
        inputs = random_inputs(2, 2, length, taps, skip=True)
        plain = results(effkern.long_conv, inputs)
        for name, value in results(effkern.long_conv, inputs, prepared=length).items():
            assert torch.equal(value, plain[name]), name


@pytest.mark.parametrize("backend", [None, "reference"])
def test_gradients_go_to_the_kernel(backend: str | None) -> None:
    """Also when it was prepared without gradients, and as often as one likes."""
    inputs = random_inputs(2, 3, 40, 30)
    k = inputs.k.requires_grad_()
    with torch.no_grad():
        spectrum = effkern.long_conv_prepare(k, 40)
    for _ in range(2):
        (found,) = torch.autograd.grad(effkern.long_conv(inputs.u, spectrum, backend=backend).cos().sum(), k)
    (wanted,) = torch.autograd.grad(effkern.long_conv(inputs.u, k, backend=backend).cos().sum(), k)
    torch.testing.assert_close(found, wanted)


def test_a_spectrum_knows_when_it_is_out_of_date() -> None:
    u, k = torch.randn(1, 3, 16), torch.randn(3, 16)
    spectrum = effkern.long_conv_prepare(k, 16)
    with pytest.raises(
        RuntimeError, match=r"k must have shape \(3, 2, Lk\) with causal=False, got \(3, 16\)"
    ):
        effkern.long_conv(u, effkern.long_conv_prepare(k, 16), causal=False)
    k.mul_(2)
    for backend in (None, "reference"):
        with pytest.raises(RuntimeError, match="k was changed in place after long_conv_prepare"):
            effkern.long_conv(u, spectrum, backend=backend)
    again = effkern.long_conv_prepare(k, 16)
    assert torch.equal(effkern.long_conv(u, again), effkern.long_conv(u, k))
    with pytest.raises(AttributeError):
        again.length = 17  # type: ignore[misc]


def test_a_spectrum_knows_its_numbers_and_takes_its_kernel_along() -> None:
    u, k = torch.randn(1, 3, 16), torch.randn(3, 16)
    spectrum = effkern.long_conv_prepare(k, 16)
    twin = copy.deepcopy(spectrum)
    assert twin.k is not k and twin.data is not spectrum.data
    k.data = torch.randn(3, 16)  # the same tensor, other memory
    with pytest.raises(RuntimeError, match="k was changed in place after long_conv_prepare"):
        effkern.long_conv(u, spectrum)
    with pytest.raises(RuntimeError, match="k was changed in place after long_conv_prepare"):
        effkern.long_conv(u, copy.deepcopy(spectrum))
    assert torch.equal(effkern.long_conv(u, twin), effkern.long_conv(u, twin.k))
    twin.k.add_(1)
    with pytest.raises(RuntimeError, match="k was changed in place after long_conv_prepare"):
        effkern.long_conv(u, twin)


def test_the_dispatcher_op_tells_spectra_apart(isa: str) -> None:
    op = torch.ops.effkern
    u, k = torch.randn(2, 3, 40), torch.randn(3, 40)
    both = torch.stack([k, k], 1)
    for foreign in (
        op.long_conv_spectrum(both, 40, False),
        op.long_conv_spectrum(k[:, :33].contiguous(), 40, True),
    ):
        with pytest.raises(
            RuntimeError, match="prepared for another kernel: other taps, or another value of causal"
        ):
            op.long_conv(u, k, foreign)


def test_another_cpu_level_transforms_the_kernel_again() -> None:
    u, k = torch.randn(1, 3, 500), torch.randn(3, 500)
    levels = _host.isa_levels()
    try:
        for made in levels:
            _host.isa_force(made)
            spectrum = effkern.long_conv_prepare(k, 500)
            for used in levels:
                _host.isa_force(used)
                assert torch.equal(effkern.long_conv(u, spectrum), effkern.long_conv(u, k))
    finally:
        _host.isa_force(None)


def test_spectrum_in_compiled_code_and_in_inference_mode() -> None:
    u, k = torch.randn(2, 3, 60), torch.randn(3, 60, requires_grad=True)
    expected = effkern.long_conv(u, k)
    (slope,) = torch.autograd.grad(expected.cos().sum(), k)
    spectrum = effkern.long_conv_prepare(k, 60)

    def inside(u: Tensor, k: Tensor) -> Tensor:
        return effkern.long_conv(u, effkern.long_conv_prepare(k, 60))

    for call in (lambda u, k: effkern.long_conv(u, spectrum), inside):
        torch._dynamo.reset()
        out = torch.compile(call, fullgraph=True, backend="aot_eager")(u, k)
        assert torch.equal(out, expected)
        assert torch.equal(torch.autograd.grad(out.cos().sum(), k)[0], slope)
    torch._dynamo.reset()
    compiled = torch.compile(lambda u: effkern.long_conv(u, spectrum), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(u), expected)
        k.mul_(2)  # seen where it trains
    assert torch.equal(compiled(u), effkern.long_conv(u, k))
    k = k.detach()
    expected, spectrum = effkern.long_conv(u, k), effkern.long_conv_prepare(k, 60)
    with torch.inference_mode():
        assert torch.equal(effkern.long_conv(u, spectrum), expected)
        fresh = k.clone()
        assert torch.equal(effkern.long_conv(u, effkern.long_conv_prepare(fresh, 60)), expected)


def test_what_cannot_be_prepared() -> None:
    k = torch.randn(3, 16)
    for args, error, match in (
        ((k, -1), ValueError, "length must be between 1 and 17179869184, got -1"),
        ((k, 0), ValueError, "length must be between 1 and 17179869184, got 0"),
        ((k, 2**40), ValueError, "length must be between 1 and 17179869184, got 1099511627776"),
        ((k, 16.0), TypeError, "length must be an integer, got float"),
        ((k, 15), RuntimeError, "k has 16 taps, length is only 15"),
        ((k[None], 16), RuntimeError, r"k must have shape \(H, Lk\) with causal=True, got \(1, 3, 16\)"),
        ((k.long(), 16), RuntimeError, "k must be float32, bfloat16 or float16, got int64"),
        (([1.0], 16), TypeError, "k must be a tensor, got list"),
    ):
        with pytest.raises(error, match=match):
            effkern.long_conv_prepare(*args)  # type: ignore[arg-type]


@pytest.mark.parametrize("prepared", [False, True])
def test_position_by_position(prepared: bool, isa: str) -> None:
    """A prompt in one call, then one position at a time, beyond the reach of the first taps."""
    inputs = random_inputs(2, 3, 90, 40, skip=True, gates=True)
    expected = effkern.long_conv(**inputs.given)
    k = effkern.long_conv_prepare(inputs.k, 40 + 39) if prepared else inputs.k
    rows = inputs.u, inputs.pre_gate, inputs.post_gate
    state, outs = None, []
    for begin, end in [(0, 25), *((t, t + 1) for t in range(25, 90))]:
        u, pre_gate, post_gate = (t[..., begin:end] for t in rows)  # type: ignore[index]
        out, state = effkern.long_conv(
            u, k, skip=inputs.skip, pre_gate=pre_gate, post_gate=post_gate, state=state, return_state=True
        )
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 2), expected, rtol=1e-4, atol=1e-5)
    gated = inputs.pre_gate * inputs.u  # type: ignore[operator]
    assert torch.equal(state, gated[..., -39:])


@pytest.mark.parametrize("length", [0, 3, 11, 12, 30])
def test_state_is_the_last_inputs(length: int) -> None:
    inputs = random_inputs(2, 3, length, 12)
    before = torch.randn(2, 3, 11)
    for state in (None, before):
        _, found = effkern.long_conv(inputs.u, inputs.k, state=state, return_state=True)
        start = torch.zeros(2, 3, 11) if state is None else state
        assert torch.equal(found, torch.cat([start, inputs.u], 2)[..., -11:])
        assert found.is_contiguous() and found.data_ptr() not in (inputs.u.data_ptr(), before.data_ptr())


def test_a_single_tap_has_an_empty_state(isa: str) -> None:
    u, k = torch.randn(2, 3, 5), torch.randn(3, 1)
    out, state = effkern.long_conv(u, k, state=u[..., :0], pre_gate=u, return_state=True)
    torch.testing.assert_close(out, k * u * u)
    assert state.shape == (2, 3, 0)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_module(bidirectional: bool) -> None:
    layer = LongConv(6, 128, bidirectional=bidirectional)
    u = torch.randn(3, 6, 128, requires_grad=True)
    out = layer(u)
    expected = effkern.long_conv(u, layer.kernel, skip=layer.skip, causal=not bidirectional)
    assert torch.equal(out, expected)
    out.square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in (u, *layer.parameters()))  # type: ignore[union-attr]
    shorter = layer(u[..., :20])
    cut = effkern.long_conv(u[..., :20], layer.kernel[..., :20], skip=layer.skip, causal=not bidirectional)
    assert torch.equal(shorter, cut)
    assert layer(torch.randn(1, 6, 300)).shape == (1, 6, 300)
    with pytest.raises(RuntimeError, match=r"u must have shape \(B, H, L\), got \(6, 128\)"):
        layer(u[0])
    with pytest.raises(RuntimeError, match=r"k must have shape \(5, "):
        layer(torch.randn(1, 5, 128))


def test_module_in_parts_and_without_a_skip() -> None:
    layer = LongConv(4, 50, skip=False, dtype=torch.float64)
    assert layer.skip is None and [name for name, _ in layer.named_parameters()] == ["kernel"]
    inputs = Inputs(
        torch.randn(2, 4, 120).double(), layer.kernel.detach(), pre_gate=torch.rand(2, 4, 120).double()
    )
    whole = layer(inputs.u, pre_gate=inputs.pre_gate)
    first, state = layer(inputs.u[..., :30], pre_gate=inputs.pre_gate[..., :30], return_state=True)  # type: ignore[index]
    second = layer(inputs.u[..., 30:], pre_gate=inputs.pre_gate[..., 30:], state=state)  # type: ignore[index]
    torch.testing.assert_close(torch.cat([first, second], 2), whole)


def test_fresh_modules_keep_the_variance() -> None:
    for bidirectional in (False, True):
        layer = LongConv(64, 512, bidirectional=bidirectional, skip=False)
        out = layer(torch.randn(2, 64, 4096))[..., 512:-512]
        assert 0.9 < out.var().item() < 1.1
    with pytest.raises(ValueError, match="channels and length must be at least 1, got 4 and 0"):
        LongConv(4, 0)
    assert repr(LongConv(4, 8)) == "LongConv(channels=4, length=8, bidirectional=False, skip=True)"
