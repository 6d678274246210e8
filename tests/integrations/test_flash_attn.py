"""flash-attn's functions against their definition in float64: layouts, windows, packing, caches, refusals."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from attention_oracle import composition, packed_composition
from torch import Tensor

import effkern
from effkern.integrations import flash_attn
from effkern.masks import SlidingWindow
from effkern.reference.attention import attention as reference
from effkern.reference.attention_decode import attention_decode as decode_reference
from effkern.testing import assert_close_to_oracle

DTYPES = [torch.float32, torch.bfloat16]
WINDOWS = [(-1, -1), (7, 0), (5, 3), (-1, 4), (9, -1)]
PLAIN = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False"
)
CUMULATIVE = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
SIGNATURES = {  # of flash-attn 2.8
    "flash_attn_func": f"q, k, v, {PLAIN}",
    "flash_attn_kvpacked_func": f"q, kv, {PLAIN}",
    "flash_attn_qkvpacked_func": f"qkv, {PLAIN}",
    "flash_attn_varlen_func": f"q, k, v, {CUMULATIVE}, {PLAIN}, block_table=None",
    "flash_attn_varlen_kvpacked_func": f"q, kv, {CUMULATIVE}, {PLAIN}",
    "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {PLAIN}",
    "flash_attn_with_kvcache": (
        "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
        "cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, "
        "window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
        "return_softmax_lse=False"
    ),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    signature = inspect.signature(getattr(flash_attn, name))
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == f"({SIGNATURES[name]})"


def heads_first(t: Tensor) -> Tensor:
    return t.transpose(-3, -2)


def meaning(causal: bool, window: tuple[int, int]) -> dict[str, Any]:
    """flash-attn's arguments as those of the oracle."""
    left, right = (None if n < 0 else n for n in window)
    mask = None if left is right is None else SlidingWindow(left, None if causal else right)
    return {"causal": causal, "mask": mask}


def compare(call: Any, leaves: list[Tensor], oracle: Any, baseline: Any) -> None:
    """Output, lse and all gradients of `call`, `oracle` (float64) and `baseline`, functions of the same leaves."""
    results = []
    for function, dtype in ((call, None), (baseline, None), (oracle, torch.float64)):
        inputs = [t.detach().to(dtype or t.dtype).requires_grad_() for t in leaves]
        out, lse = function(*inputs)
        torch.manual_seed(1)
        weight = torch.randn(out.shape)
        seen = lse.isfinite()
        loss = (out.double() * weight).sum() + torch.where(seen, lse, 0.0).double().sum()
        results.append([out, lse, *torch.autograd.grad(loss, inputs)])
    assert results[0][0].is_contiguous() and results[0][0].dtype == leaves[0].dtype
    assert effkern.backends.last().startswith("attention_backward:cpu/")
    for index, (ours, composed, exact) in enumerate(zip(*results, strict=True)):
        assert_close_to_oracle(ours, composed, exact, f"result {index}", unit=4.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_dense(dtype: torch.dtype, causal: bool, window: tuple[int, int]) -> None:
    leaves = [torch.randn(2, s, h, d).to(dtype) for s, h, d in ((19, 4, 24), (37, 2, 24), (37, 2, 16))]
    options = meaning(causal, window)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return flash_attn.flash_attn_func(
            q, k, v, 0.0, 0.3, causal, window, deterministic=True, return_attn_probs=True
        )[:2]

    def other(function: Any) -> Any:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Any:
            out, lse = function(*map(heads_first, (q, k, v)), scale=0.3, **options)
            return heads_first(out), lse

        return run

    compare(call, leaves, other(reference), other(composition))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softcap_and_alibi(dtype: torch.dtype) -> None:
    leaves = [torch.randn(1, s, h, 16).to(dtype) for s, h in ((9, 4), (23, 4), (23, 4))]
    slopes = effkern.masks.alibi_slopes(4)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return flash_attn.flash_attn_func(
            q, k, v, causal=True, softcap=2.5, alibi_slopes=slopes, return_attn_probs=True
        )[:2]

    def other(function: Any) -> Any:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Any:
            tensors = map(heads_first, (q, k, v))
            out, lse = function(*tensors, causal=True, softcap=2.5, alibi_slopes=slopes)
            return heads_first(out), lse

        return run

    compare(call, leaves, other(reference), other(composition))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [(-1, -1), (6, 2)], ids=str)
def test_varlen(dtype: torch.dtype, window: tuple[int, int]) -> None:
    cu_q, cu_k = (
        torch.tensor([0, 5, 5, 22], dtype=torch.int32),
        torch.tensor([0, 9, 12, 30], dtype=torch.int32),
    )
    leaves = [torch.randn(t, h, d).to(dtype) for t, h, d in ((22, 4, 24), (30, 2, 24), (30, 2, 24))]
    options = {**meaning(True, window), "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}

    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return flash_attn.flash_attn_varlen_func(
            *(q, k, v, cu_q, cu_k, 17, 18), causal=True, window_size=window, return_attn_probs=True
        )[:2]

    def other(function: Any) -> Any:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Any:
            out, lse = function(*map(heads_first, (q, k, v)), **options)
            return heads_first(out), lse

        return run

    compare(call, leaves, other(reference), other(packed_composition))


def test_packed_forms_give_the_same_bits() -> None:
    """The stacked forms are the plain ones on views, gradients included."""
    cu = torch.tensor([0, 11, 32], dtype=torch.int32)
    options: dict[str, Any] = {"causal": True, "window_size": (8, 0), "softmax_scale": 0.2}
    for shape, axis, kind, extra in (
        ((2, 16, 3, 2, 24), 2, "", ()),
        ((32, 3, 2, 24), 1, "varlen_", (cu, cu, 21, 21)),
    ):
        plain, two, three = (
            getattr(flash_attn, f"flash_attn_{kind}{form}func") for form in ("", "kvpacked_", "qkvpacked_")
        )
        qkv = torch.randn(shape, requires_grad=True)
        q, k, v = qkv.unbind(axis)
        wanted = plain(q, k, v, *extra, **options)
        (grad,) = torch.autograd.grad(wanted.square().sum(), qkv)
        for found in (
            three(qkv, *extra[1:3], **options),
            two(q, torch.stack((k, v), axis), *extra, **options),
        ):
            assert torch.equal(found, wanted)
            assert torch.equal(torch.autograd.grad(found.square().sum(), qkv)[0], grad)


def test_dropout_keeps_the_mean() -> None:
    q, k = (torch.zeros(1, s, 1, 8) for s in (64, 512))
    v = torch.ones(1, 512, 1, 8, requires_grad=True)
    out = flash_attn.flash_attn_func(q, k, v, dropout_p=0.25)
    assert abs(out.mean().item() - 1.0) < 0.02 and out.std() > 0.01
    torch.manual_seed(3)
    first = flash_attn.flash_attn_func(q, k, v, dropout_p=0.25)
    torch.manual_seed(3)
    assert torch.equal(first, flash_attn.flash_attn_func(q, k, v, dropout_p=0.25))


def cache_oracle(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, causal: bool, mask: SlidingWindow | None
) -> tuple[Tensor, Tensor]:
    """float64, one query after the other where they have no order."""
    k, v = (heads_first(t).double().nan_to_num() for t in (k, v))
    rows = [heads_first(q).double()] if causal else heads_first(q).double().split(1, 2)
    parts = [decode_reference(row, k, v, lengths, mask=mask, softcap=3.0) for row in rows]
    out, lse = (torch.cat(side, 2) for side in zip(*parts, strict=True))
    return heads_first(out), lse


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries, causal, window", [(1, False, (-1, -1)), (1, False, (9, 2)), (3, True, (-1, -1)),
                                                     (3, True, (6, 1)), (4, False, (-1, -1))])  # fmt: skip
@pytest.mark.parametrize("form", ["plain", "indexed", "paged"])
def test_cache(form: str, queries: int, causal: bool, window: tuple[int, int], dtype: torch.dtype) -> None:
    """New keys are written in place, and nothing behind the last one is read."""
    b, capacity, hkv, d, page = 3, 48, 2, 24, 8
    before = torch.tensor([5, 30, 0], dtype=torch.int32)
    q = torch.randn(b, queries, 6, d).to(dtype)
    new = [torch.randn(b, queries, hkv, d).to(dtype) for _ in range(2)]
    whole = [torch.full((b, capacity, hkv, d), torch.nan, dtype=dtype) for _ in range(2)]
    stored: list[Tensor] = []
    place: dict[str, Tensor] = {}
    for cache, fresh in zip(whole, new, strict=True):
        for entry, length in enumerate(before.tolist()):
            cache[entry, :length] = torch.randn(length, hkv, d).to(dtype)
        if form == "plain":
            stored.append(cache.clone())
        elif form == "indexed":
            place["cache_batch_idx"] = torch.tensor([4, 0, 2], dtype=torch.int32)
            stored.append(torch.full((5, capacity, hkv, d), torch.nan, dtype=dtype))
            stored[-1][[4, 0, 2]] = cache
        else:
            order = torch.arange(b * capacity // page).flip(0).reshape(b, -1)
            place["block_table"] = order.to(torch.int32)
            stored.append(torch.empty(b * capacity // page, page, hkv, d, dtype=dtype))
            stored[-1][order] = cache.unflatten(1, (-1, page))
        for entry, length in enumerate(before.tolist()):
            cache[entry, length : length + queries] = fresh[entry]
    out, lse = flash_attn.flash_attn_with_kvcache(
        *(q, *stored, *new),
        cache_seqlens=before,
        causal=causal,
        window_size=window,
        softcap=3.0,
        return_softmax_lse=True,
        **place,
    )
    assert effkern.backends.last().startswith("attention_decode:cpu/")
    mask = None if window[0] < 0 else SlidingWindow(window[0], None)
    expected = cache_oracle(q, *whole, before + queries, causal, mask)
    for ours, exact in zip((out, lse), expected, strict=True):
        assert ours.isfinite().all()
        assert_close_to_oracle(ours, exact.to(dtype if ours is out else lse.dtype), exact, form, unit=4.0)
    key_cache = stored[0]
    if form == "indexed":
        key_cache = key_cache[[4, 0, 2]]
    elif form == "paged":
        key_cache = key_cache[place["block_table"].long()].flatten(1, 2)
    for entry, length in enumerate(before.tolist()):
        assert torch.equal(key_cache[entry, length : length + queries], new[0][entry])
        assert key_cache[entry, length + queries :].isnan().all()


def test_cache_lengths_as_one_number_or_none() -> None:
    q, k, v = torch.randn(2, 1, 4, 16), torch.randn(2, 12, 2, 16), torch.randn(2, 12, 2, 16)
    full = flash_attn.flash_attn_with_kvcache(q, k, v)
    assert torch.equal(full, flash_attn.flash_attn_with_kvcache(q, k, v, cache_seqlens=12))
    shorter = flash_attn.flash_attn_with_kvcache(q, k[:, :7], v[:, :7])
    torch.testing.assert_close(shorter, flash_attn.flash_attn_with_kvcache(q, k, v, cache_seqlens=7))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"window_size": (1, 0)}, NotImplementedError, "needs causal=True"),
        ({"window_size": (1, 2, 3)}, RuntimeError, "window_size must be"),
        ({"block_table": torch.tensor([[-1], [0]])}, RuntimeError, r"page_table\[0, 0\] is -1, there are 2"),
        ({"block_table": torch.tensor([[0], [2]])}, RuntimeError, r"page_table\[1, 0\] is 2, there are 2"),
        ({"cache_batch_idx": torch.tensor([0, 5])}, RuntimeError, r"page_table\[1, 0\] is 5"),
        ({"cache_seqlens": torch.tensor([1, 1])}, RuntimeError, "cache_seqlens must be int32"),
        ({"cache_seqlens": torch.tensor([1, 9]).int()}, RuntimeError, "do not fit the capacity 6"),
        ({"q": torch.zeros(2, 2, 2, 8, dtype=torch.bfloat16)}, RuntimeError, "but q is bfloat16"),
        ({"q": torch.zeros(2, 2, 3, 8), "causal": True}, RuntimeError, "does not divide q's 3"),
        ({"v": torch.zeros(2, 2, 2, 8, device="meta")}, RuntimeError, "v is on meta"),
        ({"softmax_scale": float("nan")}, RuntimeError, "scale must be finite"),
        ({"softcap": float("inf")}, RuntimeError, "softcap must be finite"),
    ],
)
def test_calls_that_are_refused_leave_the_caches_alone(
    change: dict[str, Any], error: type[Exception], match: str
) -> None:
    args: dict[str, Any] = {name: torch.randn(2, 2, 2, 8) for name in ("q", "k", "v")}
    caches = [torch.randn(2, 6, 2, 8) for _ in range(2)]
    before = [cache.clone() for cache in caches]
    for name in ("block_table", "cache_batch_idx"):
        if name in change:
            change = {**change, name: change[name].int()}
    args |= {"cache_seqlens": 1, "k_cache": caches[0], "v_cache": caches[1], **change}
    with pytest.raises(error, match=match):
        flash_attn.flash_attn_with_kvcache(**args)
    for cache, kept in zip(caches, before, strict=True):
        assert torch.equal(cache, kept)


def test_padding_round_trip() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1]])
    x = torch.randn(3, 4, 2, 5, requires_grad=True)
    tokens, indices, cu_seqlens, longest, used = flash_attn.unpad_input(x, mask)
    assert torch.equal(tokens, x[mask.bool()]) and longest == 3
    assert cu_seqlens.tolist() == [0, 2, 2, 5] and cu_seqlens.dtype == torch.int32
    assert used.tolist() == [2, 0, 3] and indices.tolist() == [0, 1, 9, 10, 11]
    padded = flash_attn.pad_input(tokens, indices, 3, 4)
    assert torch.equal(padded, x * mask[:, :, None, None])
    (grad,) = torch.autograd.grad(padded.sum(), x)
    assert torch.equal(grad, mask[:, :, None, None].expand_as(x).float())
    unused = torch.tensor([[0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    _, _, cu_seqlens, _, used = flash_attn.unpad_input(x, mask, unused)
    assert cu_seqlens.tolist() == [0, 3, 3, 6] and used.tolist() == [2, 0, 3]


def refused(name: str, *args: Any, **options: Any) -> None:
    getattr(flash_attn, name)(*args, **options)


def test_refusals() -> None:
    q = torch.randn(2, 3, 2, 8)
    cu = torch.tensor([0, 3, 6], dtype=torch.int32)
    slopes, table = torch.ones(2, 2), torch.zeros(2, 1, dtype=torch.int32)
    packed = (q.flatten(0, 1),) * 3
    not_there: list[tuple[str, tuple[Any, ...], dict[str, Any], str]] = [
        ("flash_attn_func", (q, q, q), {"alibi_slopes": slopes}, "alibi_slopes must have shape"),
        ("flash_attn_func", (q, q, q), {"dropout_p": 0.1, "return_attn_probs": True}, "return_attn_probs"),
        (
            "flash_attn_varlen_func",
            (*packed, cu, cu, 3, 3),
            {"block_table": table},
            "block_table must be None",
        ),
        ("flash_attn_with_kvcache", (q, q, q), {"rotary_cos": torch.ones(3, 4)}, "rotary_cos must be None"),
        ("flash_attn_with_kvcache", (q, q, q), {"rotary_sin": torch.ones(3, 4)}, "rotary_sin must be None"),
        ("flash_attn_with_kvcache", (q, q, q), {"cache_leftpad": cu[:2]}, "cache_leftpad must be None"),
        ("flash_attn_with_kvcache", (q, q, q), {"alibi_slopes": slopes[0]}, "alibi_slopes must be None"),
        ("flash_attn_with_kvcache", (q, q, q), {"window_size": (1, 0)}, "needs causal=True"),
        ("flash_attn_with_kvcache", (q, q, q), {"window_size": (1, -1)}, "needs causal=True"),
        (
            "flash_attn_with_kvcache",
            (q, q, q),
            {"block_table": table, "cache_batch_idx": table[:, 0]},
            "exclude each other",
        ),
        ("flash_attn_with_kvcache", (q.clone().requires_grad_(), q, q), {}, "no gradient"),
    ]
    for name, args, options, message in not_there:
        with pytest.raises(NotImplementedError, match=f"{name}: .*{message}"):
            refused(name, *args, **options)
    wrong: list[tuple[str, tuple[Any, ...], dict[str, Any], str]] = [
        ("flash_attn_func", (q[0], q, q), {}, r"q must have shape .* got \(3, 2, 8\)"),
        ("flash_attn_qkvpacked_func", (q,), {}, "qkv must have shape"),
        ("flash_attn_kvpacked_func", (q, q), {}, "kv must have shape"),
        ("flash_attn_func", (q, q, q), {"window_size": (1, 2, 3)}, "window_size must be"),
        ("flash_attn_with_kvcache", (q, q, q, q), {"cache_seqlens": 0}, "new keys need"),
        ("flash_attn_with_kvcache", (q, q, q, q, q), {"cache_seqlens": 1}, "do not fit the capacity 3"),
        ("flash_attn_with_kvcache", (q, q, q, q[:1], q), {"cache_seqlens": 0}, "k must have shape"),
        ("flash_attn_with_kvcache", (q, q[0], q), {}, "k_cache must have 4 dimensions"),
    ]
    for name, args, options, message in wrong:
        with pytest.raises(RuntimeError, match=f"{name}: .*{message}"):
            refused(name, *args, **options)
