"""The site: `make docs` builds it from these pages and from the docstrings of the package."""

import importlib.metadata
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import docstrings  # noqa: E402

project = "effkern"
release = importlib.metadata.version("effkern")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["examples"]

myst_heading_anchors = 3
highlight_language = "none"  # blocks that name no language are formulas and trees of files

# Docstrings say dtypes and shapes in words: types in signatures would repeat them, once an overload.
autodoc_typehints = "none"
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True, "member-order": "bysource"}
python_maximum_signature_line_length = 90
napoleon_numpy_docstring = False
napoleon_use_param = False  # several names may share an entry
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_custom_sections = [(name, "returns_style") for name in docstrings.SECTIONS]
nitpick_ignore_regex = [
    ("py:exc", ".+, .+"),  # "TypeError, ValueError:", which share an entry too
    ("py:class", r"(torch|collections)\..+"),  # no inventories of others: the build needs no network
]

html_theme = "furo"
html_title = f"effkern {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False


def link_outside(_app, docname, source):
    """Links to Markdown files outside docs/ become downloads: they are no pages of the site."""

    def target(match):
        path = (HERE / docname).parent / match[1]
        return match[0] if path.resolve().is_relative_to(HERE) else f"](path:{match[1]})"

    source[0] = re.sub(r"\]\((\.\./[\w./-]+\.md)(?:#[\w-]+)?\)", target, source[0])


def setup(app):
    docstrings.setup(app)
    app.connect("source-read", link_outside)
