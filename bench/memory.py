"""Peak extra memory of a call: what it held beyond what was there before, results included."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable
from pathlib import Path

import torch


def peak_extra_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Peak memory of `call` over the state before it, or None where the system gives no sound way to know.

    GPU: the caching allocator's own peak. CPU: the high-water mark of resident memory (VmHWM), reset just
    before the call. It sees every allocation, also those a C++ kernel makes behind torch's allocator. What
    the C allocator kept from earlier calls is handed back first, or reusing it would look free. Scratch that
    a kernel keeps per thread between calls counts only if `call` is its first call.
    """
    gc.collect()
    if device.type == "cuda" or not _reset_high_water():
        return peak_tensor_bytes(call, device)
    before = _status_bytes("VmRSS")
    result = call()
    peak = _status_bytes("VmHWM")
    del result
    return max(0, peak - before)


def peak_tensor_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """The same of tensors alone, by torch's allocator: to the byte, whatever the C allocator and the system make of it.

    Scratch allocated outside torch stays unseen, and on the CPU what other threads allocate.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    if os.environ.get("KINETO_USE_DAEMON"):
        return None  # a system-wide profiler owns the trace
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or every trace writes lines between those of the harness
    with torch.profiler.profile(
        profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]
    ) as profile:
        result = call()
    del result
    held = peak = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def available_bytes(device: torch.device) -> int:
    """What could still be allocated, as far as the system tells; else a guess of 8 GiB."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 8 << 30
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _reset_high_water() -> bool:
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return False  # not glibc: what its allocator kept is unknown
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
