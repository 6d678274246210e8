"""Low-rank corrections of the palettised layers of a model, made for inputs that it is shown."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from effkern.nn.clustered import ClusteredLinear
from effkern.nn.palettized import PalettizedLinear
from effkern.ops.palettized_linear import eora_factors


def correct(
    model: nn.Module,
    pairs: Mapping[str, tuple[ClusteredLinear, PalettizedLinear]],
    rank: int,
    calibration: Iterable[Any],
) -> None:
    """Gives each palettised layer of `pairs` (by name, beside the layer it stands for) its correction.

    Only what comes back without an error has changed a layer.
    """
    if not pairs:
        return
    moments = _moments(model, {name: new for name, (_, new) in pairs.items()}, calibration)
    factors = {}
    for old, new in pairs.values():
        if new in factors:  # one layer in several places
            continue
        weight = old.weight.detach()
        most = min(rank, *weight.shape)
        first, second = eora_factors(weight, new.weight_palette.palette(), moments.pop(new), most)
        factors[new] = first.to(weight.dtype), second.to(weight.dtype)
    for new, (first, second) in factors.items():
        trained = new.weight_palette.lut.requires_grad
        new.low_rank_a = nn.Parameter(first, requires_grad=trained)
        new.low_rank_b = nn.Parameter(second, requires_grad=trained)


def _moments(
    model: nn.Module, layers: Mapping[str, PalettizedLinear], calibration: Iterable[Any]
) -> dict[PalettizedLinear, Tensor]:
    """The mean of x x^T of each layer over all tokens, (in, in) in float32."""
    sums: dict[nn.Module, Tensor] = {}
    counts: dict[nn.Module, int] = {}

    def see(layer: nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        x = (given[0] if given else named["x"]).detach()
        x = x.reshape(-1, x.shape[-1]).float()
        if len(x):
            with torch.autocast(x.device.type, enabled=False):
                product = x.mT @ x
            sums[layer] = sums[layer].add_(product) if layer in sums else product
            counts[layer] = counts.get(layer, 0) + len(x)

    hooks = [
        layer.register_forward_pre_hook(see, with_kwargs=True) for layer in dict.fromkeys(layers.values())
    ]
    try:
        with _evaluation(model), torch.no_grad():
            for entry in calibration:
                if isinstance(entry, Mapping):
                    model(**entry)
                else:
                    model(*(entry if isinstance(entry, tuple) else (entry,)))
    finally:
        for hook in hooks:
            hook.remove()
    unseen = sorted(name for name, layer in layers.items() if layer not in sums)
    if unseen:
        raise ValueError(f"finalize: calibration has no input for {unseen}")
    broken = sorted(name for name, layer in layers.items() if not sums[layer].isfinite().all())
    if broken:
        raise ValueError(f"finalize: calibration has inputs that are not finite for {broken}")
    return {layer: sums[layer].div_(counts[layer]) for layer in dict.fromkeys(layers.values())}


@contextlib.contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """eval(), and afterwards every module as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
