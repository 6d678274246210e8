"""Checks a finished wheel: its tags, what it holds, what its libraries look for and where, and its size.

python scripts/check_wheel.py dist/*.whl
"""

from __future__ import annotations

import io
import json
import re
import sys
import zipfile
from pathlib import Path

from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from packaging.utils import parse_wheel_filename

# MB of 10^6 bytes, also stated in docs/install-faq.md: without the CUDA library, and with it.
BUDGET_CPU = 5.0
BUDGET_CUDA = 20.0
SYSTEM = r"lib(c|m|dl|rt|pthread|stdc\+\+|gcc_s)\.so\.\d+|ld-linux-[\w-]+\.so\.\d+"
TORCH = r"libtorch(_cpu)?\.so"
# By library: what it may need beside the system's, and the folders it looks in.
ALLOWED = {
    "effkern/lib/libeffkern_cpu.so": (TORCH, []),
    "effkern/lib/libeffkern_cuda.so": (rf"{TORCH}|libeffkern_cpu\.so", ["$ORIGIN"]),
    "effkern/_host": (r"libeffkern_cpu\.so", ["$ORIGIN/lib"]),
}


def dynamic(data: bytes) -> tuple[list[str], list[str]]:
    """(libraries that are needed, folders that are searched) of a shared library."""
    needed, folders = [], []
    for section in ELFFile(io.BytesIO(data)).iter_sections():
        if isinstance(section, DynamicSection):
            for tag in section.iter_tags():
                if tag.entry.d_tag == "DT_NEEDED":
                    needed.append(tag.needed)
                elif tag.entry.d_tag in ("DT_RPATH", "DT_RUNPATH"):
                    folders += (tag.runpath if tag.entry.d_tag == "DT_RUNPATH" else tag.rpath).split(":")
    return needed, folders


def faults(path: Path) -> list[str]:
    """What is wrong with the wheel."""
    found = []
    tags = {tag.platform for tag in parse_wheel_filename(path.name)[3]}
    if not all(re.fullmatch(r"manylinux_2_28_\w+", tag) for tag in tags):
        found.append(f"it is for {', '.join(sorted(tags))}, not for manylinux_2_28")
    with zipfile.ZipFile(path) as wheel:
        libraries = [name for name in wheel.namelist() if re.search(r"\.so(\.|$)", name)]
        for name in libraries:
            key = re.sub(r"_host\..*", "_host", name)
            if key not in ALLOWED:
                found.append(f"{name} does not belong in it: was it grafted?")
                continue
            needed, folders = dynamic(wheel.read(name))
            allowed, expected = ALLOWED[key]
            strangers = [other for other in needed if not re.fullmatch(f"{SYSTEM}|{allowed}", other)]
            if strangers:
                found.append(f"{name} needs {', '.join(strangers)}")
            if folders != expected:
                found.append(f"{name} looks for libraries in {folders}, not in {expected}")
        build = json.loads(wheel.read("effkern/lib/build.json"))
    size = path.stat().st_size / 1e6
    cuda = "effkern/lib/libeffkern_cuda.so" in libraries
    budget = BUDGET_CUDA if cuda else BUDGET_CPU
    if size > budget:
        found.append(f"it has {size:.1f} MB, and the budget is {budget} MB")
    if not build["commit"]:
        found.append("it does not say which commit it is")
    images = ", ".join(build["cuda_images"]) or "no CUDA library"
    print(f"{path.name}: {size:.2f} MB of {budget:.0f}, {images}, commit {build['commit'] or 'unknown'}")
    return found


if __name__ == "__main__":
    wrong = [f"{name}: {fault}" for name in sys.argv[1:] for fault in faults(Path(name))]
    sys.exit("\n".join(wrong) if wrong else len(sys.argv) < 2)
