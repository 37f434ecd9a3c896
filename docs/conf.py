"""How Sphinx builds the documentation: `make docs`. What is made from code and results is in generate.py."""

import shutil
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import generate  # noqa: E402

import fastnn  # noqa: E402

generate.write(Path(__file__).parent / "_generated")

project = "fastnn"
author = "the authors of fastnn"
version = release = fastnn.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_generated/tables"]  # which pages include
myst_heading_anchors = 3
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
napoleon_preprocess_types = False
add_module_names = False
maximum_signature_line_length = 100
nitpicky = True  # a name of ours that is not there is an error
nitpick_ignore_regex = [("py:class", r"(torch|collections)\..*")]
html_theme = "furo"
html_title = f"fastnn {release}"
html_show_sourcelink = html_copy_source = False


def copy_plots(app, error):  # type: ignore[no-untyped-def]
    """Puts the plots of dark pages beside those of light ones. Sphinx itself does not see them: HTML names them."""
    if error is None:
        shutil.copytree(
            Path(app.srcdir, "performance", "plots"), Path(app.outdir, "performance", "plots"), dirs_exist_ok=True
        )


def setup(app):  # type: ignore[no-untyped-def]
    app.connect("build-finished", copy_plots)
