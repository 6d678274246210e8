"""Drives CMake and Ninja; the metadata is in pyproject.toml and the build itself in CMakeLists.txt.

Torch's headers are found without importing torch. `setup_requires` asks for torch only where the environment
has none, so that an isolated `pip install .` builds against the torch that is already there.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TRUE, FALSE = ("1", "on", "true", "yes"), ("0", "off", "false", "no", "")


def torch_root() -> Path | None:
    """Folder of the torch package, also from inside pip's isolated build, which hides the environment's packages."""
    spec = importlib.util.find_spec("torch")
    if spec and spec.origin:
        return Path(spec.origin).parent
    ask = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s and s.origin else '')"
    found = subprocess.run([sys.executable, "-E", "-c", ask], capture_output=True, text=True, cwd=os.sep).stdout.strip()
    return Path(found).parent if found else None


def tool(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))
    if not found:
        sys.exit(f"effkern: '{name}' was not found; install it with `pip install {name}`")
    return found


def flag(name: str, default: str) -> str:
    value = os.environ.get(name, default).lower()
    if value == "auto" == default:
        return "auto"
    if value not in TRUE + FALSE:
        sys.exit(f"effkern: {name}={value!r} is not understood; use 0, 1" + (" or auto" if default == "auto" else ""))
    return "ON" if value in TRUE else "OFF"


def publish(stage: Path, target: Path) -> None:
    """Moves the libraries into the package one by one, each at once: running processes keep the file they have open."""
    (target / "lib").mkdir(parents=True, exist_ok=True)
    fresh = {path.relative_to(stage) for path in stage.rglob("*") if path.is_file()}
    for name in fresh:
        os.replace(shutil.copy2(stage / name, target / f"{name}.new"), target / name)
    for path in (*target.glob("lib/*"), *target.glob("_host.*")):
        if path.relative_to(target) not in fresh:
            path.unlink()  # a library that is no longer built must not stay behind


class CMakeBuild(build_ext):
    """`build_ext --define NAME[=VALUE]` becomes -DNAME=VALUE for CMake; each such variant has its own build folder."""

    def run(self) -> None:
        torch = torch_root()
        if torch is None:
            sys.exit("effkern: torch was not found; install it first with `pip install 'torch>=2.11'`")
        if not (os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
            sys.exit("effkern: no C++ compiler was found; install GCC 11 or newer (Debian, Ubuntu: apt install g++) or set CXX")
        import pybind11

        defines = {"EFFKERN_SANITIZE": flag("EFFKERN_SANITIZE", "0"), "EFFKERN_CUDA": flag("EFFKERN_CUDA", "auto")}
        if defines["EFFKERN_CUDA"] == "auto" and not (shutil.which("nvcc") or os.environ.get("CUDACXX")):
            defines["EFFKERN_CUDA"] = "OFF"
            self.warn(
                "NO CUDA COMPILER (nvcc) WAS FOUND: the CUDA library is left out of this build. "
                "The CPU library and Triton kernels work without it; to have it, put nvcc on PATH and build again."
            )
        for define, _ in self.define or []:  # setuptools has split the option at commas
            name, _, value = define.partition("=")
            defines[name] = value or "ON"
        variant = "".join(f"-{name.removeprefix('EFFKERN_').lower()}" for name in ("EFFKERN_SANITIZE", "EFFKERN_EMULATE")
                          if defines.get(name) in ("1", "ON"))
        folder = ROOT / "build" / f"{sys.implementation.cache_tag}{variant or '-release'}"
        target = ROOT / "effkern" if self.inplace else Path(self.build_lib).resolve() / "effkern"
        defines |= {
            "CMAKE_MAKE_PROGRAM": tool("ninja"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "TORCH_ROOT": str(torch),
        }
        cmake = tool("cmake")
        self.call(cmake, "--log-level=WARNING", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja",
                  *(f"-D{name}={value}" for name, value in sorted(defines.items())))
        self.call(cmake, "--build", str(folder), *(["--parallel", str(self.parallel)] if self.parallel else []),
                  show=self.verbose > 0)
        strip = [] if defines["EFFKERN_SANITIZE"] == "ON" else ["--strip"]
        stage = folder / "install"
        shutil.rmtree(stage, ignore_errors=True)
        self.call(cmake, "--install", str(folder), "--prefix", str(stage), *strip)
        publish(stage, target)

    def call(self, *command: str, show: bool = False) -> None:
        done = subprocess.run(command, stdout=None if show else subprocess.PIPE, text=True)
        if done.returncode:
            print(done.stdout or "", file=sys.stderr)
            sys.exit(f"effkern: the build failed in: {' '.join(command)}")


setup(
    # The module is built by CMake; the entry only marks the wheel as specific to platform and Python version.
    ext_modules=[Extension("effkern._host", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    setup_requires=[] if torch_root() else ["torch>=2.11"],
)
