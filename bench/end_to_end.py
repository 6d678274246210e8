"""Trains the same small language model on real text, in plain PyTorch and with one family swapped at a time.

Same seed, same batches in the same order. The variants take their steps in turns, so that whatever else the
machine does meets all of them, and who goes first rotates.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

import effkern
from effkern import backends

from .memory import peak_extra_bytes
from .model import AttentionMixer, ByteModel, Config, Parts, loss_nats, monarch_mlp, sdpa_causal
from .results import Curve, EndToEnd
from .text import Corpus, standard_library

LEARNING_RATE = 2e-3
WARM_UP_STEPS = 10
VALIDATION_WINDOWS = 8
VALIDATIONS = 8  # evaluations along the way
MOST_STEPS, FEWEST_STEPS = 400, 24

PATIENCE = 1.25  # how far beyond its time the training may go

Progress = Callable[[int, int, str], None]  # step, steps, what


@dataclass(frozen=True)
class Variant:
    """One way to build the model. `family` is what it swaps; plain PyTorch swaps nothing. `halfway` changes the model
    in the middle of the training, which goes on with a fresh optimizer; its times are those after the change."""

    name: str
    family: str | None
    parts: Parts
    halfway: Callable[[nn.Module], object] | None = None


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
            lambda model: effkern.convert.monarchize(model, nblocks, "*.mlp.*"),
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


STUDIES = {"attention": _attention_study, "monarch": _monarch_study, "long_conv": _long_conv_study}


def study(families: Sequence[str] = ()) -> Study:
    """The training of a run: that of the one family it is limited to, else attention's."""
    name = families[0] if len(families) == 1 and families[0] in STUDIES else "attention"
    return STUDIES[name]()


@dataclass
class Trainer:
    """A variant in training, with all it has measured."""

    variant: Variant
    model: nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device
    dtype: torch.dtype
    train_bits: list[float] = field(default_factory=list)
    validation_steps: list[int] = field(default_factory=list)
    validation_bits: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    path: str = ""
    begun: int = 0  # the step at which the current optimizer took over

    @classmethod
    def start(
        cls, variant: Variant, config: Config, device: torch.device, dtype: torch.dtype, seed: int
    ) -> Trainer:
        torch.manual_seed(seed)
        model = ByteModel(config, variant.parts).to(device)
        return cls(variant, model, _optimizer(model), device, dtype)

    def halfway(self) -> None:
        if self.variant.halfway is not None:
            self.variant.halfway(self.model)
            self.optimizer, self.begun, self.times = _optimizer(self.model), len(self.train_bits), []

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            return loss_nats(self.model, tokens.to(self.device), targets.to(self.device))

    def step(self, tokens: Tensor, targets: Tensor) -> float:
        """One optimizer step; returns the loss in nats. Reading it is also what waits for the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (len(self.train_bits) - self.begun + 1) / WARM_UP_STEPS)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(tokens, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()

    def timed_step(self, tokens: Tensor, targets: Tensor) -> None:
        start = time.perf_counter()
        nats = self.step(tokens, targets)
        self.times.append(time.perf_counter() - start)
        self.train_bits.append(nats / math.log(2))

    @torch.no_grad()
    def validate(self, tokens: Tensor, targets: Tensor) -> None:
        self.validation_steps.append(len(self.train_bits))
        self.validation_bits.append(self.loss(tokens, targets).item() / math.log(2))

    def curve(self, tokens_a_step: int, peak: int | None) -> Curve:
        # The first steps pay for allocations and lazy set-up; they would not recur in a long training.
        times = sorted(self.times[2:] or self.times)
        median = statistics.median(times)
        parameters = list(self.model.parameters())
        return Curve(
            variant=self.variant.name,
            steps=list(range(1, len(self.train_bits) + 1)),
            train_bits=self.train_bits,
            validation_steps=self.validation_steps,
            validation_bits=self.validation_bits,
            step_ms=median * 1e3,
            step_p10_ms=times[len(times) // 10] * 1e3,
            step_p90_ms=times[len(times) * 9 // 10] * 1e3,
            tokens_per_s=tokens_a_step / median,
            peak_extra_bytes=peak,
            parameters=sum(p.numel() for p in parameters),
            size_bytes=sum(p.numel() * p.element_size() for p in parameters),
            final_bits=self.validation_bits[-1],
            path=self.path,
        )


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)


def train(
    device: torch.device,
    *,
    seconds: float | None = None,
    steps: int | None = None,
    config: Config | None = None,
    batch: int = 2,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    chosen: Study | None = None,
    progress: Progress = lambda step, steps, what: None,
) -> EndToEnd:
    """Train every variant of a study for `steps`, or for as many steps as fit into about `seconds` (the study's)."""
    chosen = chosen or study()
    config, seconds = config or chosen.config, seconds or chosen.seconds
    corpus = standard_library()
    batches = functools.partial(_batch, corpus, config.context, batch, seed)
    began = time.perf_counter()
    if dtype is None:
        progress(0, 1, "choosing the dtype")
        dtype = _faster_dtype(chosen.variants[0], config, device, seed, corpus)
    limited = steps is None
    if steps is None:
        progress(0, 1, "measuring a step")
        cost = sum(_seconds_a_step(v, config, device, dtype, seed, batches) for v in chosen.variants)
        left = seconds - (time.perf_counter() - began)
        steps = int(min(MOST_STEPS, max(FEWEST_STEPS, 0.9 * left / cost)))
    trainers = [Trainer.start(v, config, device, dtype, seed) for v in chosen.variants]
    held_out = _validation(corpus, config.context)
    interval = max(1, steps // VALIDATIONS)
    fewest = min(steps, max(FEWEST_STEPS, steps // 2 + 1))  # what happens halfway is part of it
    for step in range(steps):
        # The machine may have become busy since the steps were counted; all variants stop at the same one.
        if step >= fewest and limited and time.perf_counter() - began > PATIENCE * seconds:
            break
        data = batches(step)
        if step == steps // 2:
            for trainer in trainers:
                trainer.halfway()
        for turn in range(len(trainers)):
            trainer = trainers[(step + turn) % len(trainers)]
            if step % interval == 0:
                trainer.validate(*held_out)
            progress(step, steps, trainer.variant.name)
            trainer.timed_step(*data)
    curves = []
    for trainer in trainers:
        trainer.validate(*held_out)
        backends.record("")  # so that a variant without ops of ours has no path
        peak = peak_extra_bytes(functools.partial(trainer.step, *batches(0)), device)
        trainer.path = backends.last()
        curves.append(trainer.curve(batch * config.context, peak))
    name = str(dtype).removeprefix("torch.")
    size = len(corpus.train) + len(corpus.validation)
    return EndToEnd(corpus.name, size, config.describe(), name, config.context, batch, seed, curves)


def _batch(corpus: Corpus, context: int, batch: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(corpus.train) - context - 1, (batch,), generator=generator)
    return corpus.windows(corpus.train, starts, context)


def _validation(corpus: Corpus, context: int) -> tuple[Tensor, Tensor]:
    """Windows spread evenly over the held-out files."""
    starts = torch.linspace(0, len(corpus.validation) - context - 2, VALIDATION_WINDOWS).long()
    return corpus.windows(corpus.validation, starts, context)


def _seconds_a_step(
    variant: Variant,
    config: Config,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    batches: Callable[[int], tuple[Tensor, Tensor]],
) -> float:
    trainer = Trainer.start(variant, config, device, dtype, seed)
    for step in range(3):
        trainer.timed_step(*batches(step))
    return min(trainer.times)


def _faster_dtype(
    variant: Variant, config: Config, device: torch.device, seed: int, corpus: Corpus
) -> torch.dtype:
    """bf16 autocast pays only where the machine has units for it, so plain PyTorch tries both.

    On a short context: without such units a full step in bf16 can take half a minute.
    """
    short = replace(config, context=min(config.context, 256))
    batches = functools.partial(_batch, corpus, short.context, 1, seed)
    options = (torch.float32, torch.bfloat16)
    return min(options, key=lambda dtype: _seconds_a_step(variant, short, device, dtype, seed, batches))
