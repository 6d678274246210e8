"""Docstrings are written to be read in an editor; this turns them into what Sphinx reads, before napoleon does.

Names in single backquotes become code, or links where the API pages have them; indented paragraphs are formulas and
stay as they are; stars, bars and trailing underscores are not markup.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from sphinx.application import Sphinx

# Headings that napoleon does not know. They become fields, as Returns is.
SECTIONS = ("Numerics", "Cost", "Source", "Calling it")
_HEADER = re.compile(r"[A-Z][A-Za-z ]*:$")
_ONE_LINE = re.compile(r"(Source|Calling it): (.+)")
_PROSE = ("Returns:", "Yields:", *(f"{name}:" for name in SECTIONS))
_CODE = re.compile(r"(`+)(.+?)\1", re.DOTALL)
_DIRECTIVE = re.compile(r"^\.\. (?:auto\w+|py:module):: (effkern[\w.]*)", re.MULTILINE)
# Nothing in the output. On a line of its own it keeps napoleon from reading "a report: ..." as a type and its text.
_EMPTY = "\\ "


@cache
def documented() -> dict[str, str]:
    """Every name that an API page has, and its last part where no other name ends in it, to the full name."""
    pages = Path(__file__).parent.glob("api/*.md")
    full = [name for page in pages for name in _DIRECTIVE.findall(page.read_text(encoding="utf-8"))]
    last = [name.rpartition(".")[2] for name in full]
    return {name: name for name in full} | {
        short: name for short, name in zip(last, full) if last.count(short) == 1
    }


def to_rst(lines: list[str]) -> list[str]:
    """A docstring, without the indentation that all its lines share, as reStructuredText with Google's sections."""
    out: list[str] = []
    prose: list[str] = []

    def flush() -> None:
        out.extend(_inline("\n".join(prose)).split("\n") if prose else [])
        prose.clear()

    in_section = in_source = False
    for paragraph in _paragraphs(lines):
        first = paragraph[0]
        if not first.startswith(" "):
            in_section = False
        if any(line.lstrip().startswith(">>>") for line in paragraph):
            out.extend(paragraph)
            in_section = in_section or _HEADER.match(first) is not None
        elif first.startswith("    ") and not in_section:
            out.extend(["::", "", *paragraph])
        else:
            in_source = False
            for line in paragraph:
                one_line = _ONE_LINE.match(line)
                if one_line:
                    in_section = in_source = True
                    prose.extend([f"{one_line[1]}:", f"    {_EMPTY}", f"    {one_line[2]}"])
                    continue
                prose.append(f"    {line}" if in_source else line)
                if _HEADER.match(line):
                    in_section = True
                    if line in _PROSE:
                        prose.append(f"    {_EMPTY}")
        flush()
        out.append("")
    return out


def _paragraphs(lines: list[str]) -> list[list[str]]:
    found: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    return [paragraph for paragraph in found if paragraph]


def _inline(text: str) -> str:
    pieces: list[str] = []
    end = 0
    for span in _CODE.finditer(text):
        pieces += [_escaped(text[end : span.start()]), _code(span[2])]
        if text[span.end() : span.end() + 1].isalnum():  # `Block`s
            pieces.append(_EMPTY)
        end = span.end()
    return "".join([*pieces, _escaped(text[end:])])


def _escaped(text: str) -> str:
    text = re.sub(r"[*|]|\\(?! )", r"\\\g<0>", text)
    return re.sub(r"(?<=\w)_(?!\w)", r"\\_", text)


def _code(text: str) -> str:
    full = documented().get(text)
    return f":py:obj:`{text} <{full}>`" if full else f"``{text}``"


def _is_field_of_a_tuple(obj: object) -> bool:
    return (getattr(obj, "__doc__", None) or "").startswith("Alias for field number")


def setup(app: Sphinx) -> None:
    def process(
        _app: Sphinx, what: str, _name: str, _obj: object, _options: object, lines: list[str]
    ) -> None:
        lines[:] = to_rst(lines)
        if what in ("attribute", "data", "property"):
            lines.insert(0, _EMPTY)

    def skip(_app: Sphinx, _what: str, _name: str, obj: object, _skip: bool, _options: object) -> bool | None:
        return True if _is_field_of_a_tuple(obj) else None

    app.connect("autodoc-process-docstring", process, priority=400)  # napoleon's is 500
    app.connect("autodoc-skip-member", skip)
