"""Out of memory, in a process of its own: `python robust_memory.py STEP`. Prints counts as JSON.

The address space is limited a little above what the process has, by more and more, so that calls fail at another
allocation each time; with STEP 2 at every second limit. Each call ends with the result it always has or with an error;
after each error, and at the end without the limit, the process computes what it did before.
"""

from __future__ import annotations

import json
import resource
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from robust_calls import digest, digests
from torch import Tensor

import effkern

Make = Callable[[], list[Tensor]]
HEADROOM = (1, 6, 14, 24, 36, 52, 72, 100, 140)  # MiB
ERRORS = (RuntimeError, MemoryError)
# The last is what torch's stable ABI makes of an allocation that failed inside an op; its own words are lost there.
WORDS = ("memory", "alloc", "storage", "too large", "overflow", "api call failed")


@contextmanager
def limited(mebibytes: int):  # type: ignore[no-untyped-def]
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (mebibytes << 20)
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def trained(function: Callable[..., Any], *shapes: tuple[int, ...], **kwargs: Any) -> Make:
    """Forward and backward on normal numbers of these shapes."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]

    def make() -> list[Tensor]:
        out = function(*leaves, **kwargs)
        out = out[0] if isinstance(out, tuple) else out
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    return make


def large_calls() -> dict[str, Make]:
    """Calls whose tensors are 4 to 16 MiB each."""
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(1))
    centroids = effkern.kmeans_init(weight, 8)
    palette = effkern.palettize(weight, centroids)
    q = (2, 8, 1024, 64)
    return {
        "attention": trained(effkern.attention, q, q, q, causal=True),
        "attention_merge": trained(
            lambda a, b: effkern.attention_merge([a, b], [a.detach()[..., 0], b.detach()[..., 0]]), q, q
        ),
        "long_conv": trained(effkern.long_conv, (4, 16, 32768), (16, 32768)),
        "short_conv": trained(effkern.short_conv, (4, 16, 32768), (16, 4)),
        "companion_kernel": trained(lambda a: effkern.companion_kernel(a / 99, a, a, 4096), (512, 16)),
        "monarch_matmul": trained(effkern.monarch_matmul, (2048, 1024), (8, 128, 128), (8, 128, 128)),
        "block_diag_matmul": trained(effkern.block_diag_matmul, (2048, 1024), (8, 128, 128)),
        "dkm": trained(lambda w: effkern.dkm(w, centroids, temperature=0.1), (1024, 1024)),
        "kmeans_init": lambda: [effkern.kmeans_init(weight, 8)],
        "palettized_linear": trained(lambda x: effkern.palettized_linear(x, palette), (2048, 1024)),
        "coupling": lambda: [effkern.coupling(weight.expand(4, -1, -1), weight.expand(4, -1, -1), q=14)[0]],
    }


def impossible_calls() -> dict[str, Callable[[], Any]]:
    """Results of a tebibyte and more, of arguments that take next to nothing: all entries are in one place."""
    huge = torch.zeros(1).expand
    table = effkern.palettize(torch.randn(1 << 16, 4), torch.randn(8))
    far, wide = 1 << 26, 1 << 20
    return {
        "attention": lambda: effkern.attention(
            huge(wide, 64, 64, 64), huge(wide, 64, 1, 64), huge(wide, 64, 1, 64)
        ),
        "attention_decode": lambda: effkern.attention_decode(
            huge(wide, 64, 64, 64),
            huge(wide, 1, 2, 64),
            huge(wide, 1, 2, 64),
            torch.ones(wide, dtype=torch.int32),
        ),
        "attention_merge": lambda: effkern.attention_merge([huge(far, 64, 64)] * 2, [huge(far, 64)] * 2),
        "long_conv": lambda: effkern.long_conv(huge(wide, 1, far), huge(1, far)),
        "long_conv_prepare": lambda: effkern.long_conv_prepare(huge(wide, 4), 1 << 30),
        "short_conv": lambda: effkern.short_conv(huge(wide, 4, far), huge(4, 4)),
        "companion_kernel": lambda: effkern.companion_kernel(*[huge(wide, 4)] * 3, length=far),
        "monarch_matmul": lambda: effkern.monarch_matmul(huge(far, 4096), huge(64, 64, 64), huge(64, 64, 64)),
        "block_diag_matmul": lambda: effkern.block_diag_matmul(huge(far, 4096), huge(64, 64, 64)),
        "dkm": lambda: effkern.dkm(huge(far, 4096), torch.randn(8), temperature=0.1),
        "kmeans_init": lambda: effkern.kmeans_init(huge(far, 4096), 8),
        "palettized_linear": lambda: effkern.palettized_linear(huge(far, 4), table),
        "coupling": lambda: effkern.coupling(huge(far, 4096), huge(far, 4096)),
    }


def attempt(call: Callable[[], Any], headroom: int) -> tuple[Any, str]:
    """What a call returns with so many MiB to spare, or the words of its error, which has to be about memory."""
    try:
        with limited(headroom):
            return call(), ""
    except ERRORS as error:
        text = f"{type(error).__name__}: {error}"
        assert isinstance(error, MemoryError) or any(word in text.lower() for word in WORDS), text
        return None, text


def main(step: int) -> None:
    torch.set_num_threads(2)
    made, counts = large_calls(), Counter[str]()
    healthy = dict(digests())  # every op has its threads and its tables now
    expected = {name: digest(make()) for name, make in made.items()}
    for headroom in HEADROOM[::step]:
        for name, make in made.items():
            found, error = attempt(make, headroom)
            counts["raised" if error else "enough"] += 1
            assert error or digest(found) == expected[name], f"{name}: other bits with {headroom} MiB left"
            found = None
    for name, call in impossible_calls().items():
        _, error = attempt(call, 512)
        assert error, f"{name}: a result of a tebibyte"
        counts["impossible"] += 1
    assert dict(digests()) == healthy, "other bits after errors"
    for name, make in made.items():
        assert digest(make()) == expected[name], f"{name}: other bits after errors"
    counts["afterwards"] = len(healthy) + len(made)
    print(json.dumps(counts))


if __name__ == "__main__":
    main(int(sys.argv[1]))
