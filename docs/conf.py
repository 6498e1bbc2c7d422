"""The documentation site, which `scripts/docs` builds. Neither builder nor reader needs a network."""

import os
import sys
from pathlib import Path

import tomllib

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

from vitreg.version import __version__  # noqa: E402

_PROJECT = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]
REPOSITORY = _PROJECT["urls"]["Repository"]

project, author, release, version = "vitreg", "the vitreg authors", __version__, __version__
copyright = "the vitreg authors"
extensions = [
    "sphinx.ext.autodoc",
    "myst_nb",
    "sphinx_copybutton",
    "sphinx_design",
    "api_pages",
    "command_pages",
    "model_pages",
    "repository_links",
    "house_drawing",
    "notebook_files",
]
source_suffix = {".md": "myst-nb", ".rst": "restructuredtext"}
exclude_patterns = ["_ext", "conftest.py"]
myst_enable_extensions = ["colon_fence", "deflist", "substitution"]
myst_heading_anchors = 4
myst_links_external_new_tab = False
suppress_warnings = ["mystnb.mime_type"]

# Tutorials are run at each build whose text or environment has changed; a cell that fails is an error.
nb_execution_mode = "cache"
nb_execution_cache_path = os.environ.get("VITREG_DOCS_CACHE", str(HERE.parent / ".docs-cache" / "notebooks"))
nb_execution_timeout = 900
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_merge_streams = True
nb_ipywidgets_js = {}
nb_number_source_lines = False

default_role = "code"  # docstrings write `x` for code
autodoc_member_order = "bysource"
autodoc_preserve_defaults = False
autodoc_typehints = "signature"
maximum_signature_line_length = 88
add_module_names = True
html_theme = "furo"
html_title = "vitreg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["model-table.js"]
html_copy_source = False
html_show_sourcelink = False
html_last_updated_fmt = None
templates_path = []
html_theme_options = {"navigation_with_keys": True, "top_of_page_buttons": []}


def setup(app):
    app.add_config_value("repository", REPOSITORY, "env")
