"""Decoding against the reference in float64: caches, pages, windows, ragged lengths, on every path of the machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_oracle import DTYPES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import effkern
from effkern.masks import Lambda, Mask, SlidingWindow
from effkern.reference.attention_decode import attention_decode as reference
from effkern.testing import errors

MASKS = [None, SlidingWindow(63, 0), Lambda(5, 20), Lambda(300, 64), SlidingWindow(40, 0) & Lambda(9, 100)]


def paged(cache: Tensor, page: int) -> tuple[Tensor, Tensor]:
    """The same cache in pages that lie in any order, NaN where nothing was written, and its page table."""
    b, heads, capacity, dim = cache.shape
    count = -(-capacity // page)
    order = torch.randperm(b * count + 3)[: b * count].reshape(b, count)
    pages = torch.full((b * count + 3, heads, page, dim), torch.nan, dtype=cache.dtype)
    room = torch.full((b, heads, count * page, dim), torch.nan, dtype=cache.dtype)
    room[:, :, :capacity] = cache
    pages[order.flatten()] = room.reshape(b, heads, count, page, dim).transpose(1, 2).flatten(0, 1)
    return pages, order.to(torch.int32)


def check(
    shape: tuple[int, ...],
    lengths: list[int],
    dtype: torch.dtype,
    page: int | None = None,
    mask: Mask | None = None,
    softcap: float = 0.0,
    sinks: bool = False,
) -> Tensor:
    """Holds the op against the reference, with NaN in all that must not be read; returns its output."""
    hq, hkv, queries, capacity, d, dv = shape
    b = len(lengths)
    q = torch.randn(b, hq, queries, d).to(dtype)
    k, v = torch.randn(b, hkv, capacity, d).to(dtype), torch.randn(b, hkv, capacity, dv).to(dtype)
    sink_logits = torch.randn(hq) if sinks else None
    seqlens = torch.tensor(lengths, dtype=torch.int32)
    exact_k, exact_v = k.double(), v.double()
    for entry, length in enumerate(lengths):
        k[entry, :, length:] = v[entry, :, length:] = torch.nan
    options: dict[str, Any] = {"mask": mask, "softcap": softcap, "sink_logits": sink_logits}
    table = None
    cache = k, v
    if page is not None:
        torch.manual_seed(1)
        k_pages, table = paged(k, page)
        torch.manual_seed(1)
        v_pages, _ = paged(v, page)
        cache = k_pages, v_pages
        for entry, length in enumerate(lengths):
            table[entry, -(-length // page) :] = -7
    out, lse = effkern.attention_decode(q, *cache, seqlens, page_table=table, return_lse=True, **options)
    assert effkern.backends.last().startswith("attention_decode:cpu/")
    expected, level = reference(q.double(), exact_k, exact_v, seqlens, **options)
    assert out.dtype == dtype and lse.dtype == torch.float32 and out.is_contiguous()
    rounding = torch.finfo(dtype).eps
    largest = max(1.0, expected.abs().max().item())
    assert errors(out, expected, "out").max_abs <= (rounding + 2e-5) * largest
    assert errors(lse, level, "lse").max_abs <= 1e-5 * max(
        1.0, level[level.isfinite()].abs().max().item() if level.isfinite().any() else 1.0
    )
    return out


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page", [None, 1, 7, 64])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_against_oracle(mask: Mask | None, page: int | None, dtype: torch.dtype, isa: str) -> None:
    check(
        (8, 2, 1, 700, 64, 64),
        [700, 0, 1, 333],
        dtype,
        page,
        mask,
        softcap=5.0 if page else 0.0,
        sinks=page == 7,
    )


@pytest.mark.sanitize
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 300, 128, 128), (6, 1, 5, 300, 33, 17), (4, 4, 2, 90, 256, 8), (32, 4, 3, 70, 40, 72)]
)
def test_shapes(shape: tuple[int, ...], isa: str) -> None:
    check(shape, [shape[3], shape[3] // 2], torch.float32)
    check(shape, [2, 0], torch.bfloat16, page=16)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_cache(data: st.DataObject, isa: str, threads: Callable[[int], None]) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))
    threads(draw(st.sampled_from([1, 2])))
    hkv, capacity = draw(st.integers(1, 3)), draw(st.integers(1, 900))
    lengths = draw(st.lists(st.integers(0, capacity), min_size=1, max_size=3))
    dims = st.sampled_from([1, 8, 20, 64, 100])
    shape = (hkv * draw(st.integers(1, 5)), hkv, draw(st.integers(1, 4)), capacity, draw(dims), draw(dims))
    check(
        shape,
        lengths,
        draw(st.sampled_from(DTYPES)),
        draw(st.one_of(st.none(), st.integers(1, 70))),
        draw(st.sampled_from(MASKS)),
        draw(st.sampled_from([0.0, 3.0])),
        draw(st.booleans()),
    )


def test_same_bits_for_any_number_of_threads(isa: str, threads: Callable[[int], None]) -> None:
    results = []
    for count in (1, 2, 2, 1):
        threads(count)
        torch.manual_seed(3)
        results.append(check((8, 2, 2, 3000, 64, 64), [3000, 1234], torch.bfloat16))
    assert all(torch.equal(result, results[0]) for result in results)


def test_equals_attention() -> None:
    """The last rows of full attention are what decoding gives."""
    q, k, v = torch.randn(2, 4, 50, 32), torch.randn(2, 2, 50, 32), torch.randn(2, 2, 50, 32)
    mask = Lambda(4, 20)
    full = effkern.attention(q, k, v, causal=True, mask=mask)
    lengths = torch.tensor([50, 50], dtype=torch.int32)
    last = effkern.attention_decode(q[:, :, -3:], k, v, lengths, mask=mask)
    torch.testing.assert_close(last, full[:, :, -3:])


def test_a_window_reads_only_its_keys() -> None:
    """NaN before the window, tiles away from it."""
    q, k, v = torch.randn(1, 2, 1, 16), torch.randn(1, 1, 5000, 16), torch.randn(1, 1, 5000, 16)
    k[:, :, 16:4000] = v[:, :, 16:4000] = torch.nan
    lengths = torch.tensor([5000], dtype=torch.int32)
    assert effkern.attention_decode(q, k, v, lengths, mask=Lambda(16, 512)).isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page", [None, 16, 50])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_on_the_gpu(mask: Mask | None, page: int | None, dtype: torch.dtype) -> None:
    q = torch.randn(3, 8, 2, 128).to(dtype)
    k, v = torch.randn(3, 2, 1500, 128).to(dtype), torch.randn(3, 2, 1500, 64).to(dtype)
    lengths = torch.tensor([1500, 0, 333], dtype=torch.int32)
    exact, level = reference(q.double(), k.double(), v.double(), lengths, mask=mask)
    cache, table = (k, v), None
    if page is not None:
        torch.manual_seed(1)
        k_pages, table = paged(k, page)
        torch.manual_seed(1)
        cache, table = (k_pages, paged(v, page)[0]), table.cuda()
    out, lse = effkern.attention_decode(
        q.cuda(), *(t.cuda() for t in cache), lengths.cuda(), page_table=table, mask=mask, return_lse=True
    )
    assert effkern.backends.last() == "attention_decode:triton"
    assert errors(out, exact, "out").max_abs <= 2 * torch.finfo(dtype).eps + 2e-5
    assert errors(lse, level, "lse").max_abs <= 1e-4 if dtype == torch.float32 else 2e-2
