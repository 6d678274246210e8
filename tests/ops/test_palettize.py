"""Palettes: nearest centroids and ties, the packed layout, what a state_dict may hold, bits per weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import effkern
from effkern.ops import _palette_layout as layout
from effkern.ops.palettize import Palette

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FUZZ = settings(max_examples=80, deadline=None, derandomize=True)


def nearest(weight: Tensor, lut: Tensor, groups: int, dim: int) -> Tensor:
    """By all distances; argmin of equal ones is the first."""
    vectors = weight.double().reshape(groups, -1, 1, dim)
    tables = lut.double().reshape(groups, 1, -1, dim)
    distance = (vectors - tables).square().sum(-1)
    ties = distance == distance.amin(-1, keepdim=True)
    index = torch.where(ties, torch.arange(ties.shape[-1]), ties.shape[-1]).amin(-1)
    picked = tables[:, 0].gather(1, index[..., None].expand(-1, -1, dim))
    return picked.reshape(weight.shape).to(lut.dtype)


@pytest.mark.sanitize
@FUZZ
@given(data=st.data())
def test_dense_is_the_nearest_centroid(data: st.DataObject) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))
    groups, dim = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4]))
    clusters = draw(st.one_of(st.integers(1, 20), st.integers(1, 256)))
    shape = [groups * draw(st.integers(1, 3)), dim * draw(st.integers(1, 300))]
    if draw(st.booleans()):
        shape.insert(1, draw(st.integers(1, 3)))
    dtype = draw(st.sampled_from(DTYPES))
    weight, centroids = torch.randn(shape).to(dtype), torch.randn(groups, clusters, dim)
    if draw(st.booleans()):  # many ties and repeated centroids
        weight, centroids = weight.round(), centroids.round()
    centroids = centroids.reshape([*([groups] if groups > 1 else []), clusters, *([dim] if dim > 1 else [])])
    palette = effkern.palettize(weight, centroids, groups=groups, dim=dim)
    dense = palette.to_dense()
    assert dense.dtype == dtype and palette.shape == tuple(shape)
    assert torch.equal(dense, nearest(weight, palette.lut, groups, dim))
    assert palette.lut.shape == centroids.shape and torch.equal(palette.lut, centroids.to(dtype))
    assert palette.bits == min(b for b in (1, 2, 3, 4, 6, 8) if 2**b >= clusters)
    again = effkern.palettize(dense, centroids, groups=groups, dim=dim)
    assert torch.equal(again.to_dense(), dense)
    if len(centroids.reshape(groups, -1, dim)[0].unique(dim=0)) == clusters:
        assert groups > 1 or torch.equal(again.indices, palette.indices)
    back = Palette.from_state_dict(palette.state_dict())
    assert torch.equal(back.to_dense(), dense) and back.shape == palette.shape
    bytes_stored = palette.indices.numel() + palette.lut.nbytes
    assert palette.bits_per_weight == 8 * bytes_stored / weight.numel()


@FUZZ
@given(
    bits=st.sampled_from(layout.BITS),
    rows=st.integers(1, 3),
    count=st.one_of(st.integers(1, 70), st.integers(1, 1200)),
)
def test_layout(bits: int, rows: int, count: int) -> None:
    """Field by field as the docstring has it, and not a word more than the fields need."""
    indices = torch.randint(2**bits, (rows, count), dtype=torch.uint8)
    packed = layout.pack(indices, bits)
    assert packed.shape == (rows, layout.row_bytes(count, bits)) and packed.dtype == torch.uint8
    assert torch.equal(layout.unpack(packed, count, bits), indices)
    per_lane, each = layout.words_of(bits), 32 // bits
    fields = layout.fields_of(bits)
    assert 8 * packed.shape[1] < bits * count + 32 * per_lane
    octets = packed[0].tolist()
    words = [int.from_bytes(bytes(octets[i : i + 4]), "little") for i in range(0, len(octets), 4)]
    for position in range(count):
        block, inside = divmod(position, 16 * fields)
        lanes = min(16, -(-(count - block * 16 * fields) // fields))
        field, lane = divmod(inside, lanes)
        word = [words[(block * 16 + 0) * per_lane + w * lanes + lane] for w in range(per_lane)]
        if field < each * per_lane:
            value = word[field // each] >> bits * (field % each) & (2**bits - 1)
        elif bits == 6:
            value = word[0] >> 30 | word[1] >> 30 << 2 | word[2] >> 30 << 4
        elif field == 30:
            value = word[0] >> 30 | (word[2] >> 30 & 1) << 2
        else:
            value = word[1] >> 30 | word[2] >> 31 << 2
        assert value == indices[0, position]


def test_bits_per_weight() -> None:
    weight = torch.randn(4096, 4096).bfloat16()
    one = effkern.palettize(weight, torch.linspace(-2, 2, 8))
    assert one.bits == 3 and f"{one.bits_per_weight:.4f}" == "3.0000"
    many = effkern.palettize(weight, torch.linspace(-2, 2, 8).repeat(256, 1))
    assert many.lut.shape == (256, 8) and f"{many.bits_per_weight:.3f}" == "3.002"
    assert torch.equal(one.to_dense(), many.to_dense())


def test_ties_go_to_the_lower_index() -> None:
    """Whatever the order of the centroids, and with -0 beside 0."""
    weight = torch.tensor([[0.5, 1.5, -0.0, 7.0, 0.75]])
    first = effkern.palettize(weight, torch.tensor([1.0, 0.0, 2.0, 1.0]))
    assert layout.unpack(first.indices, 5, first.bits).tolist() == [[0, 0, 1, 2, 0]]
    second = effkern.palettize(weight, torch.tensor([2.0, 0.0, -0.0, 1.0]))
    assert layout.unpack(second.indices, 5, second.bits).tolist() == [[1, 0, 1, 0, 3]]
    pairs = effkern.palettize(weight[:, :2], torch.tensor([[1.0, 2.0], [0.0, 1.0], [0.0, 2.0]]), dim=2)
    assert layout.unpack(pairs.indices, 1, pairs.bits).tolist() == [[0]]


@pytest.mark.parametrize("shape", [(1, 8), (1, 8, 2), (4, 8, 1), (1, 8, 1), (4, 8, 2)], ids=str)
def test_axes_of_size_one_are_not_kept(shape: tuple[int, ...]) -> None:
    centroids, weight = torch.randn(shape), torch.randn(8, 12)
    palette = effkern.palettize(weight, centroids)
    assert tuple(palette.lut.shape) == tuple(n for n in shape if n > 1)
    back = Palette.from_state_dict(palette.state_dict())
    assert torch.equal(back.to_dense(), palette.to_dense())


def test_neighbours_in_float64() -> None:
    """The middle of two numbers without another between them is one of them."""
    least = torch.finfo(torch.float64).eps
    centroids = 1.0 + least * torch.arange(9, dtype=torch.float64)
    for table in (centroids, centroids.flip(0), -centroids):
        for first in range(8):
            pair = table[first : first + 2]
            dense = effkern.palettize(table[None], pair).to_dense()[0]
            assert torch.equal(dense[first : first + 2], pair)
            below, above = pair.sort().values
            assert torch.equal(dense, torch.where(table <= below, below, above))


def test_odd_sizes() -> None:
    one = effkern.palettize(torch.tensor([2.5]), torch.tensor([1.0, 3.0]))
    assert one.to_dense().tolist() == [3.0] and one.bits == 1
    vector = effkern.palettize(torch.arange(12.0), torch.tensor([[0.0, 5.0], [6.0, 11.0]]), groups=2)
    assert vector.to_dense().tolist() == [0.0] * 3 + [5.0] * 3 + [6.0] * 3 + [11.0] * 3
    weight = torch.randn(64, 48).T[::2]
    assert torch.equal(
        effkern.palettize(weight, torch.linspace(-1, 1, 256)).to_dense(),
        effkern.palettize(weight.contiguous(), torch.linspace(-1, 1, 256)).to_dense(),
    )
    # A table of its own memory: what happens to the centroids later does not matter.
    centroids = torch.tensor([0.0, 1.0])
    palette = effkern.palettize(torch.ones(2, 2), centroids)
    centroids.fill_(5.0)
    assert palette.to_dense().tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_clustered_and_packed_again() -> None:
    """From k-means to packed, for every table layout."""
    weight = torch.randn(24, 32).bfloat16()
    for groups, dim in ((1, 1), (6, 1), (1, 2), (3, 4)):
        centroids = effkern.kmeans_init(weight, 8, groups=groups, dim=dim)
        palette = effkern.palettize(weight, centroids, groups=groups, dim=dim)
        error = (palette.to_dense() - weight).float().square().mean()
        assert error < (0.1 if dim == 1 else 0.6)


W = torch.randn(6, 8)
BAD = [
    (W, torch.zeros(257), "clusters of centroids must be between 1 and 256, got 257", ValueError),
    (W, torch.zeros(2, 300, 2), "clusters of centroids must be between 1 and 256, got 300", ValueError),
    (W, torch.zeros(4, 3), "does not divide the 6 rows of weight|groups 4 does not divide", ValueError),
    (W, torch.zeros(4, 8, 1, 1), r"centroids must have shape \(k\)", ValueError),
    (W, torch.zeros(0), r"centroids must have shape \(k\)", ValueError),
    (W, torch.zeros(2, 4), r"could be \(groups, k\) or \(k, dim\)", ValueError),
    (W[:, :6], torch.zeros(2, 5, 4), "dim 4 does not divide the last axis", ValueError),
    (W, torch.zeros(2, 5, 3), "dim must be 1, 2 or 4, got 3", ValueError),
    (W, torch.tensor([0.0, torch.nan]), "centroids has entries that are not finite", RuntimeError),
    (
        W.half(),
        torch.tensor([0.0, 1e6]),
        "centroids has entries that are not finite in float16",
        RuntimeError,
    ),
    (W / 0, torch.zeros(2), "weight has entries that are not finite", RuntimeError),
    (W[:0], torch.zeros(2), "weight must not be empty", RuntimeError),
    (W.long(), torch.zeros(2), "weight must be float32", RuntimeError),
    (W, torch.zeros(2).long(), "centroids must be floating", TypeError),
    (W, [0.0], "centroids must be a tensor, got list", TypeError),
    (None, torch.zeros(2), "weight must be a tensor, got NoneType", TypeError),
    (W, torch.zeros(2, device="meta"), "centroids is on another device than weight", RuntimeError),
]


@pytest.mark.parametrize(("weight", "centroids", "match", "error"), BAD)
def test_clear_error(weight: Tensor, centroids: Tensor, match: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"palettize: .*({match})"):
        effkern.palettize(weight, centroids)


def test_groups_and_dim_must_fit_the_shape() -> None:
    centroids = torch.randn(2, 4)
    assert effkern.palettize(W, centroids, groups=2).dim == 1
    assert effkern.palettize(W, centroids, dim=4).groups == 1
    assert effkern.palettize(W, centroids, groups=1).dim == 4
    assert effkern.palettize(W, centroids, dim=1).groups == 2
    for kwargs in ({"groups": 3}, {"dim": 2}, {"groups": 2, "dim": 4}, {"groups": 1, "dim": 1}):
        with pytest.raises(ValueError, match="does not fit groups"):
            effkern.palettize(W, centroids, **kwargs)  # type: ignore[arg-type]


def state(**changes: object) -> dict[str, Tensor]:
    found: dict = effkern.palettize(W, torch.linspace(-1, 1, 5)).state_dict()
    return {k: v for k, v in {**found, **changes}.items() if v is not None}  # type: ignore[misc]


CORRUPT = [
    ({"indices": state()["indices"][:, :-1]}, "indices has shape .* truncated"),
    ({"indices": state()["indices"][:-1]}, "indices has shape"),
    ({"indices": state()["indices"].int()}, "indices must be uint8"),
    ({"indices": torch.full_like(state()["indices"], 255)}, "indices is corrupt: index 7 of a table of 5"),
    ({"indices": None}, "expected the entries"),
    ({"bias": torch.zeros(1)}, "expected the entries"),
    ({"lut": torch.zeros(9)}, "lut has shape"),
    ({"lut": torch.zeros(2, 4)}, "lut has shape"),
    ({"lut": torch.zeros(0)}, "lut has shape"),
    ({"lut": torch.zeros(5).long()}, "lut must be floating"),
    ({"lut": torch.full((5,), torch.nan)}, "lut has entries that are not finite"),
    ({"lut": [0.0]}, "lut must be a tensor"),
    ({"shape": torch.tensor([6, 80])}, "indices has shape"),
    ({"shape": torch.tensor([6, -8])}, "shape must be positive"),
    ({"shape": torch.tensor([6.0, 8.0])}, "shape must be a vector of int64"),
    ({"layout": torch.tensor([5, 1, 1])}, "bits must be one of"),
    ({"layout": torch.tensor([3, 4, 1])}, "groups 4 does not divide"),
    ({"layout": torch.tensor([3, 1, 3])}, "dim 3 does not fit"),
    ({"layout": torch.tensor([3, 1])}, "layout must be"),
]


@pytest.mark.parametrize(("changes", "match"), CORRUPT)
def test_corrupt_state(changes: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=rf"Palette.from_state_dict: {match}"):
        Palette.from_state_dict(state(**changes))
    assert Palette.from_state_dict(state()).bits == 3
