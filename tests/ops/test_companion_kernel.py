"""companion_kernel against powers of the dense matrix: every CPU level, the reference and what GPUs run."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable

import pytest
import torch
from conftest import Route
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import effkern
from effkern.reference import long_conv_kernels as reference
from effkern.testing import assert_close_to_oracle, errors

SHAPES = [
    (1, 1, 1),
    (3, 4, 40),
    (8, 16, 64),
    (16, 8, 700),  # several chunks
    (21, 17, 300),
    (5, 30, 12),  # shorter than the order
    (9, 33, 33),
    (2, 300, 800),  # an order beyond a chunk's length
    (70, 5, 19),
]


def parameters(channels: int, order: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    a, b, c = (torch.randn(channels, order, dtype=torch.float64) for _ in range(3))
    return [t.to(dtype) for t in (a / a.abs().sum(1, keepdim=True), b, c)]


def by_definition(a: Tensor, b: Tensor, c: Tensor, length: int) -> Tensor:
    """c^T A^l b with A as a dense matrix, one product after the other."""
    order = a.shape[1]
    last = torch.nn.functional.pad(a[..., None], (order - 1, 0))
    matrix = torch.diag(torch.ones(order - 1, dtype=a.dtype), -1) + last
    found, x = [], b[..., None]
    for _ in range(length):
        found.append((c[:, None] @ x)[:, 0])
        x = matrix @ x
    return torch.cat(found, 1)


def differentiate(kernel: Callable[..., Tensor], given: list[Tensor], length: int) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in given]
    out = kernel(*leaves, length)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(out.shape, generator=generator).to(out.dtype)
    grads = torch.autograd.grad(out, leaves, grad, allow_unused=True, materialize_grads=True)
    return [out.detach(), *grads]


def check(given: list[Tensor], length: int) -> None:
    ours = differentiate(effkern.companion_kernel, given, length)
    plain = differentiate(by_definition, given, length)
    exact = differentiate(by_definition, [t.double() for t in given], length)
    for name, found, composed, wanted in zip(("out", "a", "b", "c"), ours, plain, exact, strict=True):
        assert found.is_contiguous()
        unit = max(1.0, wanted.abs().max().item())
        assert_close_to_oracle(found, composed, wanted, name, unit=unit)


@pytest.mark.sanitize
@pytest.mark.parametrize(("channels", "order", "length"), SHAPES)
def test_against_oracle(channels: int, order: int, length: int, route: Route) -> None:
    given = [t.to(route.device) for t in parameters(channels, order)]
    check(given, length)
    if route.device == "cpu":
        route.check("companion_kernel_backward", torch.float32)


@pytest.mark.sanitize
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_shape(data: st.DataObject, isa: str) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))
    a, b, c = parameters(draw(st.integers(1, 20)), draw(st.integers(1, 40)))
    # A pole on the circle lets errors walk at random; the few numbers of a small shape are no fair sample of that.
    check([0.95 * a, b, c], draw(st.integers(1, 600)))


@pytest.mark.parametrize("radius", [0.5, 0.9, 1.0])
def test_poles_in_and_on_the_unit_circle(radius: float, isa: str) -> None:
    """Poles spread over a circle: a polynomial whose coefficients are no smaller than 1 in sum."""
    order, channels = 16, 8
    angles = (torch.arange(order // 2) + 0.5) * (2 * math.pi / order) + 0.02 * torch.randn(
        channels, order // 2
    )
    poles = torch.polar(torch.full_like(angles, radius), angles).to(torch.complex128)
    polynomial = torch.ones(channels, 1, dtype=torch.complex128)
    for pole in torch.cat([poles, poles.conj()], 1).T:
        shifted, same = (torch.nn.functional.pad(polynomial, p) for p in ((1, 0), (0, 1)))
        polynomial = shifted - pole[:, None] * same
    _, b, c = parameters(channels, order)
    check([(-polynomial.real[:, :-1]).float(), b, c], 1000)


@pytest.mark.parametrize("order", [1, 3, 64])
def test_a_pole_at_one_stays_finite(order: int, isa: str) -> None:
    """sum_i a_i = 1 is a pole at z = 1, where forms that divide by 1 - A(z) at roots of unity have nothing to say."""
    a, b, c = (torch.rand(8, order) + 0.1 for _ in range(3))
    a = a / a.double().sum(1, keepdim=True)
    check([a.float(), b, c], 4096)
    integrator = effkern.companion_kernel(*(torch.ones(1, 1) for _ in range(3)), 5000)
    assert torch.equal(integrator, torch.ones(1, 5000))


def test_a_shift_register_repeats_what_it_holds(isa: str) -> None:
    """A = the cyclic shift: K[l] = c . (b turned by l), exactly, in integers."""
    a = torch.zeros(3, 12)
    a[:, 0] = 1
    b, c = (torch.randint(-9, 9, (3, 12)).float() for _ in range(2))
    out = effkern.companion_kernel(a, b, c, 600)
    for l in (0, 1, 11, 12, 255, 599):
        assert torch.equal(out[:, l], (c * b.roll(l, 1)).sum(1))


def test_it_is_the_state_space_by_convolution(isa: str) -> None:
    a, b, c = parameters(4, 6)
    u, x, stepped = torch.randn(4, 50), torch.zeros(4, 6), []
    for step in range(50):
        x = torch.cat([torch.zeros(4, 1), x[:, :-1]], 1) + a * x[:, -1:] + b * u[:, step : step + 1]
        stepped.append((c * x).sum(1))
    kernel = effkern.companion_kernel(a, b, c, 50)
    convolved = torch.nn.functional.conv1d(
        torch.nn.functional.pad(u, (49, 0))[None], kernel.flip(1)[:, None], groups=4
    )[0]
    torch.testing.assert_close(convolved, torch.stack(stepped, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_float32_rounded_once(dtype: torch.dtype, isa: str) -> None:
    given = parameters(5, 9, dtype)
    ours = differentiate(effkern.companion_kernel, given, 200)
    wide = effkern.companion_kernel(*(t.float() for t in given), 200)
    assert torch.equal(ours[0], wide.to(dtype))
    exact = differentiate(by_definition, [t.double() for t in given], 200)
    for found, wanted in zip(ours[1:], exact[1:], strict=True):
        assert errors(found, wanted).relative_l2 < torch.finfo(dtype).eps


def test_gradcheck_in_float64() -> None:
    for order, length in ((4, 21), (5, 3), (1, 6)):
        given = [t.requires_grad_() for t in parameters(2, order, torch.float64)]
        assert torch.autograd.gradcheck(lambda *t: effkern.companion_kernel(*t, length), given)  # noqa: B023
        assert torch.autograd.gradgradcheck(lambda *t: effkern.companion_kernel(*t, length), given)  # noqa: B023
    assert effkern.backends.last() == "companion_kernel:reference"


@pytest.mark.parametrize("length", [1, 2, 6, 7, 50, 64])
def test_gradients_written_out_for_gpus(length: int) -> None:
    given = parameters(3, 6, torch.float64)
    exact = differentiate(by_definition, given, length)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(3, length, generator=generator).double()
    torch.testing.assert_close(reference.companion_kernel(*given, length), exact[0])
    for found, wanted in zip(reference.companion_kernel_backward(grad, *given), exact[1:], strict=True):
        torch.testing.assert_close(found, wanted)


def test_same_bits_for_any_number_of_threads_and_channels(threads: Callable[[int], None]) -> None:
    given = parameters(37, 20)
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(differentiate(effkern.companion_kernel, given, 500))
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))
    alone = effkern.companion_kernel(*(t[5:6] for t in given), 500)
    assert torch.equal(alone, found[0][0][5:6])


def test_nan_and_overflow_stay_in_their_channel(isa: str) -> None:
    given = parameters(10, 6)
    expected = differentiate(effkern.companion_kernel, given, 400)
    given[0][3], given[1][7, 2] = 5.0, torch.nan  # grows beyond float32
    out, *grads = differentiate(effkern.companion_kernel, given, 400)
    others = [i for i in range(10) if i not in (3, 7)]
    assert not out[3].isfinite().all() and out[7].isnan().any()
    for found, wanted in zip((out, *grads), expected, strict=True):
        assert torch.equal(found[others], wanted[others])


@pytest.mark.skipif(platform.machine() != "x86_64", reason="elsewhere subnormal numbers are not slow")
def test_subnormal_numbers_are_zero_and_the_caller_keeps_them(isa: str) -> None:
    a, b, c = torch.full((8, 1), 0.5), torch.ones(8, 1), torch.ones(8, 1)
    out = effkern.companion_kernel(a, b, c, 200)
    assert torch.equal(out[0, :127], 0.5 ** torch.arange(127))
    assert not out[:, 127:].any()
    assert torch.tensor(2.0**-120) * 2.0**-20 > 0  # the mode of this thread is back


def test_memory_is_the_kernel_and_little_more() -> None:
    from effkern.bench.memory import peak_extra_bytes

    given = [t.requires_grad_() for t in parameters(64, 64)]
    length = 65536

    def both() -> None:
        effkern.companion_kernel(*given, length).sum().backward()

    both()  # what torch allocates once
    peak = peak_extra_bytes(both, torch.device("cpu"))
    # K, its gradient, which is expanded from a number and copied, and scratch; the states would be 1 GiB
    assert peak is None or peak <= 3 * 64 * length * 4


def test_errors_of_the_backward_op() -> None:
    a, b, c = parameters(3, 4)
    out = effkern.companion_kernel(a, b, c, 10)
    backward = torch.ops.effkern.companion_kernel_backward
    with pytest.raises(RuntimeError, match="grad_out or out does not match"):
        backward(torch.ones(3, 9), a, b, c, out)
    with pytest.raises(RuntimeError, match="grad_out or out does not match"):
        backward(out[:2], a, b, c, out[:2])
    with pytest.raises(RuntimeError, match="out must have shape"):
        backward(out, a, b, c, out[0])
    with pytest.raises(RuntimeError, match="a must be float32"):
        torch.ops.effkern.companion_kernel(a.double(), b.double(), c.double(), 10)
