"""What a result has to be read against: the machine, its versions, and its roofs measured in the same run."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
import time
from importlib import metadata
from pathlib import Path

import torch

from .results import SCHEMA, Machine, Results

# Big enough to be far from every cache, small enough to be measured in a second on two cores.
MATMUL_SIZE = {"cpu": 1536, "cuda": 8192}
COPY_BYTES = {"cpu": 192 << 20, "cuda": 2 << 30}
ROOF_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe(device: torch.device) -> Machine:
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    cpu = _cpu_name()
    levels = _isa_levels()
    threads = torch.get_num_threads()
    name = (
        _slug(re.sub(r"NVIDIA|GeForce", "", gpu))
        if gpu
        else _slug(f"{_short_cpu(cpu)} {levels[0]} {threads}t")
    )
    return Machine(
        name=name,
        cpu=cpu,
        isa=" ".join(levels),
        gpu=gpu,
        driver=_driver() if gpu else None,
        torch=torch.__version__,
        triton=package_version("triton"),
        cuda=torch.version.cuda,
        threads=threads,
        platform=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    )


def new_results(device: torch.device) -> Results:
    commit, dirty = commit_state()
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return Results(SCHEMA, describe(device), commit, dirty, now, roofs={})


def measure_roofs(device: torch.device) -> dict[str, float]:
    """Matmul rate per dtype in FLOP/s, copy bandwidth in bytes/s (a copy reads and writes)."""
    roofs = {f"matmul {_dtype_name(dtype)}": _matmul_rate(device, dtype) for dtype in ROOF_DTYPES}
    roofs["copy"] = _copy_rate(device)
    return roofs


def binding_roof(roofs: dict[str, float], dtype: str, flops: float, nbytes: float) -> tuple[str, float]:
    """Name of the roof that binds and the seconds it allows.

    A half-precision kernel may convert to fp32 on the way in, so its roof is the faster of both matmuls: on
    a CPU without bf16 units torch's bf16 matmul is far below what the machine can do.
    """
    names = {f"matmul {dtype}", "matmul float32"}
    name = max((n for n in names if n in roofs), key=lambda n: roofs[n])
    compute, traffic = flops / roofs[name], nbytes / roofs["copy"]
    return (name, compute) if compute >= traffic else ("copy", traffic)


def last_level_cache_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        match = re.fullmatch(r"(\d+)([KMG]?)", path.read_text().strip())
        if match:
            sizes.append(int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]])
    return max(sizes, default=32 << 20)


def commit_state() -> tuple[str, bool]:
    """Commit of the source tree and whether it has uncommitted changes; an installed package has neither."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return "unknown", False
    try:
        commit = _git(root, "rev-parse", "--short=12", "HEAD")
        return commit, bool(_git(root, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown", False


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    size = MATMUL_SIZE[device.type]
    # A CPU without units for the dtype may be a hundred times slower: find out on a small one first.
    trial = _matmul_seconds(device, dtype, 256)
    if trial * (size / 256) ** 3 > 0.5:
        size = min(size, 512)
    best = min(_matmul_seconds(device, dtype, size) for _ in range(4))
    return 2.0 * size**3 / best


def _matmul_seconds(device: torch.device, dtype: torch.dtype, size: int) -> float:
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    torch.matmul(a, b)
    return _seconds(lambda: torch.matmul(a, b), device)


def _copy_rate(device: torch.device) -> float:
    source = torch.ones(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    best = min(_seconds(lambda: target.copy_(source), device) for _ in range(5))
    return 2.0 * source.numel() * 4 / best


def _seconds(call: object, device: torch.device) -> float:
    assert callable(call)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _cpu_name() -> str:
    from effkern import _host

    return str(_host.cpu_name()) or platform.processor() or "unknown CPU"


def _isa_levels() -> list[str]:
    """Levels the machine has, the one in use first, the others from the highest down."""
    from effkern import _host

    active = str(_host.isa_active())
    return [active, *(level for level in reversed(_host.isa_levels()) if level != active)]


def _short_cpu(name: str) -> str:
    return re.sub(r"\((R|TM)\)|\b(CPU|Processor|[0-9]+-Core)\b|@.*", "", name)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def package_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.split("\n")[0].strip() or None
