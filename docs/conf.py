"""The site: `make docs` builds it from these pages and from the docstrings of the package."""

import sys
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import docstrings

project = "effkern"
release = version("effkern")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["examples"]
# Other pages may join the list of guides; its pattern is allowed to find none.
suppress_warnings = ["toc.empty_glob"]

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
nitpick_ignore_regex = [("py:exc", ".+, .+")]  # "TypeError, ValueError:", which share an entry too

html_theme = "furo"
html_title = f"effkern {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False


def setup(app):
    docstrings.setup(app)
