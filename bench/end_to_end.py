"""Trains the same small language model on real text, in plain PyTorch and with one family swapped at a time.

Same seed, same batches in the same order. The variants take their steps in turns, so that whatever else the
machine does meets all of them, and who goes first rotates.
"""

from __future__ import annotations

import copy
import functools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from effkern import backends
from effkern.nn import TemperatureSchedule

from .memory import peak_extra_bytes
from .model import ByteModel, Config, loss_nats
from .results import Curve, EndToEnd
from .studies import Study, Variant, study
from .text import Corpus, standard_library

LEARNING_RATE = 2e-3
WARM_UP_STEPS = 10
VALIDATION_WINDOWS = 8
VALIDATIONS = 8  # evaluations along the way
MOST_STEPS, FEWEST_STEPS = 400, 24

PATIENCE = 1.25  # how far beyond its time the training may go

Progress = Callable[[int, int, str], None]  # step, steps, what


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
    schedule: TemperatureSchedule | None = None
    size_bytes: int = 0  # of the finished model

    @classmethod
    def start(
        cls, variant: Variant, config: Config, device: torch.device, dtype: torch.dtype, seed: int
    ) -> Trainer:
        torch.manual_seed(seed)
        model = ByteModel(config, variant.parts).to(device)
        return cls(variant, model, _optimizer(model), device, dtype)

    def halfway(self, steps_left: int) -> None:
        if self.variant.halfway is None:
            return
        before = list(self.model.parameters())
        self.variant.halfway(self.model)
        self.times = []
        if {id(p) for p in self.model.parameters()} != {id(p) for p in before}:
            self.optimizer, self.begun = _optimizer(self.model), len(self.train_bits)
        if self.variant.schedule is not None:
            self.schedule = self.variant.schedule(self.model, steps_left)

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
        if self.schedule is not None:
            self.schedule.step()
        return loss.item()

    def timed_step(self, tokens: Tensor, targets: Tensor) -> None:
        start = time.perf_counter()
        nats = self.step(tokens, targets)
        self.times.append(time.perf_counter() - start)
        self.train_bits.append(nats / math.log(2))

    @torch.no_grad()
    def validate(self, tokens: Tensor, targets: Tensor) -> None:
        self.model.eval()
        self.validation_steps.append(len(self.train_bits))
        self.validation_bits.append(self.loss(tokens, targets).item() / math.log(2))
        self.model.train()

    def finish(self, tokens: Tensor, targets: Tensor) -> None:
        """The last validation, and the size: of the model as it would be used."""
        trained = self.model
        if self.variant.finish is not None:
            self.model = copy.deepcopy(trained)
            self.variant.finish(self.model)
        self.validate(tokens, targets)
        stored = self.model.state_dict()
        self.size_bytes = sum({t.data_ptr(): t.nbytes for t in stored.values()}.values())  # tied ones once
        self.model = trained

    def curve(self, tokens_a_step: int, peak: int | None) -> Curve:
        # The first steps pay for allocations and lazy set-up; they would not recur in a long training.
        times = sorted(self.times[2:] or self.times)
        median = statistics.median(times)
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
            parameters=sum(p.numel() for p in self.model.parameters()),
            size_bytes=self.size_bytes,
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
                trainer.halfway(steps - step)
        for turn in range(len(trainers)):
            trainer = trainers[(step + turn) % len(trainers)]
            if step % interval == 0:
                trainer.validate(*held_out)
            progress(step, steps, trainer.variant.name)
            trainer.timed_step(*data)
    curves = []
    for trainer in trainers:
        trainer.finish(*held_out)
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
    """Of a whole training: the mean of before and after what happens halfway."""
    trainer = Trainer.start(variant, config, device, dtype, seed)
    for step in range(3):
        trainer.timed_step(*batches(step))
    before = min(trainer.times)
    if variant.halfway is None:
        return before
    trainer.halfway(3)
    for step in range(3):
        trainer.timed_step(*batches(step))
    return (before + min(trainer.times)) / 2


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
