"""The page `versions.md`: what ran on which versions of Python and torch, and how it ended.

``python docs/versions.py`` builds the wheel and, in an environment of its own for each row of
`VERSIONS` (an argument such as ``--only 2.9.*`` chooses), installs it with that torch, runs the
doctests of the installed package, of the README and of the pages that are examples, and then the
tests of this tree. Counts go to `versions.json`, from which the page is made. ``--every 8`` runs
each eighth test only, and the page says so.
"""

import json
import re
import shutil
import subprocess
import sys
from argparse import ArgumentParser
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOUND, PAGE = ROOT / "docs" / "versions.json", ROOT / "docs" / "versions.md"
VERSIONS = (("3.11", "2.9.*"), ("3.11", "2.13.0"), ("3.13", "2.*"))
"""Python and torch: the lowest torch that is declared, the one that CI has, the newest."""
DOCTESTS = "doctests of the installed wheel, of README and of the guides"
HEAD = """# Versions

Python {pythons}; torch from {torch} on. `make versions` builds the wheel, installs it into new
environments with the lowest torch, the one that CI has and the newest, and runs the doctests of
what is installed and the tests of the tree. The last results:

| torch | Python | what ran | passed | failed | skipped | date |
| --- | --- | --- | --- | --- | --- | --- |
"""


def main() -> None:
    parser = ArgumentParser("python docs/versions.py", description=__doc__)
    parser.add_argument("--only", help="the row of this torch")
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv-versions")
    parser.add_argument("--every", type=int, default=1, help="each how many-th test")
    parser.add_argument("--part", choices=("doctests", "tests"), help="only these")
    given = parser.parse_args()
    for python, torch in VERSIONS:
        if given.only in (None, torch):
            binary = installed(given.folder, python, torch)
            if given.part != "tests":
                record(binary, DOCTESTS, doctests(binary))
            if given.part != "doctests":
                record(binary, tests_of(given.every), tests(binary, given.every))


def tests_of(every: int) -> str:
    return "the tests" if every == 1 else f"one in {every} of the tests"


def installed(folder: Path, python: str, torch: str) -> Path:
    """The interpreter of an environment with this torch and a wheel of the tree as it is."""
    place = folder / f"{python}-torch-{torch.replace('*', 'x')}"
    binary = place / "bin" / "python"
    if not binary.exists():
        run(f"python{python}", "-m", "venv", place)
        run(binary, "-m", "pip", "install", "-q", f"torch=={torch}")
    with TemporaryDirectory() as wheels:
        run(binary, "-m", "pip", "wheel", "-q", "--no-deps", "-w", wheels, ROOT)
        (wheel,) = Path(wheels).glob("*.whl")
        run(binary, "-m", "pip", "install", "-q", f"{wheel}[test]", f"torch=={torch}")
        run(binary, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", wheel)
    return binary


def doctests(binary: Path) -> str:
    """What pytest says at the end, in a folder from which the tree is not imported."""
    with TemporaryDirectory() as folder:
        pages = [ROOT / "README.md", ROOT / "docs" / "start.md"]
        pages += sorted((ROOT / "docs" / "howto").glob("*.md"))
        names = [str(shutil.copy(page, folder)) for page in pages]
        options = "-q --doctest-modules --doctest-glob=*.md --import-mode=importlib --pyargs tnconv"
        return last_line(binary, *options.split(), *names, cwd=Path(folder))


def tests(binary: Path, every: int) -> str:
    return last_line(binary, "-q", "tests", f"--every={every}", cwd=ROOT)


def last_line(binary: Path, *arguments: str, cwd: Path) -> str:
    command = [binary, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    print(done.stdout[-6000:])
    return done.stdout.strip().splitlines()[-1]


def record(binary: Path, what: str, last: str) -> None:
    """Keep the counts of a run in the place of the last one of its kind, and make the page anew."""
    code = "import platform, torch; print(platform.python_version(), torch.__version__)"
    said = subprocess.run([binary, "-c", code], capture_output=True, text=True, check=True)
    python, torch = said.stdout.split()
    kind = "doctests" if what == DOCTESTS else "tests"
    counts = {word: number(word, last) for word in ("passed", "failed", "error", "skipped")}
    counts["failed"] += counts.pop("error")
    row = {"torch": torch.partition("+")[0], "python": python, "kind": kind, "what": what}
    row |= {**counts, "date": date.today().isoformat()}
    same = ("torch", "python", "kind")
    rows = json.loads(FOUND.read_text()) if FOUND.exists() else []
    rows = [each for each in rows if any(each[key] != row[key] for key in same)]
    rows = sorted([*rows, row], key=lambda each: (version(each["torch"]), each["kind"]))
    FOUND.write_text(json.dumps(rows, indent=1) + "\n")
    PAGE.write_text(page(rows))


def number(word: str, last: str) -> int:
    """How many tests the last line of pytest's output counts under a word."""
    found = re.search(rf"(\d+) {word}", last)
    return int(found[1]) if found else 0


def version(text: str) -> list[int]:
    return [int(part) for part in text.split(".")]


def page(rows: list[dict[str, Any]]) -> str:
    """The page, with what is declared and what ran."""
    declared = (ROOT / "pyproject.toml").read_text()
    torch = re.findall(r'"torch>=([\d.]+)"', declared)[0]
    pythons = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', declared)
    lines = [
        f"| {row['torch']} | {row['python']} | {row['what']} | {row['passed']} | {row['failed']} "
        f"| {row['skipped']} | {row['date']} |\n"
        for row in rows
    ]
    span = f"{pythons[0]} to {pythons[-1]}"
    return HEAD.format(pythons=span, torch=torch) + "".join(lines) + TAIL


TAIL = """
CI runs the whole suite on torch 2.13.0 and Python 3.11 for every change.
"""


def run(*command: object) -> None:
    print("+", *command, file=sys.stderr)
    subprocess.run([str(part) for part in command], check=True)


if __name__ == "__main__":
    main()
