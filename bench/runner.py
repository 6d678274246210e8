"""A run: the machine, the chosen cases one by one, the end-to-end training; a listener hears of all of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from effkern import backends

from . import cases as case_list
from . import decoder_step
from .end_to_end import train
from .machine import default_device, measure_roofs, new_results
from .measure import Bench
from .results import Results, Row
from .saved import decoder_layer
from .studies import study

END_TO_END = "end to end on real text"
DECODER_STEP = "a training step of a clustered decoder layer"
DECODER_SECONDS = 30.0


@dataclass(frozen=True)
class Options:
    full: bool = False
    families: Sequence[str] = ()
    pattern: str | None = None
    backends: Sequence[str] = ()  # empty: the automatic choice
    threads: int | None = None
    end_to_end: bool = True
    end_to_end_seconds: float | None = None  # None: as long as the study takes
    end_to_end_steps: int | None = None
    seconds: float = 1.2  # of timing, a pass

    @classmethod
    def of(
        cls,
        *,
        full: bool,
        families: Sequence[str],
        pattern: str | None,
        backends: Sequence[str],
        threads: int | None,
        end_to_end: bool | None,
    ) -> Options:
        """What the command line means: the training is part of a run unless cases are picked by name."""
        return cls(
            full=full,
            families=tuple(families),
            pattern=pattern,
            backends=tuple(backends),
            threads=threads,
            end_to_end=pattern is None if end_to_end is None else end_to_end,
            seconds=4.0 if full else 1.2,
        )


@dataclass
class Listener:
    """Receives what happens; the base class ignores it all."""

    def machine(self, results: Results) -> None: ...
    def begin(self, units: Sequence[tuple[str, float]]) -> None:
        """The work ahead: a name and its expected seconds each."""

    def unit(self, name: str) -> None: ...
    def step(self, fraction: float, what: str) -> None: ...
    def done(self, rows: Sequence[Row]) -> None: ...
    def note(self, text: str) -> None: ...


def run(options: Options, listener: Listener | None = None) -> Results:
    """Everything `effkern bench` does short of writing files. Ctrl-C ends it early and keeps what is done."""
    listener = listener or Listener()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = _device(options.backends)
    pairs = case_list.choose(
        case_list.discover(),
        full=options.full,
        device=device,
        families=options.families,
        pattern=options.pattern,
    )
    results = new_results(device)
    results.roofs = measure_roofs(device)
    listener.machine(results)
    wanted: list[str | None] = [*options.backends] or [None]
    bench = Bench(device, results.roofs, wanted, options.full, options.seconds, listener.note)
    units = [(f"{case.name} {pass_}", 2.0 * options.seconds) for case, pass_ in pairs]
    step = "dkm" in options.families and options.pattern is None
    if step:
        units.append((DECODER_STEP, DECODER_SECONDS))
    training = study(options.families)
    if options.end_to_end:
        units.append((END_TO_END, options.end_to_end_seconds or training.seconds))
    listener.begin(units)
    try:
        for (case, pass_), (name, _) in zip(pairs, units, strict=False):
            listener.unit(name)
            rows = bench.measure(case, pass_)
            results.rows += rows
            listener.done(rows)
        if any(case.family == "dkm" for case, _ in pairs):
            results.saved = decoder_layer()
        if step:
            listener.unit(DECODER_STEP)
            reason = decoder_step.refusal(device)
            if reason is None:
                results.decoder_step = decoder_step.decoder_step()
            else:
                listener.note(reason)
            listener.done(())
        if options.end_to_end:
            listener.unit(END_TO_END)
            results.end_to_end = train(
                device,
                seconds=options.end_to_end_seconds,
                steps=options.end_to_end_steps,
                chosen=training,
                progress=lambda step, steps, what: listener.step(step / steps, what),
            )
            listener.done(())
    except KeyboardInterrupt:
        listener.note("interrupted: keeping what is done")
    return results


def _device(wanted: Sequence[str]) -> torch.device:
    devices = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}
    for name in wanted:
        backends.check_name(name)
    kinds = {devices[name] for name in wanted if name in devices}
    if len(kinds) > 1:
        raise ValueError(
            f"bench: backends {', '.join(wanted)} run on different devices; time them in separate runs"
        )
    if kinds == {"cuda"} and not torch.cuda.is_available():
        raise ValueError(f"bench: backend {', '.join(wanted)} needs a CUDA GPU, and torch sees none")
    return torch.device(kinds.pop()) if kinds else default_device()
