"""Every picture and every number of README and the pages is made by a command that CI runs."""

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import (
    half_precision,
    hesscale_quality,
    inverse_free,
    report,
    root_free,
    sharpness,
    simplification,
    tensor_dropout,
    training,
)
from benchmarks.cases import layers
from benchmarks.monitor_studies import STUDIES

ROOT = Path(__file__).resolve().parents[2]
DOCS, RESULTS = ROOT / "docs", ROOT / "benchmarks" / "results"
MADE = {"_build", "generated", "decisions"}
PAGES = [ROOT / "README.md", *sorted(p for p in DOCS.rglob("*.md") if not MADE & {*p.parts})]
REGENERATED = ("simplification.md", "state-sizes.md", "versions.md")
"""Pages that a script writes whole, and that tests compare with what it writes."""
UNITS = (1, 100, 1e3, 1e6, 1e-6, 1 / 2**20)
"""Of percent, milliseconds, microseconds and MiB, as numbers are written."""


@pytest.fixture(scope="module")
def made():
    """The module that makes pages and pictures of results."""
    spec = importlib.util.spec_from_file_location("result_pages", DOCS / "result_pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drawn(svg: str) -> list[tuple[str, str, tuple[str, ...]]]:
    """Nodes and wires with their words: what a picture says, whatever Graphviz placed it."""
    groups = re.findall(
        r'<g id="\w+" class="(node|edge|cluster)">\s*<title>(.*?)</title>(.*?)</g>', svg, re.S
    )
    return [(kind, name, tuple(re.findall(r">([^<>]+)</text>", g))) for kind, name, g in groups]


def test_committed_pictures_are_what_the_library_draws(made, tmp_path):
    assert {path.name for path in (DOCS / "pictures").iterdir()} == {*made.PICTURES}
    for name, make in made.PICTURES.items():
        picture = make(tmp_path / name)
        if picture.suffix != ".svg":
            pytest.skip("needs Graphviz or pygraphviz")
        assert len(drawn(picture.read_text())) > 20
        assert drawn(picture.read_text()) == drawn((DOCS / "pictures" / name).read_text())


PLOTTED = {
    "half-precision-cpu": half_precision,
    "hesscale-quality-cpu": hesscale_quality,
    "inverse-free-resnet20-cpu": inverse_free,
    "root-free-cpu": root_free,
    "sharpness-cpu": sharpness,
    "tensor-dropout-allcnnc-cpu": tensor_dropout,
    "training-cpu": training,
}


@pytest.mark.parametrize("name", ["layers-cpu-one-thread", *PLOTTED])
def test_committed_plots_are_those_of_their_results(name, tmp_path):
    """Up to what another version of matplotlib may draw otherwise."""
    image = pytest.importorskip("matplotlib.image")
    file, picture = RESULTS / f"{name}.json", tmp_path / f"{name}.png"
    if name in PLOTTED:
        PLOTTED[name].plot(json.loads(file.read_text())["rows"], picture)
    else:
        report.plot(report.rows(file), picture)
    drawn, committed = image.imread(picture), image.imread(RESULTS / picture.name)
    assert drawn.shape == committed.shape
    assert abs(drawn - committed).mean() < 2e-3


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_picture_is_made_by_a_command(page, made):
    for link in re.findall(r"!?\[[^\]]*\]\(([^)#\s]+\.(?:png|svg))\)", page.read_text()):
        path = (page.parent / link).resolve()
        if path.parent == DOCS / "pictures":
            assert path.name in made.PICTURES
        elif path.parent == RESULTS:
            assert path.exists() and made.command(path.stem)
        elif path.parent == DOCS / "monitor":
            assert path.stem in {name.replace(" ", "-") for name in STUDIES}
        else:
            assert "generated" in path.parts, f"{page.name} shows {link}, which nothing makes"


def test_every_result_has_a_command_machine_and_versions(made):
    text = made.results()
    for file in RESULTS.glob("*.json"):
        assert f"## {file.stem}\n\n`python -m benchmarks." in text
        module = made.command(file.stem).removeprefix("python -m ").split()[0]
        assert importlib.util.find_spec(module), module
        here = made.machine(json.loads(file.read_text()))
        assert "torch" in here and re.search(r"\d{4}-\d\d-\d\d", here), f"{file.name}: {here}"
    for picture in RESULTS.glob("*.png"):
        assert made.command(picture.stem)


def test_tables_of_results_are_those_of_their_json(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "plot", lambda *_: None)
    monkeypatch.setattr(report.overhead, "plot", lambda *_: None)
    tables = sorted(RESULTS.glob("*.md"))
    for table in tables:
        copy = tmp_path / f"{table.stem}.json"
        copy.write_bytes(table.with_suffix(".json").read_bytes())
        report.main([str(copy)])
        assert copy.with_suffix(".md").read_text() == table.read_text(), table.name
    assert len(tables) > 5


def test_the_table_of_simplification_is_up_to_date():
    some = layers()[::26]
    rows = [simplification.row(layer, op) for layer in some for op in simplification.OPERATIONS]
    lines = [line for line in simplification._lines(some, rows) if line.startswith("| ")]
    page = (DOCS / "simplification.md").read_text()
    assert len(lines) > len(some) and all(line in page for line in lines)


def numbers(value: object) -> Iterator[float]:
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from numbers(part)
    elif isinstance(value, str):
        yield from map(float, re.findall(r"\d+\.?\d*", value))
    elif isinstance(value, int | float):
        yield float(value)


def words(page: str) -> Iterator[str]:
    """The lines of a page without code, which is executed, and without versions."""
    without = re.sub(r"```.*?```|`[^`]*`", "", page, flags=re.S)
    without = re.sub(r"(?:torch|Python) \d[\d.]*(?: to \d[\d.]*)?", "", without)
    yield from without.splitlines()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_numbers_in_words_are_those_of_committed_results(page):
    """Every decimal number, but for those of columns that say what was aimed at."""
    if page.name in REGENERATED:
        return
    text = page.read_text()
    found = [n for line in words(text) for n in re.findall(r"(?<![\w.^-])\d+\.\d+(?![\w.])", line)]
    aims = {*re.findall(r"\| ([\d.]+) \|$", text, re.M)} if "| bar |" in text else set()
    patterns = re.findall(r"benchmarks/results/([\w*-]+)", text)
    files = [file for pattern in patterns for file in RESULTS.glob(f"{pattern}.json")]
    known = [n for file in files for n in numbers(json.loads(file.read_text()))]
    for number in {*found} - aims:
        digits = len(number.partition(".")[2])
        assert any(round(n * unit, digits) == float(number) for n in known for unit in UNITS), (
            f"{page.name} says {number}, which no results file that it names has"
        )


def test_what_is_declared_was_run():
    """The page is made from its results, and the lowest torch and every Python named has some."""
    spec = importlib.util.spec_from_file_location("versions", DOCS / "versions.py")
    versions = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(versions)
    rows = json.loads(versions.FOUND.read_text())
    assert (DOCS / "versions.md").read_text() == versions.page(rows)
    declared = (ROOT / "pyproject.toml").read_text()
    (lowest,) = re.findall(r'"torch>=([\d.]+)"', declared)
    torches = {row["torch"] for row in rows}
    assert any(f"{torch}.".startswith(f"{lowest}.") for torch in torches), torches
    assert min(map(versions.version, torches)) >= versions.version(lowest)
    for python in (versions.VERSIONS[0][0], versions.VERSIONS[-1][0]):
        assert any(row["python"].startswith(python) for row in rows), python
    for row in rows:
        assert row["passed"] > 100 and row["failed"] == 0, row
