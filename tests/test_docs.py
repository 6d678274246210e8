"""The documentation keeps its word: its programs run, its links lead somewhere, and every public name has a place.

A page is one program: its python blocks run in order, in one namespace. HTML comments are for this test: it runs the
code of `<!-- setup: CODE -->`, for names that a block takes for granted, and of `<!-- check: CODE -->`, where a page
makes a promise; `<!-- fragment: WHY -->` leaves the block after it out.
"""

from __future__ import annotations

import doctest
import importlib
import inspect
import itertools
import re
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from markdown_it import MarkdownIt

import effkern

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), *sorted((DOCS / "recipes").glob("*.md"))]
FAMILIES = ("attention", "long_conv", "monarch", "dkm", "reversible")
# Modules whose public functions and classes belong into docs/api.
PUBLIC = (
    *("effkern", "effkern.nn", "effkern.masks", "effkern.convert", "effkern.reversible", "effkern.testing"),
    *(f"effkern.integrations.{name}" for name in ("transformers", "sdpa", "flash_attn")),
)
MARKDOWN = MarkdownIt("commonmark").enable("table")


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _pieces(page: Path) -> list[tuple[int, str]]:
    """The code of a page: line and text of every block, set-up and check."""
    pieces, skipping = [], False
    for token in MARKDOWN.parse(page.read_text(encoding="utf-8")):
        if token.type == "html_block":
            comment = re.fullmatch(
                r"<!--\s*(fragment|setup|check)\b:?(.*)-->", token.content.strip(), re.DOTALL
            )
            if comment and comment[1] != "fragment":
                pieces.append((token.map[0], textwrap.dedent(comment[2])))
            skipping = bool(comment) and comment[1] == "fragment"
            continue
        if token.type == "fence" and token.info == "python" and not skipping:
            pieces.append((token.map[0] + 1, token.content))
        skipping = False
    return pieces


PROGRAMS = [page for page in PAGES if _pieces(page)]


@pytest.mark.plain_empty
@pytest.mark.parametrize("page", PROGRAMS, ids=_name)
def test_programs_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # recipes write files
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for line, code in _pieces(page):
        padded = "\n" * line + code  # tracebacks then say the line of the page
        exec(compile(padded, str(page), "exec"), namespace)


def test_most_blocks_run() -> None:
    blocks = [token for page in PAGES for token in MARKDOWN.parse(page.read_text(encoding="utf-8"))]
    blocks = [token for token in blocks if token.type == "fence" and token.info == "python"]
    run = [code for page in PAGES for _, code in _pieces(page)]
    assert len(run) >= 0.75 * len(blocks), f"{len(blocks) - len(run)} of {len(blocks)} blocks are fragments"


def _with_examples() -> list[str]:
    found = [path for path in sorted((ROOT / "effkern").rglob("*.py")) if ">>> " in path.read_text("utf-8")]
    return [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in found]


@pytest.mark.parametrize("module", _with_examples())
def test_examples_of_docstrings(module: str) -> None:
    names = {"effkern": effkern, "torch": torch}
    outcome = doctest.testmod(importlib.import_module(module), extraglobs=names)
    assert outcome.attempted > 0 and outcome.failed == 0


def _markdown_files() -> list[Path]:
    skipped = {"build", "dist", "bench-out", ".venv", ".pytest_cache", "node_modules"}
    found = [path for path in ROOT.rglob("*.md") if not skipped & set(path.relative_to(ROOT).parts[:-1])]
    return sorted(found)


def _links(page: Path) -> Iterator[str]:
    for token in MARKDOWN.parse(page.read_text(encoding="utf-8")):
        for child in token.children or ():
            target = child.attrGet("href" if child.type == "link_open" else "src")
            if child.type in ("link_open", "image") and isinstance(target, str):
                yield target


def _anchors(page: Path) -> set[str]:
    """Of the headings, as code hosts and the site make them."""
    tokens = MARKDOWN.parse(page.read_text(encoding="utf-8"))
    headings = [after.content for token, after in itertools.pairwise(tokens) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@pytest.mark.parametrize("page", _markdown_files(), ids=_name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in _links(page):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), f"{_name(page)}: {target} does not exist"
        if anchor:
            assert anchor in _anchors(place), f"{_name(page)}: {target}: no such heading"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_page_has_all_its_parts(family: str) -> None:
    text = (DOCS / f"{family}.md").read_text(encoding="utf-8")
    for heading in ("When it pays", "Measured|What it costs", "Limits", "Sources"):
        assert re.search(rf"^## ({heading})$", text, re.MULTILINE), f"{family}.md: no section {heading}"
    assert f"(api/{family}.md)" in text and "](images/" in text


def _documented() -> dict[str, Any]:
    """The objects of docs/api by the names they have there."""
    found = {}
    for page in sorted((DOCS / "api").glob("*.md")):
        for name in re.findall(
            r"^\.\. auto\w+:: (effkern[\w.]+)", page.read_text(encoding="utf-8"), re.MULTILINE
        ):
            module, _, attribute = name.rpartition(".")
            found[name] = getattr(importlib.import_module(module), attribute)
    return found


def _public(module: ModuleType) -> dict[str, Any]:
    names = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]
    values = {name: getattr(module, name) for name in names}
    return {
        name: value for name, value in values.items() if inspect.isroutine(value) or inspect.isclass(value)
    }


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_documented(module: str) -> None:
    documented = {id(value) for value in _documented().values()}
    public = _public(importlib.import_module(module))
    assert public
    missing = [name for name, value in public.items() if id(value) not in documented]
    assert not missing, f"{module}: {missing} are not in docs/api"


def test_the_table_of_variables_is_complete() -> None:
    """One table, in README.md, has every variable that the code reads, and no other."""
    command = ["git", "ls-files", "effkern", "csrc", "setup.py"]
    sources = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if sources.returncode:
        pytest.skip("not a git checkout")
    text = "\n".join((ROOT / name).read_text("utf-8") for name in sources.stdout.split())
    read = set(re.findall(r"(?:environ(?:\.get)?[\[(]|getenv\()\"(EFFKERN_\w+)\"", text))
    read |= set(re.findall(r"\"(EFFKERN_\w+)\": \"", (ROOT / "setup.py").read_text("utf-8")))
    table = (
        (ROOT / "README.md").read_text("utf-8").partition("## Environment variables")[2].partition("\n## ")[0]
    )
    assert set(re.findall(r"^\| `(EFFKERN_\w+)`", table, re.MULTILINE)) == read
    named = re.findall(r"`(\w+)`", table.partition("force a backend")[2].partition("\n")[0])
    assert tuple(named) == effkern.backends.NAMES
