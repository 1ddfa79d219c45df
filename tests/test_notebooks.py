"""Executed notebooks are those of their scripts, and the studies behind them run."""

import json
from pathlib import Path

import pytest

from benchmarks import kernel_studies
from benchmarks.notebooks import FOLDER, cells, cells_of_notebook, written

SCRIPTS = sorted(FOLDER.glob("*.py"), key=lambda path: path.name)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_notebooks_are_executed_scripts(script: Path) -> None:
    """`python -m benchmarks.notebooks` was run after the last change."""
    notebook = json.loads(script.with_suffix(".ipynb").read_text())
    assert cells_of_notebook(notebook) == cells(script.read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    outputs = [out for cell in code for out in cell["outputs"]]
    assert outputs and all(out["output_type"] != "error" for out in outputs)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_kernel_studies_say_what_they_found(script: Path) -> None:
    prose = "\n".join(text for kind, text in cells(script.read_text()) if kind == "markdown")
    if "kernel_studies" in script.read_text():
        assert "## What it found" in prose and "## What it does not show" in prose


def test_prose_is_written_anew_and_outputs_stay(tmp_path: Path) -> None:
    script = tmp_path / "study.py"
    script.write_text("# %% [markdown]\n# # New\n#\n# words\n\n# %%\nprint(1)\n")
    output = {"output_type": "stream", "name": "stdout", "text": ["1\n"]}
    old = {"cell_type": "code", "source": ["print(1)"], "outputs": [output], "execution_count": 1}
    script.with_suffix(".ipynb").write_text(json.dumps({"cells": [old], "nbformat": 4}))
    written(script)
    notebook = json.loads(script.with_suffix(".ipynb").read_text())
    expected = [("markdown", "# New\n\nwords"), ("code", "print(1)")]
    assert cells_of_notebook(notebook) == expected == cells(script.read_text())
    assert notebook["cells"][1]["outputs"] == [output]


@pytest.mark.parametrize(
    ("study", "how", "count"),
    [
        ("conditions", "--widths 8 12 --seeds 2 --steps 2 --data photographs", 5),
        ("bandit", "--seeds 2 --rounds 4", 5),
        ("forgetting", "--widths 3 --seeds 1 --epochs 2", 1),
    ],
)
def test_studies_run_in_small(study: str, how: str, count: int, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    path = tmp_path / "found.json"
    kernel_studies.main(f"--study {study} {how} --json {path} --plot {tmp_path}".split())
    assert len(json.loads(path.read_text())["rows"]) == count
    assert len([*tmp_path.glob("*.png")]) == 1
