"""How numbers and the machine are put into words, for the terminal and the report alike."""

from __future__ import annotations

from .results import Results


def rate(value: float) -> str:
    for limit, unit in ((1e12, "TFLOP/s"), (1e9, "GFLOP/s")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value / 1e6:.3g} MFLOP/s"


def size(value: float | None) -> str:
    if value is None:
        return ""
    for limit, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.0f} B"


def number(value: float | None) -> str:
    """Three significant digits, without an exponent."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def machine_lines(results: Results) -> list[tuple[str, str]]:
    machine = results.machine
    lines = [
        ("CPU", f"{machine.cpu}, {machine.threads} threads, {machine.isa}"),
        ("system", machine.platform),
    ]
    if machine.gpu:
        lines.append(("GPU", f"{machine.gpu}, driver {machine.driver or 'unknown'}, CUDA {machine.cuda}"))
    lines.append(
        ("torch", machine.torch + (f", triton {machine.triton}" if machine.triton else ", no triton"))
    )
    lines.append(("commit", results.commit + (" with uncommitted changes" if results.dirty else "")))
    roofs = [
        f"{k} {rate(v)}" if k != "copy" else f"copy {v / 1e9:.3g} GB/s" for k, v in results.roofs.items()
    ]
    lines.append(("roofs", ", ".join(roofs)))
    return lines
