"""Linear layers and embeddings of a model by clustered ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from effkern._convert_cluster_report import ClusterReport
from effkern._convert_surgery import Filter, Place, Surgery, memory, places, select, weight_reason
from effkern.nn._clustering import ClusteredWeight
from effkern.nn.clustered import ClusteredEmbedding, ClusteredLinear, refusal
from effkern.ops.palettize import Palette

KINDS = (nn.Linear, nn.Embedding)


def cluster(
    model: nn.Module,
    bits: int = 3,
    *,
    only: Filter = None,
    skip: Filter = None,
    importance: Mapping[str, Tensor] | None = None,
    dry_run: bool = False,
    **options: Any,
) -> ClusterReport:
    """Replaces the linear layers and embeddings of a model, in place, by layers that train with clustered weights.

    Args:
        model: changed in place. A model that is itself such a layer cannot be: use `ClusteredLinear.from_linear` or
            `ClusteredEmbedding.from_embedding`.
        bits: of an index: 1, 2, 3, 4, 6 or 8.
        only: the layers to replace: a pattern of their names ("*.mlp.*"), a class of layers, a function of name and
            module, or a list of these; None takes all.
        skip: the layers to leave alone, in the same way.
        importance: by the name of a layer: how much an error of each of its weights counts where the centroids start,
            of the weight's shape; squared gradients, say. Of layers with tied weights any name will do.
        dry_run: the report is that of a conversion, and the model is not touched.
        options: groups, dim, temperature, iterations, tolerance and backend, as in `effkern.nn.ClusteredLinear`.

    Returns:
        A report: `.replaced` [(name, bits per weight, error, bytes before, bytes after, tied to)], what each layer
        would be if it were finalized now; `.skipped` [(name, reason)] for every other linear layer and embedding;
        `.bits_per_weight`, `.bytes_before` and `.bytes_after` of all. Bytes are those of weights, not of biases.
        `.undo()` puts the dense layers back; they have the same Parameters, so this costs no memory, and their weights
        are those that training has made.

    Raises:
        ValueError: bits or an option is out of its range, a part of only or skip matches no linear layer or embedding,
            importance names no layer that is replaced, or it has different ones for layers with tied weights.
        TypeError: model is such a layer itself, only or skip is none of the above, or an option is unknown.

    The new layers hold the Parameters of the old ones, so an optimizer that has been made may go on. Layers with tied
    weights (an embedding and the head of a language model) stay tied, and so do layers that stand in several places.

    A layer is left alone, and the report says why, when only or skip leaves it out, when its weight also belongs to a
    layer or module that stays, when its class is not exactly nn.Linear or nn.Embedding, when it belongs to an
    nn.TransformerEncoderLayer (which reads its weights), when it has hooks, when its weight is computed from other
    parameters, not finite or not floating, when groups or dim does not divide it, or when it is an embedding with a
    padding row, a maximal norm, or sparse or scaled gradients.
    """
    if isinstance(model, KINDS):
        raise TypeError("cluster: the model is a single layer itself; use from_linear or from_embedding")
    # The checks of the arguments are those of the layers; on the smallest one that they allow.
    groups, dim = options.get("groups", 1), options.get("dim", 1)
    ClusteredLinear(max(dim, 1), max(groups, 1), bits, device="meta", **options)
    found = list(places(model, KINDS))
    named = [(name, layer) for _, _, name, layer in found]
    reasons = select("cluster", "linear layers and embeddings", named, only, skip)
    for parent, _, name, layer in found:
        reasons[name] = reasons[name] or _reason(layer, parent, groups, dim)
    taken = {id(layer) for _, _, name, layer in found if reasons[name] is None}
    taken -= {id(layer) for _, _, name, layer in found if reasons[name] is not None}
    holders = _holders(model)
    reasons = {name: reasons[name] or _tie(layer, holders, taken) for _, _, name, layer in found}
    given = dict(importance or {})
    unknown = sorted(name for name in given if reasons.get(name, "there is none") is not None)
    if unknown:
        raise ValueError(f"cluster: importance is given for {unknown}, which are not replaced")
    counts = _importances(found, given)
    surgery, made = Surgery("cluster", model), dict[int, ClusteredWeight]()
    report = ClusterReport("cluster", dry_run, surgery=surgery)
    # By the weight, which several layers may have: the first of them, its name, and its palette.
    leaders: dict[int, tuple[str, ClusteredWeight, Palette]] = {}
    for place in found:
        _, _, name, layer = place
        reason = reasons[name]
        if reason is not None:
            report.skipped.append((name, reason))
            continue
        if id(layer) not in made:
            made[id(layer)] = _clustered(layer, bits, counts.get(id(layer.weight)), options)
        new = made[id(layer)]
        surgery.replace(place, new)
        if id(new.weight) not in leaders:
            leaders[id(new.weight)] = name, new, new.palette()
        first, leader, palette = leaders[id(new.weight)]
        if new is not leader:  # one weight is clustered alike everywhere
            new.centroids, new.latest = leader.centroids.clone(), leader.latest.clone()
            new.temperature = leader.temperature
        report.add(name, new.weight, palette, first)
    surgery.perform(dry_run)
    return report


def _importances(found: list[Place], given: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """By the weight: a weight that several layers have is found under any of their names."""
    named: dict[int, str] = {}
    for _, _, name, layer in found:
        if name in given:
            first = named.setdefault(id(layer.weight), name)
            if given[first] is not given[name] and not torch.equal(given[first], given[name]):
                raise ValueError(f"cluster: {first} and {name} have one weight, but different importances")
    return {weight: given[name] for weight, name in named.items()}


def _clustered(
    layer: nn.Module, bits: int, importance: Tensor | None, options: Mapping[str, Any]
) -> ClusteredWeight:
    if isinstance(layer, nn.Linear):
        return ClusteredLinear.from_linear(layer, bits, importance=importance, **options)
    assert isinstance(layer, nn.Embedding)
    return ClusteredEmbedding.from_embedding(layer, bits, importance=importance, **options)


def _reason(layer: nn.Module, parent: nn.Module, groups: int, dim: int) -> str | None:
    reason = weight_reason(layer, parent, KINDS)
    if reason is None and isinstance(layer, nn.Embedding):
        reason = refusal(layer)
    if reason is None:
        rows, columns = layer.get_parameter("weight").shape
        if rows % groups or columns % dim:
            return f"groups {groups} and dim {dim} do not divide its weight of {rows} x {columns}"
    return reason


def _holders(model: nn.Module) -> dict[int, list[tuple[nn.Module, nn.Parameter]]]:
    """The modules that hold each piece of memory, with the parameter they hold it as."""
    held: dict[int, list[tuple[nn.Module, nn.Parameter]]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            held.setdefault(memory(parameter), []).append((module, parameter))
    return held


def _tie(
    layer: nn.Module, holders: Mapping[int, list[tuple[nn.Module, nn.Parameter]]], taken: set[int]
) -> str | None:
    """Why what a layer shares keeps it from being replaced, None where nothing does."""
    weight = layer.get_parameter("weight")
    others = holders[memory(weight)]
    if any(parameter is not weight for _, parameter in others):
        return "its weight shares memory with another parameter"
    if any(id(module) not in taken for module, _ in others):
        return "its weight also belongs to a layer that stays"
    return None
