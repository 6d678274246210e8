"""What the fuzzers, and reading for them, have found, each as the smallest call that shows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import effkern
from effkern.ops import _palette_layout as layout
from effkern.ops.palettize import Palette

X, K = torch.ones(1, 2, 8), torch.ones(2, 8)
SPARSE: dict[str, tuple[Callable[[], Any], str]] = {
    "long_conv": (lambda: effkern.long_conv(X.to_sparse(), K), "u"),
    "smooth_kernel": (lambda: effkern.smooth_kernel(K.to_sparse()), "k"),
    "vandermonde_kernel": (
        lambda: effkern.vandermonde_kernel((K * 1j).to_sparse(), K * -1j, torch.ones(2), 4),
        "C",
    ),
    "conv_accumulate": (lambda: effkern.conv_accumulate(X.to_sparse(), torch.ones(2, 15), X), "tile"),
    "butterfly_conv": (lambda: effkern.butterfly_conv(X, K.to_sparse(), effkern.butterfly_factors()), "k"),
    "monarch_project": (lambda: effkern.monarch_project(torch.ones(4, 4).to_sparse(), 2), "weight"),
    "monarch_dense": (
        lambda: effkern.monarch_dense(torch.ones(2, 2, 2).to_sparse(), torch.ones(2, 2, 2)),
        "w1",
    ),
    "palettize": (lambda: effkern.palettize(K.to_sparse(), torch.ones(2)), "weight"),
    "dkm": (lambda: effkern.dkm(K, torch.ones(2).to_sparse(), temperature=0.1), "centroids"),
    "palettized_linear": (
        lambda: effkern.palettized_linear(
            K, effkern.palettize(K, torch.ones(2)), low_rank=(K.to_sparse(), torch.ones(2, 2))
        ),
        r"low_rank\[0\]",
    ),
    "attention": (
        lambda: effkern.attention(X[None], X[None], X[None], bias=torch.eye(2).to_sparse()),
        "bias",
    ),
}


@pytest.mark.parametrize("op", SPARSE)
def test_sparse_arguments_are_named(op: str) -> None:
    call, argument = SPARSE[op]
    with pytest.raises(
        RuntimeError, match=f"^{op}: {argument} must be a dense strided tensor, got layout sparse"
    ):
        call()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_optional_arguments_that_are_no_tensors(backend: str) -> None:
    q, ends = torch.ones(2, 4, 8), torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises((TypeError, RuntimeError), match=r"attention.*cu_seqlens_q"):
        effkern.attention(q, q, q, cu_seqlens_q="x", cu_seqlens_k=ends, backend=backend)  # type: ignore[call-overload]
    q, lengths = torch.ones(1, 2, 1, 8), torch.ones(1, dtype=torch.int32)
    for name in ("page_table", "sink_logits"):
        with pytest.raises((TypeError, RuntimeError), match=rf"attention_decode.*{name}"):
            effkern.attention_decode(q, q, q, lengths, backend=backend, **{name: "x"})  # type: ignore[arg-type]


def test_palettize_without_numbers() -> None:
    """Shapes alone, as every other op gives them for meta tensors."""
    palette = effkern.palettize(torch.empty(4, 9, device="meta"), torch.empty(2, device="meta"))
    assert palette.indices.is_meta and palette.indices.shape == (4, layout.row_bytes(9, 1))
    assert palette.lut.is_meta and palette.bits == 1


def test_a_squash_beyond_float32() -> None:
    assert not effkern.smooth_kernel(torch.randn(9), squash=1e300).any()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_softcap_beyond_float32(backend: str) -> None:
    """Its product with tanh(0) would be NaN."""
    x = torch.ones(1, 1, 4, 8)
    with pytest.raises(RuntimeError, match=r"^attention: softcap must be finite"):
        effkern.attention(x, x, x, softcap=1e300, backend=backend)
    lengths = torch.full((1,), 4, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"^attention_decode: softcap must be finite"):
        effkern.attention_decode(x, x, x, lengths, softcap=1e300, backend=backend)


def test_a_projection_of_no_numbers() -> None:
    with pytest.raises(ValueError, match=r"^monarch_project: weight must have numbers, got a meta tensor"):
        effkern.monarch_project(torch.empty(4, 4, device="meta"), 2)


def test_indices_of_a_palette_with_other_strides() -> None:
    """As many rows as bytes in one, so that transposing them still fits the shape."""
    weight = torch.arange(36.0).reshape(4, 9)
    state = effkern.palettize(weight, torch.tensor([3.0, 30.0])).state_dict()
    assert state["indices"].shape == (4, layout.row_bytes(9, 1)) == (4, 4)
    flipped = Palette.from_state_dict({**state, "indices": state["indices"].mT})
    kept = Palette.from_state_dict({**state, "indices": state["indices"].mT.contiguous()})
    assert torch.equal(flipped.to_dense(), kept.to_dense())
