"""The machine code of the built CUDA library: what its kernels use, and which instructions they have. Needs no GPU.

Importing it skips a test module where the library was not built.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

import effkern
from effkern import _lib

LIBRARY = Path(effkern.__file__).parent / "lib" / "libeffkern_cuda.so"
IMAGES = _lib.status().build.cuda_images
ARCHITECTURES = [image for image in IMAGES if image.startswith("sm_")]

if not LIBRARY.exists():
    pytest.skip("the CUDA library was not built (no nvcc)", allow_module_level=True)


def _tool() -> str:
    """cuobjdump, from the toolkit or from the triton package."""
    found = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        bundled = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(bundled) if bundled.exists() else None
    if found is None:
        pytest.skip("no cuobjdump: neither the CUDA toolkit nor triton is here")
    return found


@cache
def dump(*options: str) -> str:
    """What cuobjdump prints about the library."""
    return subprocess.run(
        [_tool(), *options, str(LIBRARY)], check=True, capture_output=True, text=True
    ).stdout


def sections(text: str, pattern: str) -> dict[tuple[str, str], str]:
    """Text by (architecture, kernel); `pattern` captures a kernel's name where its section begins."""
    found = {}
    for part in re.split(r"^arch = ", text, flags=re.MULTILINE)[1:]:
        names = re.split(pattern, part)
        for name, body in zip(names[1::2], names[2::2], strict=True):
            found[part.split(maxsplit=1)[0], name] = body
    return found


def name_of(kernel: str, template: str) -> str:
    """The mangled name of the one kernel that has both in it."""
    names = {name for _, name in resources() if kernel in name and template in name}
    assert len(names) == 1, names
    return names.pop()


@cache
def resources() -> dict[tuple[str, str], dict[str, int]]:
    """Registers, stack and local memory, by architecture and kernel."""
    return {
        key: {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", body)}
        for key, body in sections(dump("-res-usage"), r" Function (\S+):").items()
    }


@cache
def instructions() -> dict[tuple[str, str], Counter[str]]:
    """How often each operation occurs in a kernel's machine code, without its modifiers."""
    operation = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", re.MULTILINE)
    return {
        key: Counter(operation.findall(body))
        for key, body in sections(dump("-sass"), r"Function : (\S+)").items()
    }
