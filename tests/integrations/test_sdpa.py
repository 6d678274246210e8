"""`scaled_dot_product_attention` on effkern: what is routed equals PyTorch, the rest goes to PyTorch with a reason."""

from __future__ import annotations

import importlib
import importlib.util
import threading
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from pretrained_nets import ViTBlock
from torch import Tensor, nn

import effkern
from effkern.integrations import _sdpa_flash, sdpa
from effkern.testing import assert_close_to_oracle

DTYPES = [torch.float32, torch.bfloat16]
ORIGINAL = F.scaled_dot_product_attention


def inputs(
    dtype: torch.dtype = torch.float32, heads: int = 4, kv_heads: int = 4, dim: int = 24
) -> list[Tensor]:
    shapes = (2, heads, 19, dim), (2, kv_heads, 27, dim), (2, kv_heads, 27, 16)
    return [torch.randn(shape).to(dtype) for shape in shapes]


def grads(tensors: list[Tensor], dtype: torch.dtype | None, **options: Any) -> list[Tensor]:
    """The output and the gradient of every tensor, the last of which may be a bias."""
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    bias = {"attn_mask": leaves[3]} if len(leaves) > 3 else {}
    out = F.scaled_dot_product_attention(*leaves[:3], **bias, **options)
    torch.manual_seed(1)
    return [out, *torch.autograd.grad((out.double() * torch.randn(out.shape)).sum(), leaves)]


def compare(tensors: list[Tensor], **options: Any) -> None:
    """The rule of effkern.testing: PyTorch in the same dtype is the baseline, PyTorch in float64 the oracle."""
    oracle, baseline = grads(tensors, torch.float64, **options), grads(tensors, None, **options)
    with sdpa.route(strict=True) as calls:
        ours = grads(tensors, None, **options)
    assert calls.routed == 1 and effkern.backends.last().startswith("attention_backward:cpu/")
    for index, results in enumerate(zip(ours, baseline, oracle, strict=True)):
        assert_close_to_oracle(*results, what=f"result {index}", unit=4.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}], ids=str)
def test_plain(dtype: torch.dtype, options: dict[str, Any]) -> None:
    compare(inputs(dtype), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grouped_heads(dtype: torch.dtype) -> None:
    compare(inputs(dtype, kv_heads=2), is_causal=True, enable_gqa=True)


@pytest.mark.parametrize(
    "shape", [(19, 27), (2, 1, 1, 27), (1, 4, 19, 27), (2, 4, 19, 27), (4, 1, 27)], ids=str
)
def test_boolean_mask(shape: tuple[int, ...]) -> None:
    """Rows that see nothing among them."""
    mask = torch.rand(shape) < 0.6
    mask[..., 0, :] = False
    compare(inputs(), attn_mask=mask)


@pytest.mark.parametrize("shape", [(19, 27), (2, 1, 1, 27), (1, 4, 19, 27), (2, 4, 19, 27)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_additive_mask_and_its_gradient(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    compare([*inputs(dtype), torch.randn(shape).to(dtype)])


def test_three_dimensions() -> None:
    q, k, v = (t[:, 0] for t in inputs())
    compare([q, k, v], is_causal=True)
    compare([q, k, v], attn_mask=torch.rand(2, 19, 27) < 0.6)
    compare([q, k, v], attn_mask=torch.rand(19, 27) < 0.6)


def test_dropout() -> None:
    q, k, v = torch.zeros(1, 1, 64, 8), torch.zeros(1, 1, 512, 8), torch.ones(1, 1, 512, 8)
    with sdpa.route(strict=True):
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=0.25)
    assert abs(out.mean().item() - 1.0) < 0.02 and out.std() > 0.01


def test_autocast() -> None:
    q, k, v = inputs()
    with torch.autocast("cpu", torch.bfloat16), sdpa.route(strict=True):
        out = F.scaled_dot_product_attention(q, k, v)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), ORIGINAL(q, k, v), rtol=2e-2, atol=2e-2)


def test_compiled() -> None:
    def attend(*tensors: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*tensors, is_causal=True)

    with sdpa.route(strict=True) as calls:
        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")(*inputs())
    assert calls.routed == 1 and effkern.backends.last().startswith("attention:cpu/")
    assert compiled.isfinite().all()


def test_left_to_pytorch() -> None:
    """Each of these equals PyTorch to the bit, counts its reason, and raises where strict."""
    q, k, v = inputs()
    square = q[:, :, :16], k[:, :, :16], v[:, :, :16]
    wide = [torch.randn(1, 1, 4, 257) for _ in range(3)]
    mask = torch.rand(19, 27) < 0.7
    cases: list[tuple[tuple[Tensor, ...], dict[str, Any], str]] = [
        ((q.double(), k.double(), v.double()), {}, "not float64"),
        (tuple(wide), {}, "head dims go from 1 to 256, got 257"),
        ((q, k[:1], v[:1]), {}, "the batch has to be broadcast"),
        ((q, k[:, :1], v[:, :1]), {}, "enable_gqa is not set"),
        (tuple(t[None] for t in square), {}, "dimensions"),
        ((q.bfloat16(), k.bfloat16(), v.bfloat16()), {"attn_mask": mask.half()}, "attn_mask is float16"),
        ((q.to("meta"), k.to("meta"), v.to("meta")), {}, "not on the CPU"),
    ]
    for tensors, options, reason in cases:
        with sdpa.route() as calls:
            try:
                found: Any = F.scaled_dot_product_attention(*tensors, **options)
            except RuntimeError as error:  # PyTorch's own, which it also raises without effkern
                found = error
        assert calls.routed == 0 and calls.passed_on.total() == 1
        assert reason in str(calls) and "0 calls ran on effkern, 1 on PyTorch" in str(calls)
        if isinstance(found, Tensor):
            expected = ORIGINAL(*tensors, **options)
            assert found.is_meta or torch.equal(found, expected)
        else:
            with pytest.raises(RuntimeError, match=str(found)[:30].replace("(", ".").replace(")", ".")):
                ORIGINAL(*tensors, **options)
        with sdpa.route(strict=True), pytest.raises(RuntimeError, match="effkern cannot take this call"):
            F.scaled_dot_product_attention(*tensors, **options)
    with sdpa.route() as calls, pytest.raises(RuntimeError, match="is_causal"):
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=True)
    assert "attn_mask together with is_causal" in calls.passed_on


def test_torch_func_and_forward_mode_go_to_pytorch() -> None:
    q, k, v = inputs()
    with sdpa.route() as calls:
        mapped = torch.vmap(F.scaled_dot_product_attention)(q, k, v)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                out = F.scaled_dot_product_attention(dual, k, v)
            assert torch.autograd.forward_ad.unpack_dual(out).tangent is not None
    torch.testing.assert_close(mapped, ORIGINAL(q, k, v))
    assert calls.passed_on == {"torch.func transforms": 1, "forward-mode derivatives": 1}


def test_restored_after_errors_and_nested() -> None:
    with pytest.raises(KeyError), sdpa.route():
        assert F.scaled_dot_product_attention is not ORIGINAL
        raise KeyError
    assert F.scaled_dot_product_attention is ORIGINAL
    with sdpa.route() as outer:
        with sdpa.route() as inner:
            F.scaled_dot_product_attention(*inputs())
            F.scaled_dot_product_attention(*(t.double() for t in inputs()))
        F.scaled_dot_product_attention(*inputs())
    assert (inner.routed, inner.passed_on.total(), outer.routed, outer.passed_on.total()) == (1, 1, 1, 1)
    assert F.scaled_dot_product_attention is ORIGINAL


def test_blocks_that_close_in_another_order() -> None:
    first, second = sdpa.route(), sdpa.route()
    outer, inner = first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    F.scaled_dot_product_attention(*inputs())
    F.scaled_dot_product_attention(*(t.double() for t in inputs()))
    assert (inner.routed, inner.passed_on.total()) == (1, 1)
    assert (outer.routed, outer.passed_on.total()) == (0, 0)
    second.__exit__(None, None, None)
    assert F.scaled_dot_product_attention is ORIGINAL


def test_blocks_of_several_threads() -> None:
    """Each has entered before any leaves, and they leave in the order in which they entered."""
    entered, left = threading.Barrier(2), threading.Event()
    seen: list[int] = []

    def work(leaves_first: bool) -> None:
        with sdpa.route() as calls:
            entered.wait()
            F.scaled_dot_product_attention(*inputs())
            entered.wait()
            if not leaves_first:
                left.wait()
        left.set()
        seen.append(calls.routed)

    workers = [threading.Thread(target=work, args=(first,)) for first in (True, False)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sum(seen) == 2 and F.scaled_dot_product_attention is ORIGINAL


class Logged(Tensor):
    """A subclass that sees which functions it is given to."""

    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(func.__name__)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_subclasses_go_to_pytorch() -> None:
    q, k, v = inputs()
    with sdpa.route() as calls:
        F.scaled_dot_product_attention(q, k.as_subclass(Logged), v)
        mask = torch.ones(19, 27).as_subclass(Logged)
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        F.scaled_dot_product_attention(*map(nn.Parameter, (q, k, v)))
    assert Logged.seen.count("scaled_dot_product_attention") == 2
    assert calls.routed == 1 and list(calls.passed_on) == [
        "a tensor is a Logged, which has functions of its own"
    ]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_distributed_tensors_go_to_pytorch() -> None:
    from torch.distributed.tensor import DeviceMesh, Replicate, distribute_tensor

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = DeviceMesh("cpu", [0])
        tensors = inputs()
        spread = [distribute_tensor(t, mesh, [Replicate()]) for t in tensors]
        with sdpa.route() as calls, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            found = F.scaled_dot_product_attention(*spread)
        assert calls.routed == 0 and "DTensor" in str(calls)
        torch.testing.assert_close(found.full_tensor(), ORIGINAL(*tensors))
    finally:
        torch.distributed.destroy_process_group()


def layer_results(model: nn.Module, x: Tensor, **options: Any) -> list[Tensor]:
    out = model(x, **options)
    out = out[0] if isinstance(out, tuple) else out
    return [out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))]


def test_layers_of_pytorch_and_a_vit_block() -> None:
    """Outputs and parameter gradients, with backward outside the block."""
    x = torch.randn(2, 11, 8)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    padding = torch.arange(11)[None] >= torch.tensor([[11], [7]])
    for model, options in ((ViTBlock(), {}), (encoder, {}), (encoder, {"src_key_padding_mask": padding})):
        expected = layer_results(model, x, **options)
        with sdpa.route(strict=True) as calls:
            found = layer_results(model, x, **options)
        assert calls.routed == 1
        torch.testing.assert_close(found, expected)


@pytest.fixture(scope="module")
def timm() -> Any:
    for name in ("timm", "torchvision"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed; timm imports torchvision")
    return importlib.import_module("timm")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_timm_vit(timm: Any, dtype: torch.dtype) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=48, depth=3, num_classes=7).to(dtype)
    nn.init.normal_(model.head.weight)
    x = torch.randn(2, 3, 48, 48, dtype=dtype)
    oracle_model = timm.create_model("vit_tiny_patch16_224", img_size=48, depth=3, num_classes=7).double()
    oracle_model.load_state_dict(model.state_dict())
    oracle, baseline = layer_results(oracle_model, x.double()), layer_results(model, x)
    with sdpa.route(strict=True) as calls:
        ours = layer_results(model, x)
    assert calls.routed == 3 and effkern.backends.last().startswith("attention_backward:cpu/")
    for index, results in enumerate(zip(ours, baseline, oracle, strict=True)):
        assert_close_to_oracle(*results, what=f"result {index}", unit=64.0)


@pytest.fixture
def flash_on_cpu() -> Iterator[None]:
    """The functions that `register` hands to PyTorch for CUDA, behind the same operators on the CPU."""
    handle = _sdpa_flash.install("CPU")
    yield
    handle.remove()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads_last", [False, True])
def test_flash_operator(flash_on_cpu: None, dtype: torch.dtype, causal: bool, heads_last: bool) -> None:
    """Through PyTorch's own autograd formula, which passes on what the forward operator returned."""
    tensors = [torch.randn(2, h, 21, 16).to(dtype) for h in (4, 2, 2)]
    if heads_last:
        tensors = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    leaves = [t.clone().requires_grad_() for t in tensors]
    results = torch.ops.aten._scaled_dot_product_flash_attention(*leaves, 0.0, causal, scale=0.3)
    out, lse = results[:2]
    assert out.stride() == leaves[0].stride() and lse.shape == (2, 4, 21) and results[4:6] == (21, 21)
    assert results[6].dtype == torch.uint64 and results[6].shape == (2,)
    torch.manual_seed(1)
    weight = torch.randn(out.shape)
    ours = [out, *torch.autograd.grad((out.double() * weight).sum(), leaves)]
    assert effkern.backends.last().startswith("attention_backward:cpu/")
    options = {"is_causal": causal, "scale": 0.3, "enable_gqa": True}
    expected = [grads(tensors, kind, **options) for kind in (None, torch.float64)]
    for index, rows in enumerate(zip(ours, *expected, strict=True)):
        assert_close_to_oracle(*rows, what=f"result {index}", unit=4.0)


def test_flash_operator_replays_dropout(flash_on_cpu: None) -> None:
    """Out is linear in v with the weights that were not dropped: the gradient shows the same ones."""
    q, k = torch.randn(1, 1, 5, 8), torch.randn(1, 1, 64, 8)
    v = torch.randn(1, 1, 64, 8, requires_grad=True)
    out, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.5)
    (grad,) = torch.autograd.grad(out.sum(), v)
    torch.testing.assert_close((grad * v).sum(), out.sum())
    assert (out - ORIGINAL(q, k, v)).abs().max() > 0.1


@pytest.mark.parametrize("packed", [False, True])
def test_flash_operator_differentiates_with_alibi(flash_on_cpu: None, packed: bool) -> None:
    """PyTorch's backward operator has no argument for the slopes."""
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.3])
    cu = torch.tensor([0, 7, 30], dtype=torch.int32) if packed else None
    q, k, v = (torch.randn(*([30] if packed else [2, 30]), h, 16, requires_grad=True) for h in (4, 2, 2))
    out, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, cu, cu, 30, 30, 0.0, True, False, alibi_slopes=slopes
    )
    expected = effkern.attention(
        *(t.transpose(-3, -2) for t in (q, k, v)),
        causal=True,
        alibi_slopes=slopes,
        cu_seqlens_q=cu,
        cu_seqlens_k=cu,
    ).transpose(-3, -2)
    assert torch.equal(out, expected)
    found = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert effkern.backends.last().startswith("attention_backward:cpu/")
    torch.testing.assert_close(found, torch.autograd.grad(expected.square().sum(), (q, k, v)))


def test_packed_flash_operator(flash_on_cpu: None) -> None:
    cu = torch.tensor([0, 7, 30], dtype=torch.int32)
    q, k, v = (torch.randn(30, h, 16, requires_grad=True) for h in (4, 2, 2))
    window = {"window_size_left": 5, "window_size_right": -1}
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, cu, cu, 23, 23, 0.0, True, False, **window
    )
    expected, wanted_lse = effkern.attention(
        *(t.transpose(0, 1) for t in (q, k, v)),
        causal=True,
        mask=effkern.masks.SlidingWindow(5, None),
        cu_seqlens_q=cu,
        cu_seqlens_k=cu,
        return_lse=True,
    )
    assert torch.equal(out, expected.transpose(0, 1)) and torch.equal(lse, wanted_lse)
    found = torch.autograd.grad(out.square().sum(), (q, k, v))
    torch.testing.assert_close(found, torch.autograd.grad(expected.square().sum(), (q, k, v)))
    if hasattr(torch.ops.aten, "_flash_attention_forward_no_dropout_inplace"):  # new in torch 2.13
        into = torch.empty_like(out)
        with torch.no_grad():
            torch.ops.aten._flash_attention_forward_no_dropout_inplace(
                *(into, q, k, v, cu, cu, 23, 23, 0.0, True, False), **window
            )
        assert torch.equal(into, out)
    with pytest.raises(NotImplementedError, match="seqused_k is not supported"):
        torch.ops.aten._flash_attention_forward(
            *(q.detach(), k.detach(), v.detach(), cu, cu, 23, 23, 0.0, True, False), seqused_k=cu[1:]
        )


def test_register_and_restore() -> None:
    registry = torch.nn.attention
    sdpa.register()
    assert "effkern" in registry.list_flash_attention_impls()
    assert registry.current_flash_attention_impl() is None
    registry.activate_flash_attention_impl("effkern")
    assert registry.current_flash_attention_impl() == "effkern"
    registry.restore_flash_attention_impl()
    assert registry.current_flash_attention_impl() is None
