"""Every constant by which plans are chosen or priced says which decision it comes from."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DECISIONS = {path.name[:4] for path in (ROOT / "docs" / "decisions").iterdir()}
ROOMS = ("kernels", "prices", "lowering", "routes")
FILES = (
    *("search.py", "planner.py", "baseline.py", "families.py", "tiers.py"),
    *(f"programs/{name}.py" for name in ("joint", "chunks", "limits", "program", "tuning")),
)
OTHERS = {  # what bounds the work of a search, or is a fact, chooses between no plans
    "prices": "bounds of timing and fitting, units, and facts of devices and libraries",
    "kernels/launching.py": "what GPUs and Triton take, and a bound of 32-bit numbers",
    "lowering/paths.py": "bounds of the search for paths",
    "lowering/contraction.py": "bounds of the search for paths",
    "lowering/layouts.py": "a bound of memory",
    "lowering/schedule.py": "sizes of entries",
    "lowering/constants.py": "a bound of memory",
    "programs/joint.py": "a bound of the search",
    "routes/box_sums.py": "a bound of the search",
    "routes/dense.py": "bytes of entries",
    "routes/displacement.py": "bounds of the length of sources",
    "routes/matches.py": "what torch's kernels have",
    "routes/patch_products.py": "what the kernel takes",
    "routes/pixel_gram.py": "bounds of the length of sources and of memory",
    "routes/taps.py": "a bound of the length of sources",
    "routes/window.py MOST_OVERLAPS": "a bound of the length of sources",
    "lowering/finish.py NUMBER": "bytes of a factor",
    "families.py POWERS": "what scales of networks divide by",
    "families.py MOST_FAMILIES": "a bound of memory",
    "families.py MOST_MEMBERS": "a bound of memory",
    "families.py MOST_VAIN": "a bound of the search",
    "tiers.py MOST_PROGRAMS": "a bound of memory",
    "programs/tuning.py FAILED": "what JSON can hold",
}


def constants() -> list[tuple[str, str, str]]:
    """File, name and comment of every number, or tuple of numbers, that a module names."""
    found = []
    paths = [*(ROOT / "codegen" / name for name in FILES)]
    paths += [path for room in ROOMS for path in sorted((ROOT / "codegen" / room).glob("*.py"))]
    for path in paths:
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        for node in ast.parse(text).body:
            if isinstance(node, ast.Assign) and re.fullmatch(r"[\d\s.,e()*_-]+", _value(node)):
                comment = " ".join(lines[node.lineno - 1 : node.end_lineno]).partition("#")[2]
                name = ast.unparse(node.targets[0])
                found.append((str(path.relative_to(ROOT / "codegen")), name, comment))
    return found


def _value(node: ast.Assign) -> str:
    return ast.unparse(node.value)


@pytest.mark.parametrize(("file", "name", "comment"), constants())
def test_policies_cite_their_decisions(file: str, name: str, comment: str) -> None:
    cited = {
        n for each in re.findall(r"\((0\d{3}(?:, 0\d{3})*)\)", comment) for n in each.split(", ")
    }
    assert cited <= DECISIONS, f"{name} of {file} cites {cited - DECISIONS}, which is no decision"
    if not cited:
        exempt = {file, file.partition("/")[0], f"{file} {name}"} & OTHERS.keys()
        assert exempt, f"{name} of {file} cites no decision: write (0000) into its comment"


def test_exceptions_are_about_something() -> None:
    names = {f"{file} {name}" for file, name, _ in constants()}
    for each in OTHERS:
        assert any(name.startswith(each) for name in names), f"{each} has no constants"
