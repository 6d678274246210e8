"""smooth_kernel and vandermonde_kernel against their definitions, in float64 and far out."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import effkern
from effkern.ops.long_conv_kernels import vandermonde_flops
from effkern.reference import long_conv_kernels as reference
from effkern.testing import errors

FUZZ = settings(max_examples=60, deadline=None, derandomize=True)
HALVES = (torch.bfloat16, torch.float16)


def smooth_by_definition(k: Tensor, squash: float, width: int) -> Tensor:
    out = torch.zeros_like(k)
    for j in range(k.shape[-1]):
        near = k[..., max(0, j - width // 2) : j + width // 2 + 1]
        out[..., j] = (near.sign() * (near.abs() - squash).clamp(min=0)).sum(-1) / width
    return out


@FUZZ
@given(data=st.data())
def test_smooth_is_the_definition(data: st.DataObject) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))
    leading = draw(st.lists(st.integers(1, 4), max_size=3))
    squash, width = draw(st.sampled_from([0.0, 0.1, 1.0])), 2 * draw(st.integers(0, 12)) + 1
    k = torch.randn(*leading, draw(st.integers(1, 30)), dtype=torch.float64)
    expected = smooth_by_definition(k, squash, width)
    torch.testing.assert_close(effkern.smooth_kernel(k, squash, width), expected)
    torch.testing.assert_close(reference.smooth_kernel(k, squash, width), expected)
    narrow = effkern.smooth_kernel(k.float(), squash, width)
    assert errors(narrow, smooth_by_definition(k.float().double(), squash, width)).max_abs < 1e-6


@pytest.mark.parametrize("dtype", HALVES)
def test_smooth_rounds_once(dtype: torch.dtype) -> None:
    k = torch.randn(2, 3, 50).to(dtype)
    assert torch.equal(effkern.smooth_kernel(k), effkern.smooth_kernel(k.float()).to(dtype))
    with torch.autocast("cpu", dtype=dtype):
        assert effkern.smooth_kernel(k.float()).dtype == torch.float32


def test_smooth_has_every_derivative() -> None:
    k = torch.randn(2, 3, 11, dtype=torch.float64, requires_grad=True)
    call = lambda t: effkern.smooth_kernel(t, 0.05, 3)  # noqa: E731
    assert torch.autograd.gradcheck(call, (k,), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(call, (k,))


def test_smooth_takes_any_strides_and_no_numbers() -> None:
    k = torch.randn(9, 4, 2)[::2].permute(1, 2, 0)
    out = effkern.smooth_kernel(k)
    assert out.is_contiguous() and torch.equal(out, effkern.smooth_kernel(k.contiguous()))
    for shape in ((0, 5), (3, 0), (0,)):
        assert effkern.smooth_kernel(torch.ones(shape)).shape == shape
    one = torch.ones(2, 5)
    assert effkern.smooth_kernel(one, 0.0, 1).data_ptr() != one.data_ptr()


def test_smooth_keeps_nan_to_its_neighbours() -> None:
    k = torch.randn(2, 40)
    k[0, 20] = torch.nan
    assert effkern.smooth_kernel(k, width=5).isnan().nonzero().tolist() == [[0, j] for j in range(18, 23)]


@pytest.mark.parametrize(
    ("args", "error", "match"),
    [
        ((torch.ones(3), 0.1, 4), ValueError, "width must be odd and at least 1, got 4"),
        ((torch.ones(3), 0.1, -1), ValueError, "width must be odd and at least 1, got -1"),
        ((torch.ones(3), 0.1, 3.0), TypeError, "width must be an integer, got float"),
        ((torch.ones(3), -0.1), ValueError, r"squash must be finite and at least 0, got -0\.1"),
        ((torch.ones(3), math.nan), ValueError, "squash must be finite"),
        ((torch.ones(3), math.inf), ValueError, "squash must be finite"),
        ((torch.tensor(1.0),), ValueError, r"k must have shape \(\.\.\., Lk\)"),
        ((torch.ones(3).long(),), TypeError, "floating numbers, got int64"),
        (([1.0],), TypeError, "floating numbers, got list"),
    ],
    ids=str,
)
def test_smooth_says_what_is_wrong(args: tuple, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=f"smooth_kernel: .*{match}"):
        effkern.smooth_kernel(*args)


def diagonal(channels: int, states: int, dtype: torch.dtype = torch.complex64) -> list[Tensor]:
    """S4D-Lin poles, steps from 0.001 to 0.1."""
    wide = torch.complex128
    A = torch.complex(torch.tensor(-0.5), math.pi * torch.arange(states).float()).to(wide)
    A = A * (1 + 0.1 * torch.randn(channels, states, dtype=torch.float64))
    dt = 10 ** (-3 + 2 * torch.rand(channels, dtype=torch.float64))
    return [torch.randn(channels, states, dtype=wide).to(dtype), A.to(dtype), dt.to(dtype.to_real())]


def widened(given: list[Tensor]) -> list[Tensor]:
    return [t.to(torch.complex128 if t.is_complex() else torch.float64) for t in given]


def differentiate(kernel: Callable[..., Tensor], given: list[Tensor], length: int) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in given]
    out = kernel(*leaves, length)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(out.shape, generator=generator).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def relative(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("length", [1, 2, 3, 64, 100, 1000])
@pytest.mark.parametrize(("channels", "states"), [(1, 1), (5, 4), (40, 32)])
def test_vandermonde_against_oracle(channels: int, states: int, length: int) -> None:
    given = diagonal(channels, states)
    ours = differentiate(effkern.vandermonde_kernel, given, length)
    assert effkern.backends.last() == "vandermonde_kernel:composition"
    plain = differentiate(reference.vandermonde_kernel, given, length)
    exact = differentiate(reference.vandermonde_kernel, widened(given), length)
    assert ours[0].dtype == torch.float32 and ours[0].is_contiguous()
    for found, composed, wanted, leaf in zip(ours, plain, exact, [ours[0], *given], strict=True):
        assert found.dtype == leaf.dtype
        assert relative(found, wanted) <= max(2 * relative(composed, wanted), 1e-6)


@FUZZ
@given(data=st.data())
def test_vandermonde_in_double_precision(data: st.DataObject) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))
    given = diagonal(draw(st.integers(1, 5)), draw(st.integers(1, 9)), torch.complex128)
    length = draw(st.integers(1, 300))
    ours = differentiate(effkern.vandermonde_kernel, given, length)
    exact = differentiate(reference.vandermonde_kernel, given, length)
    assert ours[0].dtype == torch.float64
    for found, wanted in zip(ours, exact, strict=True):
        assert relative(found, wanted) <= 1e-12


def test_vandermonde_is_the_state_space_by_steps() -> None:
    """x' = A x + u with u held for dt, solved by the exponential of the augmented matrix of each state."""
    C, A, dt = diagonal(3, 4, torch.complex128)
    augmented = torch.zeros(3, 4, 2, 2, dtype=torch.complex128)
    augmented[..., 0, 0], augmented[..., 0, 1] = A, 1
    held = torch.linalg.matrix_exp(augmented * dt[:, None, None, None])
    state, found = held[..., 0, 1], []
    for _ in range(40):
        found.append(2 * (C * state).sum(1).real)
        state = held[..., 0, 0] * state
    torch.testing.assert_close(effkern.vandermonde_kernel(C, A, dt, 40), torch.stack(found, 1))


def test_the_phase_is_right_a_million_steps_out() -> None:
    """Undamped modes: in float32 alone the phase would be off by radians."""
    length = 1_000_003
    A = torch.complex(torch.zeros(2, 3), torch.tensor([[1.0, 2.5, 700.0], [3.1, 0.01, 40.0]]))
    C, dt = torch.randn(2, 3, dtype=torch.complex64), torch.tensor([0.03, 1.7])
    ours = effkern.vandermonde_kernel(C, A, dt, length)
    C64, A64, dt64 = widened([C, A, dt])
    chosen = torch.tensor([0, 1, 1000, 777_777, length - 1])
    weights = C64 * reference.zero_order_hold(A64, dt64)
    phases = (dt64[:, None] * A64.imag)[..., None] * chosen
    exact = 2 * (weights[..., None] * torch.polar(torch.ones_like(phases), phases)).sum(1).real
    assert errors(ours[:, chosen], exact).max_abs <= 2e-6 * weights.abs().sum(1).max()


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-9, 1e-4, 0.1, 0.499, 0.501, 3.0, 30.0])
def test_zero_order_hold(size: float) -> None:
    """The mean of exp over the step, by Gauss and Legendre; and its derivative, the first moment."""
    nodes, weights = (torch.from_numpy(t) for t in numpy.polynomial.legendre.leggauss(60))
    nodes, weights = (nodes + 1) / 2, weights / 2
    z = size * torch.exp(1j * torch.arange(1, 12) * 0.5).to(torch.complex128)[None].requires_grad_()
    held = reference.zero_order_hold(z, torch.ones(1, dtype=torch.float64))
    powers = torch.exp(z[..., None].detach() * nodes)
    torch.testing.assert_close(held.detach(), (powers * weights).sum(-1), rtol=1e-13, atol=0)
    slope = torch.autograd.grad(held.sum().real, z)[0].conj()
    torch.testing.assert_close(slope, (powers * nodes * weights).sum(-1), rtol=1e-12, atol=0)


def test_a_state_that_integrates() -> None:
    """A = 0 is a constant, and its gradient with respect to A a ramp."""
    C, dt = torch.full((2, 1), 0.5 + 0j), torch.tensor([0.1, 3.0])
    A = torch.zeros(2, 1, dtype=torch.complex64, requires_grad=True)
    out = effkern.vandermonde_kernel(C, A, dt, 100)
    torch.testing.assert_close(out.detach(), dt[:, None].expand(2, 100))
    (grad,) = torch.autograd.grad(out[:, 50].sum(), A)
    torch.testing.assert_close(grad[:, 0].real, dt * dt * (50 + 0.5))


def test_growing_modes_stay_finite_while_the_result_does() -> None:
    C, A, dt = torch.ones(1, 1) + 0j, torch.full((1, 1), 0.8) + 0j, torch.ones(1)
    out = effkern.vandermonde_kernel(C, A, dt, 100)
    exact = reference.vandermonde_kernel(*widened([C, A, dt]), 100)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=0)


def test_vandermonde_gradcheck() -> None:
    for length in (1, 7, 30):
        given = [t.requires_grad_() for t in diagonal(2, 3, torch.complex128)]
        call = lambda *t: effkern.vandermonde_kernel(*t, length)  # noqa: B023, E731
        assert torch.autograd.gradcheck(call, given)
        assert torch.autograd.gradgradcheck(call, given)


def test_groups_of_channels_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from effkern.ops import long_conv_kernels as ops

    given = diagonal(11, 4)
    expected = differentiate(effkern.vandermonde_kernel, given, 150)
    monkeypatch.setattr(ops, "_groups", lambda z, length: [slice(0, 4), slice(4, 8), slice(8, 11)])
    for found, wanted in zip(differentiate(effkern.vandermonde_kernel, given, 150), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    monkeypatch.undo()
    assert len(ops._groups(torch.empty(256, 32, device="meta"), 8192)) > 1
    assert effkern.vandermonde_kernel(*(t[:0] for t in given), 9).shape == (0, 9)
    assert not effkern.vandermonde_kernel(given[0][:, :0], given[1][:, :0], given[2], 9).any()


def test_autocast_changes_nothing() -> None:
    given = diagonal(4, 8)
    expected = differentiate(effkern.vandermonde_kernel, given, 200)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = differentiate(effkern.vandermonde_kernel, given, 200)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_strides_and_steps_in_half_precision() -> None:
    C, A, dt = diagonal(4, 8)
    expected = effkern.vandermonde_kernel(C, A, dt, 70)
    strided = effkern.vandermonde_kernel(C.T.contiguous().T, A.conj().resolve_conj().conj(), dt, 70)
    torch.testing.assert_close(strided, expected)
    rounded = dt.bfloat16()
    assert torch.equal(
        effkern.vandermonde_kernel(C, A, rounded, 70), effkern.vandermonde_kernel(C, A, rounded.float(), 70)
    )


def test_kernels_compile_without_a_break_and_map() -> None:
    torch._dynamo.reset()
    given = [t.requires_grad_() for t in diagonal(6, 4)]

    def model(C: Tensor, A: Tensor, dt: Tensor) -> Tensor:
        return effkern.smooth_kernel(effkern.vandermonde_kernel(C, A, dt, 90), 0.01, 5)

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for channels in (6, 3):
        few = [t[:channels] for t in given]
        found, expected = compiled(*few), model(*few)
        torch.testing.assert_close(found, expected)
        grads, wanted = (torch.autograd.grad(t.square().sum(), given) for t in (found, expected))
        for x, y in zip(grads, wanted, strict=True):
            torch.testing.assert_close(x, y)
    stacked = [torch.stack([t.detach(), 0.5 * t.detach()]) for t in given]
    for i, mapped in enumerate(torch.vmap(model)(*stacked)):
        torch.testing.assert_close(mapped, model(*(t[i] for t in stacked)))


def test_vandermonde_takes_a_twentieth_of_the_naive_memory_at_most() -> None:
    from effkern.bench.memory import peak_extra_bytes

    cpu, length = torch.device("cpu"), 8192
    given = [t.requires_grad_() for t in diagonal(256, 32)]
    grad = torch.randn(256, length)
    call = lambda: effkern.vandermonde_kernel(*given, length)  # noqa: E731
    torch.autograd.grad(call(), given, grad)  # what torch allocates once
    with torch.no_grad():
        naive = peak_extra_bytes(lambda: reference.vandermonde_kernel(*given, length), cpu)
    for run in (call, lambda: torch.autograd.grad(call(), given, grad)):
        peak = peak_extra_bytes(run, cpu)
        assert peak is None or naive is None or peak <= 0.05 * naive


def test_flops_are_those_of_the_product() -> None:
    given = diagonal(4, 8)
    assert vandermonde_flops(*given, 64) == 2 * 4 * 64 * 2 * 8
    assert vandermonde_flops(*given, 64, backward=True) == 2 * vandermonde_flops(*given, 64)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"C": torch.ones(2, 3)}, RuntimeError, "C must be complex64 or complex128, got float32"),
        ({"C": torch.ones(3) + 0j}, RuntimeError, r"C must have shape \(channels, states\), got \(3,\)"),
        ({"A": torch.ones(2, 4) + 0j}, RuntimeError, r"A has shape \(2, 4\), C has \(2, 3\)"),
        ({"A": torch.ones(2, 3).cdouble()}, RuntimeError, "A is complex128 but C is complex64"),
        ({"dt": torch.ones(3)}, RuntimeError, r"dt must have shape \(2,\), one a channel, got \(3,\)"),
        ({"dt": torch.ones(2).double()}, RuntimeError, "dt must be float32 beside complex64, got float64"),
        ({"dt": torch.ones(2).long()}, RuntimeError, "dt must be float32 beside complex64, got int64"),
        ({"A": torch.ones(2, 3, device="meta") + 0j}, RuntimeError, "A is on another device than C"),
        ({"dt": 0.1}, TypeError, "dt must be a tensor, got float"),
        ({"length": 0}, ValueError, "length must be at least 1, got 0"),
        ({"length": 8.0}, TypeError, "length must be an integer, got float"),
    ],
    ids=str,
)
def test_vandermonde_says_what_is_wrong(change: dict, error: type[Exception], match: str) -> None:
    given = {"C": torch.ones(2, 3) + 0j, "A": torch.ones(2, 3) + 0j, "dt": torch.ones(2), "length": 8}
    with pytest.raises(error, match=f"vandermonde_kernel: {match}"):
        effkern.vandermonde_kernel(**{**given, **change})
