"""Clustered layers of a model by palettised ones, and the way in from a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from effkern._convert_cluster import KINDS
from effkern._convert_cluster_report import ClusterReport
from effkern._convert_low_rank import correct
from effkern._convert_surgery import Filter, Place, Surgery, places, select
from effkern.nn._clustering import ClusteredWeight
from effkern.nn.clustered import ClusteredLinear
from effkern.nn.palettized import PalettizedEmbedding, PalettizedLinear, PalettizedWeight
from effkern.ops.palettize import Palette

_STORE = "weight_palette."  # the part of a palettised layer that has its palette


def finalize(
    model: nn.Module,
    *,
    only: Filter = None,
    skip: Filter = None,
    low_rank: int = 0,
    calibration: Iterable[Any] | None = None,
    dry_run: bool = False,
) -> ClusterReport:
    """Replaces the clustered layers of a model, in place, by palettised ones: what is left are indices and tables.

    Args:
        model: changed in place; what `cluster` made of it, trained or not (then this is post-training palettisation).
        only: the layers to replace: a pattern of their names ("*.mlp.*"), a class of clustered layers, a function of
            name and module, or a list of these; None takes all.
        skip: the layers to leave alone, in the same way.
        low_rank: the rank r of a correction of every linear layer, for which the palettised weight becomes W_c + B A,
            A (r, in) and B (out, r) in the weight's dtype, by `effkern.eora_factors`; at most min(in, out) of a layer.
            0 for none. Embeddings have none.
        calibration: what the corrections are made for: inputs of the model, each a tensor, a tuple of arguments, or a
            mapping of named ones. A few hundred tokens to a few thousand, of the kind that will be seen; with fewer
            than a layer has inputs, what they miss stays uncorrected.
        dry_run: the report is that of a conversion, and the model ends as it was: with a calibration it is run.

    Returns:
        A report as of `cluster`; errors are those of the palette, with its correction, against the trained weight.
        `.undo()` puts the clustered layers back, with the weights and centroids that they had. Until then the report
        keeps them in memory, the dense weights with them (`.held_bytes`), so the model is smaller in files at once,
        and in memory once the report is dropped or `.release()` was called.

    Raises:
        TypeError: model is a clustered layer itself: its `palette()` makes a PalettizedLinear; only or skip is none of
            the above.
        ValueError: a part of only or skip matches no clustered layer, low_rank is negative, one of low_rank and
            calibration is given without the other, a linear layer saw no input, or one that is not finite, or layers
            with tied weights ended with different centroids, as when only one of them ran in training. The model is
            then as it was.
        RuntimeError: a weight is not finite.

    Weights are rounded to the nearest of the centroids that the last forward in training ended with, the same as the
    model computes with in `eval()`. Layers with tied weights share a palette; corrections are each layer's own. Tables
    and corrections are Parameters, and require gradients where the weight did.

    The inputs go through the palettised model, in `eval()` and without gradients; every linear layer holds its mean of
    x x^T, (in, in) in float32, until its correction is made.

    A clustered layer is left alone, and the report says why, when only or skip leaves it out, and when its weight also
    belongs to a layer that they leave out.
    """
    if isinstance(model, ClusteredWeight):
        raise TypeError(
            "finalize: the model is a single layer itself; use PalettizedLinear(layer.palette(), layer.bias)"
        )
    if low_rank < 0:
        raise ValueError(f"finalize: low_rank must not be negative, got {low_rank}")
    if (calibration is None) != (low_rank == 0):
        raise ValueError(
            "finalize: low_rank and calibration belong together, one was given without the other"
        )
    surgery, made = Surgery("finalize", model), dict[int, nn.Module]()
    report = ClusterReport("finalize", dry_run, surgery=surgery)
    leaders: dict[int, tuple[str, PalettizedWeight]] = {}  # by the weight, which several layers may have
    found = _wanted(list(places(model, ClusteredWeight)), only, skip, report)
    _agree(found)
    for place in found:
        _, _, name, layer = place
        assert isinstance(layer, ClusteredWeight)
        if id(layer.weight) not in leaders:
            leaders[id(layer.weight)] = name, PalettizedWeight(layer.palette())
        store = leaders[id(layer.weight)][1]
        store.lut.requires_grad_(layer.weight.requires_grad)
        if id(layer) not in made:
            made[id(layer)] = _palettized(layer, store)
        surgery.replace(place, made[id(layer)])
    if calibration is None:
        surgery.perform(dry_run)
    else:
        with surgery.applied(dry_run):
            pairs = {
                name: (layer, made[id(layer)])
                for _, _, name, layer in found
                if type(layer) is ClusteredLinear
            }
            correct(model, pairs, low_rank, calibration)  # type: ignore[arg-type]
    for _, _, name, layer in found:
        assert isinstance(layer, ClusteredWeight)
        first, store = leaders[id(layer.weight)]
        factors = getattr(made[id(layer)], "low_rank", None)
        report.add(name, layer.weight, store.palette(), first, factors)
    return report


def _wanted(found: list[Place], only: Filter, skip: Filter, report: ClusterReport) -> list[Place]:
    """The places to convert; the report gets the others."""
    named = [(name, layer) for _, _, name, layer in found]
    reasons = select("finalize", "clustered layers", named, only, skip)
    stay = {id(layer.get_parameter("weight")) for _, _, name, layer in found if reasons[name] is not None}
    wanted = []
    for place in found:
        _, _, name, layer = place
        reason = reasons[name]
        if reason is None and id(layer.get_parameter("weight")) in stay:
            reason = "its weight also belongs to a layer that stays"
        if reason is None:
            wanted.append(place)
        else:
            report.skipped.append((name, reason))
    return wanted


def _agree(found: list[Place]) -> None:
    """One palette has to do for all layers of a weight: which of several centroids to take, only the user knows."""
    leaders: dict[int, tuple[str, ClusteredWeight]] = {}
    for _, _, name, layer in found:
        assert isinstance(layer, ClusteredWeight)
        first, leader = leaders.setdefault(id(layer.weight), (name, layer))
        if not torch.equal(leader.latest, layer.latest):
            raise ValueError(
                f"finalize: {first} and {name} have one weight, but ended with different centroids; copy those of the "
                "one that ran in training: other.latest.copy_(ran.latest)"
            )


def _palettized(layer: nn.Module, store: PalettizedWeight) -> nn.Module:
    new: nn.Module = PalettizedEmbedding(store)
    if isinstance(layer, ClusteredLinear):
        new = PalettizedLinear(store, layer.bias, backend=layer.backend)
    elif isinstance(layer, nn.Linear):
        new = PalettizedLinear(store, layer.bias)
    return new.train(layer.training)


def restore(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads the state_dict of a finalized model into a dense model like the one that it was made from.

    Args:
        model: changed in place: its linear layers and embeddings of which `state` has palettes become palettised
            layers. Its values do not matter, and it may be on the meta device.
        state: `state_dict()` of the finalized model, as safetensors or torch.save keep it. Of layers with tied weights
            one palette is enough.

    Raises:
        ValueError: a palette of `state` is corrupt, or belongs to no linear layer or embedding of the model.
        RuntimeError: what load_state_dict raises where the rest does not fit.

    After an error the model has the layers that it had. After a ValueError nothing has been changed; after a
    RuntimeError, layers that have no palette may have taken values of the file.
    """
    found = [
        place
        for place in places(model, KINDS)
        if type(place[3]) in KINDS and isinstance(place[3]._parameters.get("weight"), nn.Parameter)
    ]
    stores: dict[int, PalettizedWeight] = {}  # by the weight, which several layers may have
    ending = f".{_STORE}indices"
    wanted = {key.removesuffix(ending) for key in state if key.endswith(ending)}
    for _, _, name, layer in found:
        weight = layer.get_parameter("weight")
        if name in wanted and id(weight) not in stores:
            stores[id(weight)] = _store(name, weight, state)
        wanted.discard(name)
    if wanted:
        raise ValueError(f"restore: the model has no linear layer or embedding {sorted(wanted)}")
    complete, made = dict(state), dict[int, nn.Module]()
    surgery = Surgery("restore", model)
    for place in found:
        _, _, name, layer = place
        store = stores.get(id(layer.get_parameter("weight")))
        if store is None:
            continue
        if id(layer) not in made:
            made[id(layer)] = _palettized(layer, store)
        surgery.replace(place, made[id(layer)])
        entries = store.palette().state_dict()
        complete.update({f"{name}.{_STORE}{key}": entry for key, entry in entries.items()})
    with surgery.applied():
        model.load_state_dict(complete, assign=any(t.is_meta for t in model.state_dict().values()))


def _store(name: str, weight: Tensor, state: Mapping[str, Tensor]) -> PalettizedWeight:
    """The palette of a layer, checked, in memory of its own, where the layer's weight is."""
    prefix = f"{name}.{_STORE}"
    found = Palette.from_state_dict(
        {key.removeprefix(prefix): entry for key, entry in state.items() if key.startswith(prefix)}
    )
    if found.shape != tuple(weight.shape):
        raise ValueError(
            f"restore: the palette of {name} is of shape {found.shape}, its weight of {tuple(weight.shape)}"
        )
    device = found.indices.device if weight.is_meta else weight.device
    indices, lut = (t.to(device, copy=True) for t in (found.indices, found.lut))
    return PalettizedWeight(Palette(indices, lut, found.shape, found.bits, found.groups, found.dim))
