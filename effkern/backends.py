"""Which backend runs an op: the automatic choice, forcing one, and the path that ran last.

with effkern.backends.force("reference"):
    ...
print(effkern.backends.last())        # "attention:cpu/avx2"
for row in effkern.backends.report():
    print(row)
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from effkern import _host
from effkern.ops import registry

NAMES = ("reference", "cpu", "triton", "cuda")

# Process-wide, and a plain module variable so that torch.compile can guard on it.
_forced: str | None = os.environ.get("EFFKERN_BACKEND") or None


class Unavailable(RuntimeError):
    """A backend that was asked for cannot run the call. `would_work` names those that can."""

    def __init__(self, op: str, backend: str, reason: str, would_work: tuple[str, ...]) -> None:
        self.op, self.backend, self.reason, self.would_work = op, backend, reason, would_work
        instead = (
            f"; would work: {', '.join(would_work)}" if would_work else "; no other backend can run it either"
        )
        super().__init__(f"{op}: backend '{backend}' cannot run: {reason}{instead}")


@dataclass(frozen=True)
class Alternative:
    """A backend that was not chosen; `reason` is None where it could run too."""

    backend: str
    reason: str | None
    note: str


@dataclass(frozen=True)
class Row:
    """What would run `op` on tensors of `device` and `dtype`. `backend` is None when nothing can."""

    op: str
    device: str
    dtype: torch.dtype
    backend: str | None
    why: str
    alternatives: tuple[Alternative, ...]

    def __str__(self) -> str:
        others = "; ".join(f"{a.backend}: {a.reason or a.note or 'can run'}" for a in self.alternatives)
        return f"{self.op} on {self.device} ({self.dtype}): {self.backend} ({self.why}) [{others}]"


def check_name(name: str) -> str:
    if name not in NAMES:
        raise ValueError(f"backend {name!r} is unknown; expected one of {', '.join(NAMES)}")
    return name


def forced() -> str | None:
    """The backend in force through `force` or EFFKERN_BACKEND, None when the choice is automatic."""
    return _forced


@contextlib.contextmanager
def force(name: str | None) -> Iterator[None]:
    """Makes every op of the process use backend `name` inside the block; None restores the automatic choice.

    An op that cannot run on it raises `Unavailable`, it never takes another path in silence.

    Example:
        >>> x = torch.ones(1, 1, 4, 8)
        >>> with effkern.backends.force("reference"):
        ...     out = effkern.attention(x, x, x)
        >>> effkern.backends.last()
        'attention:reference'
    """
    global _forced
    before = _forced
    _forced = name if name is None else check_name(name)
    try:
        yield
    finally:
        _forced = before


def refusal(
    backend: registry.Backend, device: str, dtype: torch.dtype, sizes: Mapping[str, int]
) -> str | None:
    """Why `backend` cannot serve such a request, None when it can."""
    if backend.devices and device not in backend.devices:
        return f"tensors are on {device}, it runs on {' and '.join(backend.devices)}"
    if device == "cuda" and not torch.cuda.is_available():
        return (
            "no CUDA device in this machine" if torch.version.cuda else "this torch is a build without CUDA"
        )
    return backend.refusal(device, dtype, sizes)


def would_work(op: str, device: str, dtype: torch.dtype, sizes: Mapping[str, int]) -> tuple[str, ...]:
    candidates = registry.get(op).backends
    return tuple(b.name for b in candidates if refusal(b, device, dtype, sizes) is None)


def select(
    op: str, device: str, dtype: torch.dtype, sizes: Mapping[str, int], name: str | None = None
) -> str:
    """The backend that serves a request: `name`, else the forced one, else the best; raises `Unavailable`."""
    name = _forced if name is None else name
    spec = registry.get(op)
    if name is None:
        for backend in spec.backends:
            if backend.automatic and refusal(backend, device, dtype, sizes) is None:
                return backend.name
        raise Unavailable(op, "automatic", f"nothing serves {dtype} tensors on {device}", ())
    check_name(name)
    for backend in spec.backends:
        if backend.name == name:
            reason = refusal(backend, device, dtype, sizes)
            if reason is None:
                return name
            break
    else:
        reason = f"{op} has no such backend"
    raise Unavailable(op, name, reason, would_work(op, device, dtype, sizes))


def _row(spec: registry.OpSpec, device: str, dtype: torch.dtype) -> Row:
    reasons = {b.name: refusal(b, device, dtype, spec.sizes) for b in spec.backends}
    chosen, why = None, "no backend can run it"
    if _forced is not None:
        why = f"forced, but {reasons.get(_forced, 'this op has no such backend')}"
        if _forced in reasons and reasons[_forced] is None:
            chosen, why = _forced, "forced"
    else:
        for backend in spec.backends:
            if backend.automatic and reasons[backend.name] is None:
                chosen, why = backend.name, backend.note or "the fastest that can run"
                break
    others = tuple(Alternative(b.name, reasons[b.name], b.note) for b in spec.backends if b.name != chosen)
    return Row(spec.name, device, dtype, chosen, why, others)


def report(op: str | None = None, dtype: torch.dtype | None = None) -> tuple[Row, ...]:
    """One row for each op (or only `op`) and device type: the backend that would run, why, and why not the others."""
    if _forced is not None:
        check_name(_forced)
    chosen = registry.specs() if op is None else (registry.get(op),)
    return tuple(_row(spec, device, dtype or spec.dtypes[0]) for spec in chosen for device in ("cpu", "cuda"))


def last() -> str:
    """The path the most recent op call of this process took, such as "attention:cpu/avx2"; "" before the first."""
    return _host.trace_last()


def record(path: str) -> None:
    """Notes a path that runs in Python. Not while a compiler traces: what runs later is then not this code."""
    if not torch.compiler.is_compiling():
        _host.trace_record(path)
