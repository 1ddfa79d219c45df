"""Sphinx: Markdown pages, executed examples, and pages that `docs/generate.py` writes."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import generate  # noqa: E402

import tnconv  # noqa: E402

generate.write(HERE / "generated")

project = "tnconv"
author = "The tnconv maintainers"
version = release = tnconv.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_gallery.gen_gallery",
]
html_theme = "furo"
html_title = f"tnconv {release}"
exclude_patterns = ["_build", "examples/README.rst", "generated/examples/*.ipynb"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
sphinx_gallery_conf = {
    "examples_dirs": "examples",
    "gallery_dirs": "generated/examples",
    "filename_pattern": r"\.py$",
    "plot_gallery": True,
    "capture_repr": ("_repr_html_", "__repr__"),
    "download_all_examples": False,
}
suppress_warnings = ["config.cache"]
