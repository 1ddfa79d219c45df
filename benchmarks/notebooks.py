"""Executed notebooks of the scripts in ``benchmarks/studies``.

Run as ``python -m benchmarks.notebooks``, or with names of scripts; extra ``notebooks``. A script
is cells that begin with ``# %%``, those of prose with ``# %% [markdown]``. A notebook whose code is
the script's keeps its outputs: only its prose is written anew.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "studies"
LIMIT = 3600  # seconds for one cell
Cell = tuple[str, str]


def cells(script: str) -> list[Cell]:
    """The kind, ``"code"`` or ``"markdown"``, and the text of every cell of a script."""
    found = []
    for part in script.split("# %%")[1:]:
        marker, _, text = part.partition("\n")
        if marker.strip() == "[markdown]":
            lines = [line.removeprefix("#").removeprefix(" ") for line in text.strip().split("\n")]
            found.append(("markdown", "\n".join(lines)))
        else:
            found.append(("code", text.strip()))
    return found


def cells_of_notebook(notebook: dict[str, Any]) -> list[Cell]:
    """The same of a notebook."""
    return [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]


def executed(script: str) -> dict[str, Any]:
    """A notebook with the outputs of a script's cells, as JSON."""
    import nbformat
    from nbclient import NotebookClient

    make = {"code": nbformat.v4.new_code_cell, "markdown": nbformat.v4.new_markdown_cell}
    notebook = nbformat.v4.new_notebook(cells=[make[kind](text) for kind, text in cells(script)])
    where = {"metadata": {"path": str(FOLDER.parents[1])}}
    NotebookClient(notebook, timeout=LIMIT, record_timing=False, resources=where).execute()
    for at, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{at}"  # those that are drawn at random would differ in every run
    found: dict[str, Any] = json.loads(nbformat.writes(notebook))
    return found


def written(script: Path) -> None:
    """Write the notebook of a script; it is executed where its code is new."""
    text, path = script.read_text(), script.with_suffix(".ipynb")
    notebook = json.loads(path.read_text()) if path.exists() else {"cells": []}
    code = [each for each in cells(text) if each[0] == "code"]
    if [each for each in cells_of_notebook(notebook) if each[0] == "code"] != code:
        notebook = executed(text)
    outputs = iter([cell for cell in notebook["cells"] if cell["cell_type"] == "code"])
    parts = []
    for at, (kind, source) in enumerate(cells(text)):
        lines = source.splitlines(keepends=True)
        prose = {"cell_type": kind, "metadata": {}, "source": lines}
        parts.append({**(next(outputs) if kind == "code" else prose), "id": f"cell-{at}"})
    notebook["cells"] = parts
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n")


def main(arguments: Sequence[str]) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.notebooks", description=__doc__)
    names = sorted(path.stem for path in FOLDER.glob("*.py"))
    parser.add_argument("names", nargs="*", help=f"of scripts: {', '.join(names)}; all by default")
    for name in parser.parse_args(arguments).names or names:
        written(FOLDER / f"{name}.py")
        print(f"{name}.ipynb", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
