"""The trainings on real text: what is built beside what, and what happens to it on the way."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

import effkern
from effkern.nn import TemperatureSchedule

from .model import AttentionMixer, Config, Parts, TwoStreams, monarch_mlp, sdpa_causal


@dataclass(frozen=True)
class Variant:
    """One way to build the model. `family` is what it swaps; plain PyTorch swaps nothing. `halfway` changes the model
    in the middle of the training, which goes on with a fresh optimizer if there are other parameters then; its times
    are those after the change. `schedule` is made right after it, for the steps that are left. `finish` changes a copy
    of the trained model, which the last validation and the size are of."""

    name: str
    family: str | None
    parts: Parts
    halfway: Callable[[nn.Module], object] | None = None
    schedule: Callable[[nn.Module, int], TemperatureSchedule] | None = None
    finish: Callable[[nn.Module], object] | None = None


@dataclass(frozen=True)
class Study:
    """What is trained beside what, and for how long. Plain PyTorch comes first."""

    variants: list[Variant]
    config: Config = field(default_factory=Config)
    seconds: float = 60.0


def _sdpa_mixer(config: Config) -> nn.Module:
    return AttentionMixer(config, sdpa_causal)


def _attention_study() -> Study:
    effkern_causal = functools.partial(effkern.attention, causal=True)
    mixer = Parts(lambda config: AttentionMixer(config, effkern_causal))
    plain = Variant("PyTorch", None, Parts(_sdpa_mixer))
    return Study([plain, Variant("effkern attention", "attention", mixer)])


def _monarch_study() -> Study:
    """The MLPs as Monarch matrices: from the start, from the middle on (projection, then fine-tuning), or until the
    middle (reverse sparsification). Wide enough for Monarch matrices to pay."""
    nblocks = 8
    dense, sparse = Parts(_sdpa_mixer), Parts(_sdpa_mixer, functools.partial(monarch_mlp, nblocks=nblocks))
    variants = [
        Variant("PyTorch", None, dense),
        Variant("Monarch MLPs", "monarch", sparse),
        Variant(
            "dense, then projected",
            "monarch",
            dense,
            lambda model: effkern.convert.monarchize(model, nblocks, only="*.mlp.*"),
        ),
        Variant("Monarch, then dense", "monarch", sparse, _densify),
    ]
    return Study(variants, Config(layers=4, width=512, heads=8, context=256), seconds=300.0)


def _densify(model: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, effkern.nn.MonarchLinear):
                setattr(module, name, child.to_linear())


def _long_conv_study() -> Study:
    """A Hyena operator in place of attention; plain PyTorch convolves through torch.fft and F.conv1d."""

    def mixer(backend: str | None) -> Parts:
        return Parts(lambda config: effkern.nn.HyenaOperator(config.width, config.context, backend=backend))

    variants = [
        Variant("PyTorch", None, mixer("reference")),
        Variant("effkern long convolutions", "long_conv", mixer(None)),
    ]
    return Study(variants, Config(context=2048), seconds=180.0)


def _dkm_study() -> Study:
    """Every weight at 3 bits, tables included: rounded once the training is over, or clustered from the middle on."""
    plain, bits = Parts(_sdpa_mixer), 3

    def cluster(model: nn.Module) -> object:
        return effkern.convert.cluster(model, bits)

    def round_off(model: nn.Module) -> None:
        cluster(model)
        effkern.convert.finalize(model)

    variants = [
        Variant("PyTorch", None, plain),
        Variant("3 bits after training", "dkm", plain, finish=round_off),
        Variant("3 bits by DKM", "dkm", plain, cluster, TemperatureSchedule, effkern.convert.finalize),
    ]
    return Study(variants, Config(layers=4, width=256, heads=4, context=256), seconds=240.0)


def _reversible_study() -> Study:
    """The same reversible network three times, deep enough for its activations to be what takes the memory."""

    def streams(**options: Any) -> Parts:
        return Parts(_sdpa_mixer, stack=functools.partial(TwoStreams, **options))

    variants = [
        Variant("PyTorch, all stored", None, streams(stored=True)),
        Variant("reversible", "reversible", streams()),
        Variant("reversible, exact", "reversible", streams(exact=14)),
    ]
    return Study(variants, Config(layers=24, context=512), seconds=240.0)


STUDIES = {
    "attention": _attention_study,
    "monarch": _monarch_study,
    "long_conv": _long_conv_study,
    "dkm": _dkm_study,
    "reversible": _reversible_study,
}


def study(families: Sequence[str] = ()) -> Study:
    """The training of a run: that of the one family it is limited to, else attention's."""
    name = families[0] if len(families) == 1 and families[0] in STUDIES else "attention"
    return STUDIES[name]()
