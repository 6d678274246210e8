"""Long convolutions against the float64 oracle: lengths, dtypes, strides, gates, parts, gradients, every CPU level."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from long_conv_oracle import Inputs, check, random_inputs, results
from torch import Tensor

import effkern
from effkern.ops import _long_conv_dispatch as dispatch
from effkern.reference import long_conv as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FUZZ = settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
AWKWARD = [
    *(2, 3, 7, 31, 61, 127, 509, 1009, 2003, 4999),
    *(2**n + d for n in (4, 6, 8, 10, 11, 12) for d in (-1, 0, 1)),
]
LENGTHS = st.one_of(st.integers(1, 70), st.sampled_from(AWKWARD), st.integers(1, 5000))


def path(isa: str, op: str = "long_conv_backward") -> str:
    return f"{op}:cpu/{'avx512' if isa in ('avx512_bf16', 'amx') else isa}"


def strided(t: Tensor, how: str) -> Tensor:
    """The same numbers behind other strides."""
    if how == "every second":
        return torch.stack([t, t.new_full(t.shape, torch.nan)], -1)[..., 0]
    if how == "positions first":
        return t.movedim(-1, 0).contiguous().movedim(0, -1)
    if how == "cut out":
        return F.pad(t, (3, 2), value=torch.nan)[..., 3:-2]
    return t


@pytest.mark.sanitize
@FUZZ
@given(data=st.data())
def test_against_oracle(data: st.DataObject, isa: str) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))
    length = draw(LENGTHS)
    taps = draw(st.one_of(st.just(length), st.integers(1, length), st.integers(1, min(length, 40))))
    causal = draw(st.booleans())
    batch = draw(st.sampled_from([1, 2, 3, 9]))
    inputs = random_inputs(
        batch,
        draw(st.integers(1, 5)),
        length,
        taps,
        draw(st.sampled_from(DTYPES)),
        causal=causal,
        skip=draw(st.booleans()),
        gates=draw(st.booleans()),
        float_weights=draw(st.booleans()),
    )
    layouts = st.sampled_from(["plain", "every second", "positions first", "cut out"])
    inputs = inputs.map(lambda t: strided(t, draw(layouts)))
    grad = strided(torch.randn(inputs.u.shape), draw(layouts))
    prepared = draw(st.sampled_from([0, length, 2 * length + 5]))
    check(inputs, prepared=prepared, grad=grad, causal=causal)
    assert effkern.backends.last() == path(isa)


@pytest.mark.sanitize
@FUZZ
@given(data=st.data())
def test_in_parts(data: st.DataObject, isa: str) -> None:
    """Any cuts, with or without a state before the first part: the oracle sees the input whole."""
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))
    length = draw(st.one_of(st.integers(2, 40), st.integers(2, 600)))
    cuts = tuple(sorted(draw(st.sets(st.integers(1, length - 1), min_size=1, max_size=5))))
    taps = draw(st.integers(1, length))
    inputs = random_inputs(
        draw(st.integers(1, 3)),
        draw(st.integers(1, 4)),
        length,
        taps,
        draw(st.sampled_from(DTYPES)),
        skip=draw(st.booleans()),
        gates=draw(st.booleans()),
        state=draw(st.booleans()),
    )
    check(inputs, cuts=cuts, prepared=draw(st.sampled_from([0, length + taps])))
    assert effkern.backends.last() == path(isa)


@pytest.mark.parametrize("length", [8192, 8193, 16381, 65536, 65537, 100003, 1 << 20])
def test_large_lengths(length: int, isa: str) -> None:
    check(random_inputs(1, 1, length, length, skip=True))
    assert effkern.backends.last() == path(isa)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(16, 2, 3000, 3000), (2, 3, 20_000, 150), (1, 2, 30_011, 9973), (4, 70, 200, 200)], ids=str
)
def test_shapes_that_are_cut_up(shape: tuple[int, int, int, int], dtype: torch.dtype, isa: str) -> None:
    """A batch in groups, blocks as long as a few taps want them, blocks of a long kernel, many channels."""
    for causal in (True, False):
        check(random_inputs(*shape, dtype, causal=causal, skip=True, gates=True), causal=causal)
    assert effkern.backends.last() == path(isa)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("length", "taps"), [(1, 1), (2, 2), (37, 5), (64, 64), (100, 77)])
def test_reference_is_the_sum_of_its_definition(length: int, taps: int, causal: bool) -> None:
    inputs = random_inputs(2, 3, length, taps, torch.float64, causal=causal, skip=True, gates=True)
    x = inputs.pre_gate * inputs.u
    back, ahead = (inputs.k, None) if causal else inputs.k.unbind(1)
    y = F.conv1d(F.pad(x, (taps - 1, 0)), back.flip(1)[:, None], groups=3) + inputs.skip[:, None] * x
    if ahead is not None:
        y = y + F.conv1d(F.pad(x, (0, taps - 1)), ahead[:, None], groups=3)
    found = results(reference.long_conv, inputs, causal=causal)
    torch.testing.assert_close(found["out"], inputs.post_gate * y)


@pytest.mark.parametrize("causal", [True, False])
def test_reference_has_first_and_second_derivatives(causal: bool) -> None:
    inputs = random_inputs(2, 2, 5, 4, torch.float64, causal=causal, skip=True, gates=True, state=causal)
    leaves = inputs.map(lambda t: t.requires_grad_())

    def call(*tensors: Tensor) -> Tensor:
        u, k, *rest = tensors
        named = dict(zip(("skip", "pre_gate", "post_gate", "state"), rest, strict=False))
        return effkern.long_conv(u, k, causal=causal, backend="reference", **named)

    tensors = tuple(leaves.given.values())
    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors)


@pytest.mark.parametrize(("causal", "history"), [(True, 0), (True, 6), (False, 0)])
@pytest.mark.parametrize("gates", [True, False])
def test_formulas_where_there_is_no_kernel(gates: bool, causal: bool, history: int) -> None:
    """What runs on a GPU, on the CPU: the spectrum and every gradient against autograd over the reference."""
    inputs = random_inputs(2, 3, 20, 7, causal=causal, skip=gates, gates=gates)
    pre_gate = None if history else inputs.pre_gate
    post_gate = None if inputs.post_gate is None else inputs.post_gate[..., history:]
    given = [inputs.u, inputs.k, inputs.skip, pre_gate, post_gate]
    leaves = [None if t is None else t.detach().requires_grad_() for t in given]
    out = reference.convolve(*leaves, history, causal)  # type: ignore[arg-type]
    grad = torch.randn_like(out)
    present = [t for t in leaves if t is not None]
    wanted = dict(zip(map(id, present), torch.autograd.grad(out, present, grad), strict=True))
    u, k, skip, pre, post = given
    spectrum = dispatch._composed_spectrum(k, 33, causal)
    ready = dispatch._composed_forward(u, k, spectrum, skip, pre, post, history, causal)
    torch.testing.assert_close(ready, out.detach())
    for need_k in (True, False):
        found = dispatch._composed_backward(
            grad, u, k, spectrum, skip, pre, post, history, causal, need_k=need_k
        )
        assert effkern.backends.last() == "long_conv_backward:reference"
        for i, (gradient, leaf) in enumerate(zip(found, leaves, strict=True)):
            if leaf is None or (i == 1 and not need_k):
                assert gradient.shape == (0,)
            else:
                torch.testing.assert_close(gradient, wanted[id(leaf)])
                assert gradient.is_contiguous()


def test_nan_stays_in_its_row_and_in_gradients_in_its_channel(isa: str) -> None:
    inputs = random_inputs(3, 4, 300, 300, skip=True, gates=True)
    clean = results(effkern.long_conv, inputs)
    u = inputs.u.clone()
    u[1, 2, 17] = torch.nan
    dirty = results(effkern.long_conv, Inputs(u, inputs.k, inputs.skip, inputs.pre_gate, inputs.post_gate))
    row = torch.zeros(3, 4, dtype=torch.bool)
    row[1, 2] = True
    for name, value in dirty.items():
        touched = row if value.dim() == 3 else row.any(0)
        assert torch.equal(value[~touched], clean[name][~touched]), name
    assert dirty["out"][1, 2, 17].isnan() and dirty["k"][2].isnan().any() and dirty["skip"][2].isnan()
    for name in ("u", "pre_gate"):  # the gradient of u does not look at u
        assert torch.equal(dirty[name][0], clean[name][0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 5000, 5000), (17, 2, 700, 300), (2, 9, 20_000, 64)], ids=str)
def test_same_bits_for_any_number_of_threads(
    shape: tuple[int, int, int, int], dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    inputs = random_inputs(*shape, dtype, skip=True, gates=True)
    found = []
    for count in (1, 2, 3, 2):
        threads(count)
        found.append(results(effkern.long_conv, inputs))
    for other in found[1:]:
        assert all(torch.equal(value, found[0][name]) for name, value in other.items())


def test_one_position_after_a_million_is_as_right_as_a_transform(isa: str) -> None:
    """All numbers have one sign: a running sum in float32 would lose four digits."""
    taps = 1 << 20
    u, k = torch.rand(1, 2, taps + 1), torch.rand(2, taps)
    out = torch.ops.effkern.long_conv(u, k, None, None, None, None, taps)
    exact = (u[..., 1:].double() * k.double().flip(1)).sum(2, keepdim=True)
    torch.testing.assert_close(out.double(), exact, rtol=2e-7, atol=0.0)


def test_few_outputs_see_no_later_input(isa: str) -> None:
    for positions, taps in ((2, 9), (5, 100), (9, 700)):
        u, k = torch.randn(1, 2, taps - 1 + positions), torch.randn(2, taps)
        u[..., -1] = torch.inf
        out = torch.ops.effkern.long_conv(u, k, None, None, None, None, taps - 1)
        assert out[..., :-1].isfinite().all() and out[..., -1].isinf().all()


def test_surplus_taps_count_for_nothing_at_the_dispatcher(isa: str) -> None:
    inputs = random_inputs(2, 3, 20, 50)
    k = inputs.k.clone().requires_grad_()
    out = torch.ops.effkern.long_conv(inputs.u, k)
    torch.testing.assert_close(out, torch.ops.effkern.long_conv(inputs.u, k[:, :20]))
    out.square().sum().backward()
    assert torch.equal(k.grad[:, 20:], torch.zeros(3, 30))  # type: ignore[index]


@pytest.mark.parametrize("shape", [(0, 3, 20), (2, 0, 20), (2, 3, 0)], ids=str)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_nothing_gives_nothing_and_zero_gradients(shape: tuple[int, int, int], backend: str | None) -> None:
    inputs = random_inputs(*shape, 20, skip=True, gates=True)
    found = results(effkern.long_conv, inputs, backend=backend)
    assert found["out"].shape == shape
    for name, value in inputs.given.items():
        assert torch.equal(found[name], torch.zeros_like(value)), name


def test_gradients_in_the_dtype_of_each_argument(isa: str) -> None:
    u, skip = torch.randn(2, 3, 50).bfloat16(), torch.randn(3)
    found = results(effkern.long_conv, Inputs(u, torch.randn(3, 50).bfloat16(), skip, u, u))
    assert [t.dtype for t in found.values()] == [torch.bfloat16] * 3 + [torch.float32] + [torch.bfloat16] * 2


def test_errors_of_the_dispatcher_ops() -> None:
    u, k = torch.randn(2, 3, 20), torch.randn(3, 20)
    op = torch.ops.effkern
    for call, match in (
        (lambda: op.long_conv_backward(u[..., 1:], u, k), "grad_out must have u's dtype and shape"),
        (lambda: op.long_conv_backward(u.half(), u, k), "grad_out must have u's dtype and shape"),
        (
            lambda: op.long_conv(u, k, history=21),
            "history must be between 0 and the 20 positions of u, got 21",
        ),
        (lambda: op.long_conv(u, k, pre_gate=u, history=4), "pre_gate cannot be given with a history"),
        (lambda: op.long_conv(u, k, torch.randn(3, 7)), "spectrum must be what long_conv_spectrum returned"),
        (lambda: op.long_conv(u, k, torch.zeros(3, 200)), "spectrum"),
    ):
        with pytest.raises(RuntimeError, match=match):
            call()


def test_too_many_positions() -> None:
    endless = torch.zeros(1).expand(1, 1, 2**34 + 1)
    with pytest.raises(RuntimeError, match="u may have up to 17179869184 positions, got 17179869185"):
        torch.ops.effkern.long_conv(endless, torch.zeros(1, 1))


@pytest.mark.parametrize("name", ["pre_gate", "post_gate"])
def test_gates_beside_a_state_are_those_of_the_part(name: str) -> None:
    inputs = random_inputs(2, 3, 9, 4, state=True)
    gate = torch.randn(2, 3, 8)
    with pytest.raises(
        RuntimeError, match=rf"{name} has shape \(2, 3, 8\), which does not fit u's \(2, 3, 9\)"
    ):
        effkern.long_conv(inputs.u, inputs.k, state=inputs.state, **{name: gate})


def test_meta_tensors() -> None:
    for dtype in (torch.float32, torch.float64):
        u, k = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((2, 3, 8), (3, 8)))
        for backend in (None, "reference"):
            assert effkern.long_conv(u, k, backend=backend).shape == (2, 3, 8)
        spectrum = effkern.long_conv_prepare(k, 8)
        out, state = effkern.long_conv(u[..., :1], spectrum, state=u[..., 1:], return_state=True)
        assert (out.shape, state.shape) == ((2, 3, 1), (2, 3, 7))


def test_peak_memory_is_the_output_and_little_more(threads: Callable[[int], None]) -> None:
    from effkern.bench.memory import peak_extra_bytes, peak_tensor_bytes

    threads(2)
    inputs = random_inputs(4, 32, 65_536, 65_536)
    call = lambda: effkern.long_conv(inputs.u, inputs.k)  # noqa: E731
    peak, resident = (
        measured(call, torch.device("cpu")) for measured in (peak_tensor_bytes, peak_extra_bytes)
    )
    assert peak is not None and inputs.u.nbytes <= peak <= inputs.u.nbytes + (6 << 20)
    # Nothing hidden from torch's allocator either; what the system adds, huge pages and threads' stacks, varies.
    assert resident is None or resident <= peak + (8 << 20)
