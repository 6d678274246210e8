"""Memory that runs out, and memory that must not grow."""

from __future__ import annotations

import gc
import json
import random
import resource
import time
from pathlib import Path

import pytest
from robust_calls import calls, script
from robust_fuzz import Plan
from robust_tally import count

import effkern
from effkern.ops import registry

AREA = "memory"
LINUX = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc/self/statm")


@LINUX
@pytest.mark.skipif(effkern._lib.status().build.sanitize, reason="sanitizers reserve the address space")
def test_out_of_memory(plan: Plan) -> None:
    # Blocks go back to the system when they are freed: none that lies about can serve a call under the limit.
    tunables = "glibc.malloc.mmap_threshold=65536"
    done = script("robust_memory.py", "1" if plan.nightly else "2", GLIBC_TUNABLES=tunables)
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stderr}"
    found = json.loads(done.stdout)
    assert found["raised"] >= 10 and found["enough"] >= 5, "the limits do not fall into the calls"
    count(AREA, "an impossible size", refused=found["impossible"])
    count(AREA, "no memory left, at any allocation", refused=found["raised"], right=found["enough"])
    count(AREA, "calls afterwards", right=found["afterwards"])


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@LINUX
@pytest.mark.skipif(effkern._lib.status().build.sanitize, reason="sanitizers keep freed memory back")
def test_soak(plan: Plan) -> None:
    """Calls of every op in any order, with gradients, some of them bad: memory stays where it was after warm-up."""
    order = random.Random(plan.seed)
    good = calls()
    bad = [(spec, sample) for spec in registry.specs() for sample in spec.bad_samples("cpu")]

    def once() -> bool:
        if order.random() < 0.1:
            spec, sample = order.choice(bad)
            with pytest.raises(sample.error):
                spec.public(*sample.args, **sample.kwargs)
            return False
        order.choice(good).results()
        return True

    for call in good:
        call.results()
    for _ in range(len(bad) + 600):  # allocators have found their sizes, and every message has been made once
        once()
    gc.collect()
    start, made, refused = resident(), 0, 0
    end = time.monotonic() + 5
    while made + refused < 10_000 if plan.nightly else time.monotonic() < end:
        fine = once()
        made, refused = made + fine, refused + (not fine)
    gc.collect()
    grown = resident() - start
    assert grown < 8 << 20, f"{grown / 2**20:.1f} MiB more after {made + refused} calls"
    note = f"grew by {grown / 2**20:.1f} MiB of {start / 2**20:.0f}"
    count(AREA, "soak of mixed calls", right=made, refused=refused, note=note)
