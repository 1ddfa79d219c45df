"""The documentation without building it: examples run, links lead somewhere, names exist."""

import importlib
import importlib.util
import inspect
import re
import runpy
import shlex
import sys
from itertools import pairwise
from pathlib import Path

import pytest

import tnconv
from tnconv.cli import _parser, network

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
EXAMPLES = sorted((DOCS / "examples").glob("*.py"))
PAGES = sorted(path for path in DOCS.rglob("*.md") if not {"_build", "generated"} & {*path.parts})
SETTLED = [path for path in PAGES if "decisions" not in path.parts]


def generate():
    sys.path.insert(0, str(DOCS))  # where its parts lie
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(DOCS))
    return module


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(example, capsys):
    with tnconv.tiered_compilation(True):  # as those who read them run them
        runpy.run_path(str(example))
    assert capsys.readouterr().out


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_headings_of_examples_are_underlined_to_their_end(example):
    """A shorter line is a warning of the strict build, which does not run here."""
    lines = [line.removeprefix("# ") for line in example.read_text().splitlines()]
    lines[0] = lines[0].removeprefix('"""')
    found = [pair for pair in pairwise(lines) if re.fullmatch("==+|--+", pair[1])]
    assert found and all(len(title) <= len(line) for title, line in found), found


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(DOCS)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```(?!{toctree})\w*\n.*?```", "", page.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)#\s]+)\)", text)
    for block in re.findall(r"```{toctree}\n(.*?)```", page.read_text(), flags=re.DOTALL):
        entries = [line for line in block.splitlines() if line and not line.startswith(":")]
        links += [f"{entry}.md" for entry in entries if "*" not in entry]
    for link in links:
        if link.startswith("http"):
            continue
        if "generated/" in link:
            assert made(link.split("generated/")[1]), f"{page.name} links to {link}"
        else:
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def made(name):
    """Whether a build makes this page or picture."""
    if name.startswith("examples/"):
        stem = Path(name).stem
        return stem == "index" or (DOCS / "examples" / f"{stem}.py").exists()
    if name.startswith("pictures/"):
        stem = Path(name).stem.removesuffix("_after")
        names = generate().GALLERY
        return stem in {"".join(c if c.isalnum() else "_" for c in each) for each in names}
    return name in ("gallery.md", "coverage.md", "results.md")


@pytest.mark.parametrize("page", SETTLED, ids=lambda path: str(path.relative_to(DOCS)))
def test_names_in_pages_exist(page):
    """Names such as ``tnconv.optim.KFAC`` and ``quantities.Variance`` in code."""
    text = page.read_text().replace("quantities.", "tnconv.quantities.")
    text = text.replace("tnconv.tnconv.", "tnconv.")
    for name in {*re.findall(r"tnconv(?:\.[A-Za-z_]\w*)+", text)}:
        found = tnconv
        for part in name.split(".")[1:]:
            if not hasattr(found, part):
                importlib.import_module(f"{found.__name__}.{part}")
            found = getattr(found, part)


def test_pages_are_made_from_the_code(tmp_path):
    module = generate()
    page = module.section("linear layer", module.GALLERY["linear layer"], tmp_path)
    assert "[n, o1, d] = Σ_{c}" in page and "def contraction(x, weight):" in page
    assert {path.stem for path in tmp_path.iterdir()} == {"linear_layer", "linear_layer_after"}
    layers = {name: module.LAYERS[name] for name in ("Conv1d",)}
    module.LAYERS, module.LOSSES = layers, {}
    module.QUANTITIES = ("Variance", "KFAC")
    assert "| Conv1d | ✓ | ✓ |" in module.coverage()


def test_diagrams_of_the_zoo_are_in_the_gallery():
    """Every function of `diagrams` to a network, but for those of single positions and halves."""
    source = (DOCS / "generate.py").read_text()
    left = {"bias", "scale", "lookup", "repeated", "bilinear", "mean_patches", "hessian_vjp"}
    left |= {"input_factor", "output_factor", "gradient_sum", "per_sample_gradients", "compose"}
    left |= {"input_half", "output_half", "combined_gradients", "gradient_projections"}
    made = [name for name in tnconv.diagrams.__all__ if makes_a_network(name)]
    assert len(made) > 20
    for name in sorted({*made} - left):
        assert f"diagrams.{name}(" in source, f"the gallery in docs/generate.py lacks {name}"


def makes_a_network(name):
    value = getattr(tnconv.diagrams, name)
    if not inspect.isfunction(value):
        return False
    returned = str(inspect.signature(value).return_annotation)
    return any(word in returned for word in ("TensorNetwork", "Sum", "Expression"))


COMMAND = re.compile(r"python -m tnconv ([a-z][^`\n]*)")
WITH_COMMANDS = [ROOT / "README.md", *PAGES]


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_pages_are_understood(page):
    """What a page tells the reader to type exists, and has the options and shapes it is given."""
    for command in COMMAND.findall(page.read_text()):
        name, *options = shlex.split(command)
        assert re.search(rf"^    {name} ", _parser().format_help(), re.M), command
        if "--input" in options or name in ("calibrate", "cache"):
            given = _parser().parse_args([name, *options])
            layer = getattr(given, "layer", "")
            assert not layer or ":" in layer or network(given).shape


def test_decisions_have_numbers_of_their_own():
    numbers = [path.name.split("-")[0] for path in (DOCS / "decisions").glob("[0-9]*.md")]
    assert len(numbers) == len({*numbers})
