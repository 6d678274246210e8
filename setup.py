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
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
OPTIONS = {"EFFKERN_CUDA": "auto", "EFFKERN_SANITIZE": "0"}  # environment variables and their defaults
WORDS = {"1": "ON", "on": "ON", "true": "ON", "0": "OFF", "off": "OFF", "false": "OFF"}
MORE_WORDS = {"EFFKERN_CUDA": ("auto",), "EFFKERN_SANITIZE": ("thread",)}


def torch_root() -> Path | None:
    """Folder of the torch package. Pip's isolated build hides the environment's, so that one is asked too."""
    spec = importlib.util.find_spec("torch")
    if spec and spec.origin:
        return Path(spec.origin).parent
    ask = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s and s.origin else '')"
    command = [sys.executable, "-E", "-c", ask]  # -E: without the PYTHONPATH that pip isolates with
    found = subprocess.run(command, capture_output=True, text=True, cwd=os.sep).stdout.strip()
    return Path(found).parent if found else None


def tool(name: str) -> str:
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if not found:
        sys.exit(f"effkern: '{name}' was not found; install it with `pip install {name}`")
    return found


def commit() -> str:
    """What is built: a commit, -dirty with changes on top; of a source distribution, what that was made from."""
    note = ROOT / "COMMIT"
    if note.exists():
        return note.read_text(encoding="utf-8").strip()
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return ""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    head = git("rev-parse", "HEAD")
    return f"{head}-dirty" if head and git("status", "--porcelain") else head


def option(name: str) -> str:
    value = os.environ.get(name) or OPTIONS[name]
    known = WORDS | {word: word for word in MORE_WORDS[name]}
    if value.lower() not in known:
        sys.exit(
            f"effkern: {name}={value!r} is not understood; use {', '.join(('0', '1', *MORE_WORDS[name]))}"
        )
    return known[value.lower()]


def publish(stage: Path, target: Path) -> None:
    """Puts the libraries into the package, each in one step: running processes keep the file they have."""
    (target / "lib").mkdir(parents=True, exist_ok=True)
    fresh = {path.relative_to(stage) for path in stage.rglob("*") if path.is_file()}
    for name in fresh:
        os.replace(shutil.copy2(stage / name, target / f"{name}.new"), target / name)
    for path in (*target.glob("lib/*"), *target.glob("_host.*.so")):
        if path.relative_to(target) not in fresh:
            path.unlink()  # a library that is no longer built must not stay behind


class CMakeBuild(build_ext):
    """`build_ext --define NAME[=VALUE]` becomes -DNAME=VALUE for CMake. Each variant has a build folder."""

    def run(self) -> None:
        options = self.options()
        variant = [name for name in ("sanitize", "emulate") if options.get(f"EFFKERN_{name.upper()}") == "ON"]
        variant += ["thread"] if options["EFFKERN_SANITIZE"] == "thread" else []
        variant += ["cpu"] if options["EFFKERN_CUDA"] == "OFF" else []
        folder = ROOT / "build" / "-".join([str(sys.implementation.cache_tag), *variant])
        target = ROOT / "effkern" if self.inplace else Path(self.build_lib).resolve() / "effkern"
        stage = folder / "install"

        cmake, build = tool("cmake"), str(folder)
        # A list that an earlier build was given is not that of this one.
        defines = ["-UEFFKERN_CUDA_ARCHITECTURES", f"-DEFFKERN_COMMIT={commit()}"]
        defines += [f"-D{name}={value}" for name, value in sorted((options | self.machine()).items())]
        self.call(cmake, "--log-level=WARNING", "-S", str(ROOT), "-B", build, "-G", "Ninja", *defines)
        jobs = ["--parallel", str(self.parallel)] if self.parallel else []
        self.call(cmake, "--build", build, *jobs, show=self.verbose > 0)
        shutil.rmtree(stage, ignore_errors=True)
        strip = [] if {"sanitize", "thread"} & set(variant) else ["--strip"]
        self.call(cmake, "--install", build, "--prefix", str(stage), *strip)
        publish(stage, target)

    def options(self) -> dict[str, str]:
        """EFFKERN_* options for CMake, from the environment and the command line."""
        options = {name: option(name) for name in OPTIONS}
        if architectures := os.environ.get("EFFKERN_CUDA_ARCHITECTURES"):
            options["EFFKERN_CUDA_ARCHITECTURES"] = architectures
        for define, _ in self.define or []:  # setuptools has split them at commas
            name, _, value = define.partition("=")
            options[name] = WORDS.get(value.lower(), value) or "ON"
        if options["EFFKERN_CUDA"] == "auto" and not (shutil.which("nvcc") or os.environ.get("CUDACXX")):
            options["EFFKERN_CUDA"] = "OFF"
            self.warn(
                "NO CUDA COMPILER (nvcc) WAS FOUND: this build leaves the CUDA library out. The CPU library "
                "and the Triton kernels work without it. To have it, put nvcc on PATH and build again."
            )
        return options

    def machine(self) -> dict[str, str]:
        """Where CMake finds what is outside the project."""
        torch = torch_root()
        if torch is None:
            sys.exit("effkern: torch was not found; install it first: pip install 'torch>=2.11'")
        if not (os.environ.get("CXX") or any(map(shutil.which, ("c++", "g++", "clang++")))):
            sys.exit(
                "effkern: no C++ compiler was found; install GCC 11 or newer (apt install g++) or set CXX"
            )
        try:
            import pybind11
        except ImportError:
            sys.exit("effkern: pybind11 was not found; install it first: pip install pybind11")
        return {
            "CMAKE_MAKE_PROGRAM": tool("ninja"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "TORCH_ROOT": str(torch),
        }

    def call(self, *command: str, show: bool = False) -> None:
        done = subprocess.run(command, stdout=None if show else subprocess.PIPE, text=True)
        if done.returncode:
            print(done.stdout or "", file=sys.stderr)
            sys.exit(f"effkern: the build failed in: {' '.join(command)}")


class SourceDistribution(sdist):
    """Says which commit it was made from, because what is built from it has no git to ask."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        known = commit()  # before the tree lies in the checkout, as a change of it
        super().make_release_tree(base_dir, files)
        (Path(base_dir) / "COMMIT").write_text(known + "\n", encoding="utf-8")


setup(
    # CMake builds the module; the entry only marks the wheel as specific to platform and Python version.
    ext_modules=[Extension("effkern._host", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "sdist": SourceDistribution},
    setup_requires=[] if torch_root() else ["torch>=2.11"],
)
