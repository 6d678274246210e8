"""The schema of results.json: plain dataclasses, written and read back without loss."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1
VERDICTS = ("pass", "fail", "unverified")


@dataclass
class Machine:
    name: str  # file-name form: the GPU's name if one was used, else the CPU's
    cpu: str
    isa: str  # levels the machine has, the one in use first
    gpu: str | None
    driver: str | None
    torch: str
    triton: str | None
    cuda: str | None
    threads: int
    platform: str


@dataclass
class Row:
    """One (case, pass, backend, baseline).

    Errors are the largest absolute error of an output or gradient over the largest absolute value of the
    exact one, so they compare across shapes. Times are per call. ``ratio`` is baseline_ms / median_ms: above
    one, ours is faster.
    ``share_of_roof`` is the time the binding roof alone would take over the time it took.
    ``peak_extra_bytes`` is what the pass held beyond its inputs, its results included, and
    ``baseline_peak_extra_bytes`` the same of the baseline; files written before there was one have None.
    """

    family: str
    op: str
    case: str
    shape: str
    dtype: str
    pass_: str  # "pass" in the file
    backend: str
    path: str
    verdict: str
    error: float | None
    error_baseline: float | None
    median_ms: float | None
    p10_ms: float | None
    p90_ms: float | None
    baseline: str | None
    baseline_ms: float | None
    ratio: float | None
    roof: str | None
    share_of_roof: float | None
    peak_extra_bytes: int | None
    host_us: float | None
    first_call_ms: float | None
    warm: bool
    baseline_peak_extra_bytes: int | None = None

    def key(self) -> tuple[str, ...]:
        """What has to be equal for two rows of two runs to be the same measurement."""
        return (self.op, self.case, self.pass_, self.backend, self.baseline or "")


@dataclass
class Curve:
    """One variant of the end-to-end training: its losses and what they cost."""

    variant: str
    steps: list[int]
    train_bits: list[float]  # bits per byte, one a step
    validation_steps: list[int]
    validation_bits: list[float]
    step_ms: float
    step_p10_ms: float
    step_p90_ms: float
    tokens_per_s: float
    peak_extra_bytes: int | None
    parameters: int
    size_bytes: int
    final_bits: float
    path: str


@dataclass
class EndToEnd:
    corpus: str
    corpus_bytes: int
    model: str
    dtype: str
    context: int
    batch: int
    seed: int
    curves: list[Curve]


@dataclass
class Saved:
    """What clustering `weights` weights keeps for the backward: autograd through plain PyTorch, and ours."""

    what: str
    weights: int
    bits: int
    dtype: str
    iterations: int
    plain_bytes: int
    own_bytes: int

    @property
    def ratio(self) -> float:
        return self.plain_bytes / self.own_bytes


@dataclass
class DecoderStep:
    """The first training step of a decoder layer with clustered weights, and of the same layer with dense ones.

    Peaks are beyond the weights: activations, gradients, what the optimizer keeps, and the clustered weights."""

    what: str
    weights: int
    bits: int
    dtype: str
    optimizer: str
    tokens: int
    weight_bytes: int
    peak_extra_bytes: int | None
    dense_peak_extra_bytes: int | None
    seconds: float
    dense_seconds: float


@dataclass
class Results:
    schema: int
    machine: Machine
    commit: str
    dirty: bool
    date: str  # ISO 8601, UTC
    roofs: dict[str, float]  # "matmul float32": FLOP/s, ..., "copy": bytes/s
    rows: list[Row] = field(default_factory=list)
    end_to_end: EndToEnd | None = None
    saved: list[Saved] = field(default_factory=list)
    decoder_step: DecoderStep | None = None

    def to_json(self) -> str:
        return json.dumps(_plain(self), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Results:
        data = json.loads(text)
        schema = data.get("schema") if isinstance(data, dict) else None
        if schema != SCHEMA:
            raise ValueError(f"results: schema {schema!r} is not {SCHEMA}, which this version reads")
        return _build(cls, data, "results")

    def save(self, path: Path) -> None:
        path.write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Results:
        return cls.from_json(path.read_text(encoding="utf-8"))


def best_baselines(rows: Sequence[Row]) -> dict[tuple[str, str, str], Row]:
    """The fastest baseline of each (case, pass, backend): what a summary is made of."""
    best: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        key = (row.case, row.pass_, row.backend)
        if key not in best or (row.ratio or 0.0) < (best[key].ratio or 0.0):
            best[key] = row
    return best


def _file_name(attribute: str) -> str:
    return attribute.rstrip("_")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {_file_name(f.name): _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def _build(cls: Any, data: Any, where: str) -> Any:
    """Rebuild dataclass `cls`, naming the field when the file does not fit."""
    if not isinstance(data, dict):
        raise ValueError(f"{where}: expected an object, got {type(data).__name__}")
    hints = typing.get_type_hints(cls)
    values = {}
    for spec in dataclasses.fields(cls):
        name = _file_name(spec.name)
        if name not in data:
            if spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
                raise ValueError(f"{where}: field {name!r} is missing")
            continue
        values[spec.name] = _convert(hints[spec.name], data[name], f"{where}.{name}")
    unknown = set(data) - {_file_name(spec.name) for spec in dataclasses.fields(cls)}
    if unknown:
        raise ValueError(f"{where}: unknown fields {sorted(unknown)}")
    return cls(**values)


def _convert(hint: Any, value: Any, where: str) -> Any:
    arguments = typing.get_args(hint)
    if value is None:
        if type(None) not in arguments:
            raise ValueError(f"{where}: null where {hint} is expected")
        return None
    options = [item for item in arguments if item is not type(None)]
    if type(None) in arguments:
        hint, arguments = options[0], typing.get_args(options[0])
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)
    origin = typing.get_origin(hint)
    if origin is list:
        return [_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        return {key: _convert(arguments[1], item, f"{where}[{key!r}]") for key, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint):
        raise ValueError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value
