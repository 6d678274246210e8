"""What was built: symbols, import, kernel sources, CUDA resources."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

import effkern
from effkern import _lib

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(effkern.__file__).parent
LIBRARIES = sorted((PACKAGE / "lib").glob("*.so"))
HOST = _lib.status().host.path
ISA_UNITS = ("scalar", "avx2", "avx512", "avx512_bf16", "amx")
# The newest symbol versions of manylinux_2_28.
NEWEST = {"GLIBC": Version("2.28"), "GLIBCXX": Version("3.4.24"), "CXXABI": Version("1.3.11")}

needs_plain_build = pytest.mark.skipif(
    _lib.status().build.sanitize or _lib.status().build.emulate, reason="looks at the build that is shipped"
)


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def nm(path: Path, *options: str) -> list[tuple[str, str]]:
    """(type letter, symbol) pairs of a binary."""
    if not shutil.which("nm"):
        pytest.skip("needs nm (binutils)")
    text = subprocess.run(["nm", *options, str(path)], check=True, capture_output=True, text=True).stdout
    return [(fields[-2], fields[-1]) for line in text.splitlines() if len(fields := line.split()) >= 2]


def python(code: str, **environment: str) -> str:
    """Runs code in a fresh interpreter, outside the source tree."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        cwd=os.sep,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@needs_plain_build
@pytest.mark.parametrize("library", LIBRARIES, ids=names(LIBRARIES))
def test_undefined_symbols(library: Path) -> None:
    """A library needs the C shim of torch's stable ABI, the C and C++ run time, and nothing else."""
    allowed = re.compile(
        r"(aoti_torch_|torch_)\w+$|\w+@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+$|_ITM_\w+$|__gmon_start__$|__tls_get_addr"
    )
    if library.name != "libeffkern_cpu.so":
        allowed = re.compile(allowed.pattern + r"|_ZN7effkern\w+$")
    symbols = [name for _, name in nm(library, "-D", "--undefined-only")]
    assert symbols
    assert [name for name in symbols if not allowed.match(name)] == []


@needs_plain_build
@pytest.mark.parametrize("library", LIBRARIES, ids=names(LIBRARIES))
def test_exports_only_its_own(library: Path) -> None:
    exported = [name for _, name in nm(library, "-D", "--defined-only", "--extern-only")]
    assert [name for name in exported if not name.startswith("_ZN7effkern")] == []


@needs_plain_build
def test_host_module_exports_its_entry_only() -> None:
    assert [name for _, name in nm(HOST, "-D", "--defined-only", "--extern-only")] == ["PyInit__host"]


@needs_plain_build
@pytest.mark.parametrize("library", [*LIBRARIES, HOST], ids=names([*LIBRARIES, HOST]))
def test_runs_on_older_systems(library: Path) -> None:
    """Whatever built it: csrc/core/portability.cpp defines what is newer than manylinux_2_28."""
    symbols = [name for _, name in nm(library, "-D", "--undefined-only")]
    versions = [
        (name, match[1], Version(match[2]))
        for name in symbols
        if (match := re.search(r"@(GLIBC|GLIBCXX|CXXABI)_([\d.]+)$", name))
    ]
    assert versions
    assert [name for name, library, version in versions if version > NEWEST[library]] == []


def test_build_says_what_it_is() -> None:
    build = _lib.status().build
    assert re.fullmatch(r"([0-9a-f]{40}(-dirty)?)?", build.commit)
    assert build.commit or not (PACKAGE.parent / ".git").exists()
    assert re.fullmatch(r"\w+ [\d.]+", build.compiler) and build.torch
    assert set(build.flags) == {"base", "units", *ISA_UNITS, "nvcc"}
    assert "-std=c++20" in build.flags["base"] and "-O3" in build.flags["base"]
    if not build.emulate:
        assert "-mavx2" in build.flags["avx2"] and "-mamx-tile" in build.flags["amx"]
    assert bool(build.flags["nvcc"]) == bool(build.nvcc) == bool(build.cuda_images)


@needs_plain_build
@pytest.mark.parametrize("library", LIBRARIES, ids=names(LIBRARIES))
def test_runs_on_the_oldest_torch(library: Path) -> None:
    audit = pytest.importorskip("torch_abi_audit", reason="needs torch-abi-audit (Python 3.11)")
    verdict = audit.inspect_extension(library).torch
    assert verdict.stable, verdict.unstable_symbols
    oldest = Version(_lib.OLDEST_TORCH)
    assert Version(verdict.min_torch_version) <= oldest, verdict.version_defining_symbols
    assert not verdict.unknown_shim_symbols


def isa_objects() -> list[Path]:
    """Object files of the CPU units from the build folder of this checkout."""
    for folder in sorted((ROOT / "build").glob(f"{sys.implementation.cache_tag}*")):
        if not re.search("emulate|sanitize", folder.name):
            objects = folder.glob("CMakeFiles/effkern_cpu.dir/csrc/*/*.cpp.o")
            if units := [path for path in objects if path.name.startswith(ISA_UNITS)]:
                return sorted(units)
    return []


def test_isa_units_share_no_code() -> None:
    """The linker keeps one copy of a weak symbol: another CPU must not be given one with AVX-512 in it."""
    objects = isa_objects()
    if not objects:
        pytest.skip("no object files: effkern was not built in this checkout")
    owner: dict[str, str] = {}
    for path in objects:
        weak = {name for kind, name in nm(path, "--defined-only") if kind in "WVu"}
        standard = [name for name in weak if re.match(r"_ZN?K?S|_ZN9__gnu_cxx", name)]
        assert not standard, f"{path.name} holds code of the C++ library: {standard[:5]}"
        for name in weak:
            assert owner.setdefault(name, path.name) == path.name, (
                f"{name} is in {owner[name]} and {path.name}"
            )


SOURCES = [
    path
    for folder in ("csrc", "effkern", "bench", "triton_kernels", "tests", "scripts")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh", ".sh")
]
KERNELS = [
    path
    for path in SOURCES
    if path.is_relative_to(ROOT / "csrc")
    and (
        path.parent.name == "cpu"
        or path.suffix == ".cuh"
        or path.stem in ISA_UNITS
        or re.search(r"body|kernel|^unit_|^engine_", path.name)
    )
]


def included(path: Path, seen: set[Path] | None = None) -> dict[str, Path]:
    """Everything a file includes that is not our own, directly or through our headers, and by which file."""
    seen = set() if seen is None else seen
    seen.add(path)
    foreign: dict[str, Path] = {}
    for name in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE):
        own = next((at for at in (path.parent / name, ROOT / "csrc" / name) if at.is_file()), None)
        if own is None:
            foreign[name] = path
        elif own.resolve() not in seen:
            foreign |= included(own.resolve(), seen)
    return foreign


@pytest.mark.parametrize("kernel", KERNELS, ids=[str(path.relative_to(ROOT / "csrc")) for path in KERNELS])
def test_kernels_know_no_torch(kernel: Path) -> None:
    for name, by in included(kernel).items():
        assert not re.match("torch/|ATen/|c10/|caffe2/", name), f"{by.relative_to(ROOT)} includes {name}"


@pytest.mark.parametrize(
    "unit", [path for path in KERNELS if path.stem in ISA_UNITS], ids=lambda path: path.stem
)
def test_isa_units_include_no_cpp_library(unit: Path) -> None:
    """Headers of the C++ library have no suffix; those of C and of the intrinsics have."""
    for name, by in included(unit).items():
        assert name.endswith(".h"), f"{by.relative_to(ROOT)} includes <{name}>"


def test_no_file_is_a_giant() -> None:
    lengths = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in SOURCES}
    assert {name: lines for name, lines in lengths.items() if lines > 600} == {}


def cuda_resources() -> str:
    library = PACKAGE / "lib" / "libeffkern_cuda.so"
    if not library.exists():
        pytest.skip(_lib.status().cuda.reason)
    tool = shutil.which("cuobjdump")
    if tool is None:
        triton = pytest.importorskip("triton", reason="needs cuobjdump (CUDA toolkit, or triton's copy)")
        tool = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    command = [tool, "--dump-resource-usage", str(library)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_cuda_images() -> None:
    text = cuda_resources()
    code = set(re.findall(r"elf code:\n=+\narch = (\w+)", text))
    ptx = set(re.findall(r"ptx code:\n=+\narch = sm_(\w+)", text))
    assert {"sm_80", "sm_90a"} <= code and ptx
    assert {*code, *(f"compute_{arch}" for arch in ptx)} == set(_lib.status().build.cuda_images)


def test_cuda_kernels_stay_in_registers() -> None:
    kernels = re.findall(r"Function (\w+):\n\s*REG:\d+ STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", cuda_resources())
    assert kernels
    assert [name for name, stack, local in kernels if int(stack) or int(local)] == []


ATTENTION = "q = torch.randn(1, 2, 8, 16); print(tuple(effkern.attention(q, q, q, causal=True).shape))"
SHAPE = "(1, 2, 8, 16)"


@pytest.mark.sanitize
def test_import_without_triton() -> None:
    hide = "import sys; sys.modules['triton'] = None; import torch, effkern; "
    assert python(hide + ATTENTION) == SHAPE


def test_import_does_not_import_triton() -> None:
    code = "import sys, torch; before = set(sys.modules); import effkern; print(*set(sys.modules) - before)"
    assert not {"triton", "rich", "typer", "matplotlib"} & set(python(code).split())


def test_import_without_tools(tmp_path: Path) -> None:
    """No compiler, no nvcc, no git on PATH: nothing is built or asked at run time."""
    assert python("import torch, effkern; " + ATTENTION, PATH=str(tmp_path)) == SHAPE


def test_import_with_unusable_home() -> None:
    nowhere = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "TRITON_CACHE_DIR"), "/dev/null/home")
    assert python("import torch, effkern; " + ATTENTION, **nowhere) == SHAPE


@needs_plain_build
def test_import_is_quick(tmp_path: Path) -> None:
    """A fifth of what torch takes at most, in the best of some fresh processes, compiled once as one installed is.

    Beside torch, because clocks differ and change: seconds would be a test of the machine.
    """
    clock = "time.process_time()"
    code = (
        f"import time; a = {clock}; import torch; b = {clock}; import effkern; print(({clock} - b) / (b - a))"
    )
    compiled = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    assert min(float(python(code, **compiled)) for _ in range(4)) < 0.2


def test_a_tree_that_is_not_built_says_so(tmp_path: Path) -> None:
    shutil.copytree(
        PACKAGE, tmp_path / "effkern", ignore=shutil.ignore_patterns("*.so", "__pycache__", "build.json")
    )
    code = "try:\n import effkern\nexcept ImportError as error: print(error)"
    assert "has not been built. Run `make build`" in python(code, PYTHONPATH=str(tmp_path))


def test_a_broken_library_says_what_to_do(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "effkern", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "effkern" / "lib" / "libeffkern_cpu.so").write_bytes(b"not a library")
    code = "try:\n import effkern\nexcept ImportError as error: print(error)"
    message = python(code, PYTHONPATH=str(tmp_path))
    assert "libeffkern_cpu.so could not be loaded" in message
    assert "Install effkern again" in message
