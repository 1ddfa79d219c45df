"""The documentation and the HTML report as a person sees them, in a headless Chromium.

``make docs`` builds the site and runs these tests on it; elsewhere the site's tests skip, unless
``TNCONV_DOCS`` names a folder that holds a built site.
"""

import os
from pathlib import Path

import pytest

from tnconv.cli import main

ROOT = Path(__file__).resolve().parents[2]
SITE = Path(os.environ.get("TNCONV_DOCS", ROOT / "docs" / "_build"))


@pytest.fixture
def site():
    if not (SITE / "index.html").exists():
        pytest.skip("the site is not built: make docs")
    return SITE


def seen(opened, least, within="body"):
    """At least so many pictures, all of which have a size on the page."""
    sizes = opened.pictures(within)
    assert len(sizes) >= least and all(min(size) > 1 for size in sizes), sizes
    assert not opened.outside
    return sizes


def test_html_report_of_a_layer(open_page, tmp_path, capsys):
    path = tmp_path / "layer.html"
    main(f"explain conv --input 2 3 8 8 --weight 4 3 3 3 --html {path}".split())
    opened = open_page(path)
    assert "conv" in opened.title and "def contraction(x, weight):" in opened.text
    assert all(width > 100 for width, _ in seen(opened, 3, "figure"))


def test_html_report_of_a_model(open_page, tmp_path, capsys):
    path = tmp_path / "model.html"
    main(["explain", "tests.docs.test_in_browser:small", "--input", *"2 3 8 8".split(),
          "--html", str(path)])  # fmt: skip
    opened = open_page(path)
    seen(opened, 6, "figure")
    opened.page.click("ul a >> nth=1")
    assert opened.page.url.endswith("#account1")


def small():
    from torch import nn

    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5))


def test_start_page_of_the_documentation(open_page, site):
    opened = open_page(site / "index.html")
    seen(opened, 1, "article")
    opened.page.click("article .toctree-wrapper a >> nth=0")
    assert opened.page.url == (site / "start.html").as_uri()


def test_gallery_of_diagrams(open_page, site):
    opened = open_page(site / "generated" / "gallery.html")
    sections = opened.page.locator("article h2").count()
    assert sections > 20 and len(seen(opened, 2 * sections, "article")) == 2 * sections


def test_every_page_shows_its_pictures(open_page, site):
    pages = [path for path in site.rglob("*.html") if "<img" in path.read_text("utf-8")]
    missing = []
    for path in pages:
        opened = open_page(path)
        missing += [path.name for size in opened.pictures("article img") if min(size) < 2]
        opened.page.close()
    assert len(pages) > 5 and not missing
