"""Every call of every op that must work, from the registry, and its results in a form that processes can compare."""

from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from test_contract import floating, gradients, tensors, with_leaves
from torch import Tensor

from effkern.ops import registry

DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Call:
    """One sample of an op. Calls that draw random numbers are left out: threads share the generator."""

    spec: registry.OpSpec
    sample: registry.Sample
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.spec.name}, {self.sample.name}, {self.dtype}"

    def forward(self) -> list[Tensor]:
        return tensors(self.spec.public(*self.sample.args, **self.sample.kwargs))

    def results(self) -> list[Tensor]:
        """Outputs, and the gradients of all that has one."""
        found = self.forward()
        if not self.spec.double_backward or not floating(found):
            return found
        sample = with_leaves(self.spec, self.sample)
        return [*found, *gradients(self.spec, sample, self.spec.public)]


def calls(device: str = "cpu", only: registry.OpSpec | None = None) -> list[Call]:
    """Of every op, or of one."""
    registry.discover()
    return [
        Call(spec, sample, dtype)
        for spec, dtype in itertools.product([only] if only else registry.specs(), DTYPES)
        for sample in spec.samples(device, dtype)
        if not sample.kwargs.get("dropout_p")
    ]


def digest(results: list[Tensor]) -> str:
    """Of the bits, shapes and dtypes."""
    found = hashlib.sha256()
    for tensor in results:
        plain = tensor.detach().contiguous()
        found.update(f"{tuple(plain.shape)} {plain.dtype}".encode())
        found.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def digests() -> Iterator[tuple[str, str]]:
    """Every call by name, and the digest of its results."""
    for call in calls():
        yield str(call), digest(call.results())


def script(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a script of this folder in a process of its own, which finds the tests' modules."""
    folder = Path(__file__).resolve().parent
    path = [str(folder), str(folder / "ops"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, str(folder / name), *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "2"} | environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
