"""What is given away: a wheel and a source distribution of this checkout."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import effkern
from effkern import _lib

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(effkern.__file__).parent
MAPPING = {"effkern": "effkern", "bench": "effkern/bench", "triton_kernels": "effkern/_triton"}

pytestmark = pytest.mark.skipif(
    PACKAGE.parent != ROOT or _lib.status().build.sanitize or _lib.status().build.emulate,
    reason="builds what the checkout has built, and another effkern is being tested",
)


def run_setup(folder: Path, **steps: list[str]) -> None:
    """Runs commands of setup.py with nothing written into the checkout."""
    steps = {
        "egg_info": ["--egg-base", str(folder)],
        "build": ["--build-base", str(folder / "build")],
        **steps,
    }
    words = [word for step, options in steps.items() for word in (step, *options)]
    command = [sys.executable, "setup.py", "-q", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--dist-dir", str(folder / "dist"), "--bdist-dir", str(folder / "bdist")]
    run_setup(folder, bdist_wheel=options)
    (path,) = (folder / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def contents(wheel: Path) -> list[str]:
    return zipfile.ZipFile(wheel).namelist()


def test_puts_only_effkern_on_the_path(contents: list[str]) -> None:
    tops = {name.split("/")[0] for name in contents}
    assert {top for top in tops if not re.fullmatch(r"effkern-[\w.]+\.dist-info", top)} == {"effkern"}


def test_is_complete(contents: list[str]) -> None:
    for folder, inside in MAPPING.items():
        for path in (ROOT / folder).rglob("*.py"):
            name = f"{inside}/{path.relative_to(ROOT / folder)}"
            assert name in contents, f"{name} is missing: is its package listed in pyproject.toml?"
    built = {f"effkern/lib/{path.name}" for path in (PACKAGE / "lib").iterdir()}
    assert "effkern/lib/build.json" in built and built <= set(contents)
    assert [name for name in contents if name.startswith("effkern/_host.")]
    assert {"effkern/py.typed", "effkern/_host.pyi"} <= set(contents)


def test_has_no_leftovers(contents: list[str]) -> None:
    assert [name for name in contents if re.search(r"\.(cpp|h|cu|cuh|o|a|new|pyc)$", name)] == []


def test_passes_what_make_wheel_checks(wheel: Path) -> None:
    """Size, and what the libraries need and where they look; only the tag is auditwheel's to give."""
    check = pytest.importorskip("check_wheel", reason="needs pyelftools")
    assert [fault for fault in check.faults(wheel) if "not for manylinux_2_28" not in fault] == []


def test_faults_of_a_wheel_are_found(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = pytest.importorskip("check_wheel", reason="needs pyelftools")
    bad = tmp_path / wheel.name
    with zipfile.ZipFile(wheel) as good, zipfile.ZipFile(bad, "w") as copy:
        for name in good.namelist():
            # The libraries change places, and one lies where a tool would have grafted it.
            host = next(other for other in good.namelist() if "_host." in other and other.endswith(".so"))
            swapped = {host: "effkern/lib/libeffkern_cpu.so"}.get(name, name)
            copy.writestr(name, good.read(swapped))
        copy.writestr("effkern.libs/libtorch.so", b"")
    monkeypatch.setattr(check, "BUDGET_CPU", 1.0)
    monkeypatch.setattr(check, "BUDGET_CUDA", 1.0)
    found = "\n".join(check.faults(bad))
    for words in (
        "not for manylinux",
        "was it grafted",
        "needs libtorch",
        "looks for libraries in []",
        "budget",
    ):
        assert words in found


def git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return done.stdout.strip()


def test_source_distribution_is_complete(tmp_path: Path) -> None:
    tracked, head, changes = git("ls-files"), git("rev-parse", "HEAD"), git("status", "--porcelain")
    run_setup(tmp_path, sdist=["--dist-dir", str(tmp_path / "dist")])
    (path,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2]: name for name in archive.getnames()}
        commit = archive.extractfile(names["COMMIT"])
        assert commit is not None
        assert commit.read().decode().strip() == head + ("-dirty" if changes else "")
    assert set(tracked.split()) - {".gitignore"} <= set(names)
    assert [name for name in names if name.endswith((".so", ".pyc")) or name.startswith("build/")] == []
