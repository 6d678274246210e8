"""What every registered op promises: found through the registry, so a new op is covered once it registers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

import effkern
from effkern import backends
from effkern.masks import Lowered, Mask
from effkern.ops import registry

registry.discover()
SPECS = registry.specs()
every_op = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
every_differentiable_op = pytest.mark.parametrize(
    "spec", [spec for spec in SPECS if spec.double_backward], ids=lambda spec: spec.name
)
every_sample = pytest.mark.parametrize(
    ("spec", "name"),
    [
        pytest.param(spec, sample.name, id=f"{spec.name}-{sample.name}")
        for spec in SPECS
        for sample in spec.samples("cpu", spec.dtypes[0])
    ],
)
every_bad_sample = pytest.mark.parametrize(
    ("spec", "name"),
    [
        pytest.param(spec, sample.name, id=f"{spec.name}-{sample.name}")
        for spec in SPECS
        for sample in spec.bad_samples("cpu")
    ],
)


def get(
    spec: registry.OpSpec, name: str, device: str = "cpu", dtype: torch.dtype | None = None
) -> registry.Sample:
    return next(s for s in spec.samples(device, dtype or spec.dtypes[0]) if s.name == name)


def tensors(tree: Any) -> list[Tensor]:
    """All tensors of a tree, those that masks hold included."""
    leaves = tree_leaves(tree)
    held = [term for leaf in leaves if isinstance(leaf, Mask) for term in leaf.lower()]
    return [leaf for leaf in (*leaves, *held) if isinstance(leaf, Tensor)]


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """A tree with `function` of every tensor in it, those that masks hold included."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, Mask):
            changed = copy.copy(leaf)
            changed._lowered = Lowered._make(map(one, leaf.lower()))
            return changed
        return function(leaf) if isinstance(leaf, Tensor) else leaf

    return tree_map(one, tree)


def map_batched(spec: registry.OpSpec, function: Callable[[Tensor], Any], args: tuple[Any, ...]) -> Any:
    """`args` with `function` of the tensors that count cases along their first axis."""
    batched = range(len(args)) if spec.batched is None else spec.batched
    return tuple(map_tensors(function, arg) if i in batched else arg for i, arg in enumerate(args))


def floating(tree: Any) -> list[Tensor]:
    return [tensor for tensor in tensors(tree) if tensor.is_floating_point()]


def run(spec: registry.OpSpec, sample: registry.Sample, **kwargs: Any) -> list[Tensor]:
    torch.manual_seed(0)  # the same numbers wherever an op draws some
    return tensors(spec.public(*sample.args, **sample.kwargs, **kwargs))


def with_leaves(spec: registry.OpSpec, sample: registry.Sample) -> registry.Sample:
    """A sample whose floating tensors are leaves, but for the keyword arguments that take no gradient."""

    if not spec.double_backward:
        return sample

    def leaf(value: Tensor) -> Tensor:
        return value.detach().requires_grad_() if value.is_floating_point() else value

    kwargs = {k: v if k in spec.constants else map_tensors(leaf, v) for k, v in sample.kwargs.items()}
    return registry.Sample(sample.name, map_tensors(leaf, sample.args), kwargs)


def gradients(spec: registry.OpSpec, sample: registry.Sample, function: Callable[..., Any]) -> list[Tensor]:
    torch.manual_seed(0)
    if not spec.double_backward:
        return tensors(function(*sample.args, **sample.kwargs))
    outputs = floating(function(*sample.args, **sample.kwargs))
    inputs = [t for t in floating((sample.args, sample.kwargs)) if t.requires_grad]
    return list(torch.autograd.grad(sum(o.float().cos().sum() for o in outputs), inputs))  # type: ignore[arg-type]


def same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e), f"differs by {(a - e).abs().max()}"


@every_op
def test_public_name(spec: registry.OpSpec) -> None:
    assert getattr(effkern, spec.name) is spec.public
    assert spec.name in effkern.__all__
    for section in ("Args:", "Returns:", "Raises:", "Numerics:", "Cost:", "Source:"):
        assert section in (spec.public.__doc__ or ""), f"the docstring has no {section}"


def test_every_schema_belongs_to_an_op() -> None:
    defined = {
        name.removeprefix("effkern::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("effkern::")
    }
    assert defined == {schema for spec in SPECS for schema in spec.schemas}


@every_sample
def test_opcheck(spec: registry.OpSpec, name: str, device: str) -> None:
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    # Nearly all of the time, and test_compiles_without_a_break traces every sample the same way: only each op's first.
    if name == spec.samples(device, spec.dtypes[0])[0].name:
        checks.append("test_aot_dispatch_dynamic")
    for op, args in spec.calls(get(spec, name, device)):
        if "backward" not in op:
            args = with_leaves(spec, registry.Sample(op, args)).args
        torch.library.opcheck(getattr(torch.ops.effkern, op).default, args, test_utils=checks)


def test_empty_memory_of_kernels_is_nan_filled() -> None:
    """The fixture that fills torch.empty with NaN reaches what the C++ ops allocate."""
    x = torch.randn(1, 1, 4, 8)
    assert torch.empty(100).isnan().all()
    with torch.profiler.profile() as profile:
        torch.ops.effkern.attention(x, x, x)
    allocated = sum(e.count for e in profile.key_averages() if e.key in ("aten::empty", "aten::new_empty"))
    filled = sum(e.count for e in profile.key_averages() if e.key == "aten::fill_")
    assert filled >= 2 and allocated >= 2


@every_sample
def test_functional(spec: registry.OpSpec, name: str, device: str) -> None:
    sample = get(spec, name, device)
    inputs = tensors((sample.args, sample.kwargs))
    before = [(t.clone(), t._version) for t in inputs]
    outputs = run(spec, sample)
    for tensor, (value, version) in zip(inputs, before, strict=True):
        assert tensor._version == version and torch.equal(tensor, value)
    mine = {o.untyped_storage().data_ptr() for o in outputs if o.numel()}
    assert len(mine) == len([o for o in outputs if o.numel()])
    assert not mine & {t.untyped_storage().data_ptr() for t in inputs}


@every_sample
def test_inference_mode(spec: registry.OpSpec, name: str, device: str) -> None:
    sample = get(spec, name, device)
    expected = run(spec, sample)
    with torch.inference_mode():
        outputs = run(spec, sample)
    assert all(o.is_inference() for o in outputs)
    same(outputs, expected)


@every_sample
def test_strides_do_not_matter(spec: registry.OpSpec, name: str, device: str) -> None:
    """The same numbers behind other strides give the same bits."""
    sample = get(spec, name, device)
    expected = run(spec, sample)

    def padded(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        room = value.new_full([2 * n + 1 for n in value.shape], float("nan"))
        view = room[tuple(slice(1, 2 * n + 1, 2) for n in value.shape)]
        return view.copy_(value)

    def backwards_in_memory(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        axes = tuple(range(value.dim()))[::-1]
        return value.permute(axes).contiguous().permute(axes)

    for change in (padded, backwards_in_memory):
        changed = registry.Sample(name, map_tensors(change, sample.args), map_tensors(change, sample.kwargs))
        same(run(spec, changed), expected)


@every_sample
def test_meta_and_fake_shapes(spec: registry.OpSpec, name: str) -> None:
    """Shapes without data, for meta tensors and for CUDA tensors on a machine that has none."""
    dtype = torch.bfloat16
    expected = run(spec, get(spec, name, "cpu", dtype))

    def facts(outputs: list[Tensor]) -> list[tuple[Any, ...]]:
        return [(o.shape, o.dtype, o.stride()) for o in outputs]

    with FakeTensorMode(allow_non_fake_inputs=True):
        sample = get(spec, name, "cpu", dtype)
        to_cuda = lambda t: torch.empty_like(t, device="cuda")  # noqa: E731
        moved, kwargs = (map_tensors(to_cuda, x) for x in (sample.args, sample.kwargs))
        outputs = tensors(spec.public(*moved, **kwargs))
        assert all(o.device.type == "cuda" for o in outputs)
        assert facts(outputs) == facts(expected)
    sample = get(spec, name, "cpu", dtype)
    to_meta = lambda t: t.to("meta")  # noqa: E731
    args, kwargs = (map_tensors(to_meta, x) for x in (sample.args, sample.kwargs))
    outputs = tensors(spec.public(*args, **kwargs))
    assert facts(outputs) == facts(expected)


@every_sample
def test_autocast(spec: registry.OpSpec, name: str, device: str) -> None:
    """float32 inputs behave as if cast by hand; the gradients come back in float32; float64 stays."""
    if not spec.autocast:
        with torch.autocast(device, dtype=torch.bfloat16):
            sample = get(spec, name, device, torch.float32)
            same(run(spec, sample), run(spec, sample))
            assert run(spec, sample)[0].dtype == torch.float32
        return
    sample = get(spec, name, device, torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        cast = registry.Sample(
            name,
            map_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t, sample.args),  # noqa: B023
            sample.kwargs,
        )
        with torch.autocast(device, dtype=dtype):
            outputs = run(spec, sample)
            plain = run(spec, sample, backend="reference")
        same(outputs, run(spec, cast))
        assert outputs[0].dtype == plain[0].dtype == dtype
    with torch.autocast(device, dtype=torch.bfloat16):
        grads = gradients(spec, with_leaves(spec, sample), spec.public)
        wide = run(spec, get(spec, name, device, torch.float64))
    assert not spec.double_backward or all(g.dtype == torch.float32 for g in grads)
    assert wide[0].dtype == torch.float64


@every_bad_sample
@pytest.mark.sanitize
def test_clear_error(spec: registry.OpSpec, name: str, device: str) -> None:
    sample = next(s for s in spec.bad_samples(device) if s.name == name)
    with pytest.raises(sample.error, match=sample.match):
        spec.public(*sample.args, **sample.kwargs)
    if "backend" not in sample.kwargs:
        with pytest.raises(sample.error, match=sample.match):
            spec.public(*sample.args, **sample.kwargs, backend="reference")


@every_op
def test_bad_devices(spec: registry.OpSpec) -> None:
    """A mix of devices names the argument that stands elsewhere (meta stands in for a second device)."""
    sample = spec.samples("cpu", spec.dtypes[0])[0]
    leaves, structure = tree_flatten(sample.args)
    for i in range(1, len(leaves)):
        args = tree_unflatten([t.to("meta") if i == j else t for j, t in enumerate(leaves)], structure)
        with pytest.raises(RuntimeError, match=r"is on (another device|meta)"):
            spec.public(*args, **sample.kwargs)


@every_differentiable_op
def test_second_and_forward_derivatives_refuse(spec: registry.OpSpec, device: str) -> None:
    sample = with_leaves(spec, spec.samples(device, spec.dtypes[0])[0])
    inputs = floating(sample.args)
    grads = torch.autograd.grad(run(spec, sample)[0].cos().sum(), inputs, create_graph=True)
    with pytest.raises(NotImplementedError, match=spec.double_backward):
        torch.autograd.grad(sum(g.cos().sum() for g in grads), inputs)  # type: ignore[arg-type]
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        args = tree_map(lambda t: torch.autograd.forward_ad.make_dual(t, torch.ones_like(t)), sample.args)
        with pytest.raises(NotImplementedError, match="forward-mode"):
            spec.public(*args, **sample.kwargs)


@every_differentiable_op
def test_reference_has_every_derivative(spec: registry.OpSpec, device: str) -> None:
    sample = with_leaves(spec, spec.samples(device, torch.float64)[0])
    inputs = floating(sample.args)
    out = run(spec, sample, backend="reference")[0]
    grads = torch.autograd.grad(out.cos().sum(), inputs, create_graph=True)
    assert all(g.isfinite().all() for g in torch.autograd.grad(sum(g.cos().sum() for g in grads), inputs))  # type: ignore[arg-type]

    leaves, structure = tree_flatten(sample.args)

    def loss(first: Tensor) -> Tensor:
        args = tree_unflatten([first, *(t.detach() for t in leaves[1:])], structure)
        return tensors(spec.public(*args, **sample.kwargs, backend="reference"))[0].cos().sum()

    first = leaves[0].detach()
    torch.testing.assert_close(torch.func.grad(loss)(first), grads[0].detach())
    _, slope = torch.func.jvp(loss, (first,), (torch.ones_like(first),))
    torch.testing.assert_close(slope, grads[0].detach().sum())


@every_differentiable_op
def test_any_subset_of_gradients(spec: registry.OpSpec, device: str) -> None:
    sample = spec.samples(device, spec.dtypes[0])[0]
    everything = gradients(spec, with_leaves(spec, sample), spec.public)
    leaves, structure = tree_flatten(sample.args)
    for i in range(len(leaves)):
        args = tree_unflatten([t.detach().requires_grad_(i == j) for j, t in enumerate(leaves)], structure)
        same(gradients(spec, registry.Sample("one", args, sample.kwargs), spec.public), [everything[i]])


@every_sample
def test_compiles_without_a_break(spec: registry.OpSpec, name: str, device: str) -> None:
    torch._dynamo.reset()
    sample = with_leaves(spec, get(spec, name, device))
    compiled = torch.compile(spec.public, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.manual_seed(0)
    same(tensors(compiled(*sample.args, **sample.kwargs)), run(spec, sample))
    same(gradients(spec, sample, compiled), gradients(spec, sample, spec.public))


@every_op
def test_one_graph_for_every_size(spec: registry.OpSpec, device: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(spec.public, fullgraph=True, dynamic=True, backend=counter)
    sample = spec.samples(device, spec.dtypes[0])[0]
    compilations = []
    for repeat in (1, 2, 3):
        args = map_batched(spec, lambda t: torch.cat([t] * repeat), sample.args)  # noqa: B023
        grown = with_leaves(spec, registry.Sample("grown", args, sample.kwargs))
        same(gradients(spec, grown, compiled), gradients(spec, grown, spec.public))
        compilations.append(counter.frame_count)
    assert len(set(compilations)) == 1, "a size led to another graph"


@every_op
def test_compiled_code_follows_force_and_autocast(spec: registry.OpSpec, device: str) -> None:
    torch._dynamo.reset()
    sample = spec.samples(device, torch.float32)[0]
    compiled = torch.compile(spec.public, fullgraph=True, backend="aot_eager")
    compiled(*sample.args, **sample.kwargs)
    assert not backends.last().endswith("reference")
    path = backends.last()
    with backends.force("reference"):
        out = tensors(compiled(*sample.args, **sample.kwargs))[0]
    assert backends.last() == path, "the reference is traced, no op runs"
    torch.testing.assert_close(out, run(spec, sample)[0])
    if spec.autocast:
        with torch.autocast(device, dtype=torch.bfloat16):
            assert tensors(compiled(*sample.args, **sample.kwargs))[0].dtype == torch.bfloat16


class Call(torch.nn.Module):
    def __init__(self, spec: registry.OpSpec, sample: registry.Sample) -> None:
        super().__init__()
        self.spec, self.kwargs = spec, sample.kwargs

    def forward(self, *args: Any) -> Any:
        return self.spec.public(*args, **self.kwargs)


def export(spec: registry.OpSpec, sample: registry.Sample) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=2, max=1024)
    dynamic = (
        tree_map(
            lambda a, b: None if a is b else {0: batch},
            map_batched(spec, torch.clone, sample.args),
            sample.args,
        ),
    )
    program = torch.export.export(Call(spec, sample).eval(), sample.args, dynamic_shapes=dynamic)
    assert any("effkern" in str(node.target) for node in program.graph.nodes)
    return program


@every_op
def test_export(spec: registry.OpSpec, device: str) -> None:
    sample = spec.samples(device, spec.dtypes[0])[0]
    program = export(spec, sample)
    args = map_batched(spec, lambda t: torch.cat([t, t.flip(0)[:1]]), sample.args)
    same(tensors(program.module()(*args)), tensors(spec.public(*args, **sample.kwargs)))


@pytest.mark.slow
def test_inductor_and_aot_inductor(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One op through the C++ code generator, ahead of time and just in time."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch._dynamo.reset()
    spec = SPECS[0]
    sample = spec.samples("cpu", spec.dtypes[0])[0]
    package = torch._inductor.aoti_compile_and_package(
        export(spec, sample), package_path=str(tmp_path / "op.pt2")
    )
    loaded = torch._inductor.aoti_load_package(package)
    args = tuple(torch.cat([t, t]) for t in sample.args)
    same(tensors(loaded(*args)), tensors(spec.public(*args, **sample.kwargs)))
    sample = with_leaves(spec, sample)
    same(
        gradients(spec, sample, torch.compile(spec.public, fullgraph=True)),
        gradients(spec, sample, spec.public),
    )


@every_op
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap(spec: registry.OpSpec, device: str) -> None:
    """There is no batching rule: torch.vmap loops, and says so, but is right; where it cannot, the reference can."""
    how = {} if spec.vmap else {"backend": "reference"}
    sample = spec.samples(device, spec.dtypes[0])[0]
    stacked = map_tensors(
        lambda t: torch.stack([t, t.flip(0), -t if t.is_floating_point() else t]), sample.args
    )
    outputs = torch.vmap(lambda *a: spec.public(*a, **sample.kwargs, **how))(*stacked)
    for i in range(3):
        same(
            [o[i] for o in tensors(outputs)],
            tensors(spec.public(*map_tensors(lambda t: t[i], stacked), **sample.kwargs, **how)),  # noqa: B023
        )


@every_op
def test_every_backend_runs_or_says_why_not(spec: registry.OpSpec, device: str) -> None:
    sample = spec.samples(device, torch.float32)[0]
    rows = {row.device: row for row in backends.report(spec.name, torch.float32)}
    for backend in spec.backends:
        with backends.force(backend.name):
            assert backends.forced() == backend.name
            try:
                run(spec, sample)
            except backends.Unavailable as error:
                assert error.reason and error.reason in str(error)
                assert backend.name not in error.would_work and error.would_work
                reasons = {a.backend: a.reason for a in rows[device].alternatives}
                assert reasons[backend.name], "the report thought it could run"
            else:
                assert backends.last().startswith(f"{spec.name}:{backend.name}")
        assert backends.forced() is None
    run(spec, sample)
    assert backends.last().startswith(f"{spec.name}:{rows[device].backend}")


def test_unknown_backend_is_named() -> None:
    with (
        pytest.raises(ValueError, match="'metal' is unknown; expected one of reference, cpu"),
        backends.force("metal"),
    ):
        pass


@every_op
def test_flops_are_counted(spec: registry.OpSpec, device: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for sample in spec.samples(device, spec.dtypes[0]):
        with FlopCounterMode(display=False) as counter:
            total = sum(o.float().sum() for o in run(spec, with_leaves(spec, sample)))
            if spec.double_backward:
                total.backward()  # type: ignore[union-attr]
        counted = {str(op): flops for op, flops in counter.get_flop_counts().get("Global", {}).items()}
        assert counted.get(f"effkern.{spec.name}", 0) == spec.flops(*sample.args, **sample.kwargs)
        if spec.double_backward:
            backward = spec.flops(*sample.args, **sample.kwargs, backward=True)
            assert counted.get(f"effkern.{spec.name}_backward", 0) == backward
        assert spec.bytes(*sample.args, **sample.kwargs) >= sum(t.nbytes for t in floating(sample.args))
