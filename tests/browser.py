"""Pages as a person sees them, in a headless Chromium; tests skip, and say so, where none is found.

The driver is playwright (`tnconv[browser]`), the browser any Chromium: the one that
``TNCONV_CHROMIUM`` names, one on the path (``apt-get install chromium``), or playwright's own.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell", "chrome")


@contextmanager
def headless_chromium() -> Iterator[Any]:
    """A browser of playwright's synchronous interface; leave it before anything runs asyncio."""
    driver = pytest.importorskip("playwright.sync_api", reason="needs tnconv[browser]")
    with driver.sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        candidates = [os.environ.get("TNCONV_CHROMIUM"), *map(shutil.which, NAMES), own]
        found = next((path for path in candidates if path and Path(path).exists()), None)
        if found is None:
            pytest.skip("needs a Chromium: apt-get install chromium, or TNCONV_CHROMIUM=its path")
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


class Opened:
    """One page of files on this machine: nothing is fetched from anywhere else.

    Args:
        page: playwright's page, for whatever else a test asks.
        path: the file that was opened.
    """

    def __init__(self, page: Any, path: Path) -> None:
        self.page, self.errors, self.fetched = page, [], []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.fetched.append(request.url))
        page.goto(path.resolve().as_uri(), wait_until="load", timeout=120_000)  # on a busy machine

    @property
    def title(self) -> str:
        return str(self.page.title())

    @property
    def text(self) -> str:
        return str(self.page.inner_text("body"))

    @property
    def outside(self) -> list[str]:
        """Addresses on other machines that the page asked for."""
        return [url for url in self.fetched if url.startswith(("http:", "https:", "ws"))]

    def pictures(self, within: str = "body") -> list[tuple[float, float]]:
        """Width and height of every picture as drawn; a missing file has width zero.

        Args:
            within: a CSS selector of the part of the page that counts.
        """
        script = """part => [...document.querySelectorAll(part)].flatMap(
            root => [...root.querySelectorAll("img, svg, canvas")]).map(each => {
              const box = each.getBoundingClientRect();
              const broken = each.tagName === "IMG" && !(each.complete && each.naturalWidth);
              return broken ? [0, 0] : [box.width, box.height]; })"""
        lazy = "document.querySelectorAll('img').forEach(each => each.loading = 'eager')"
        self.page.evaluate(lazy)
        self.page.wait_for_function("() => [...document.images].every(each => each.complete)")
        return [(width, height) for width, height in self.page.evaluate(script, within)]
