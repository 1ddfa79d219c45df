"""What ``import tnconv`` takes beside ``import torch``, which it contains: new processes, in turns.

``python -m benchmarks.import_time`` measures both by processor time, and by what Python itself
counts (``python -X importtime``, the cumulative time of the package), as medians and minima over
interleaved rounds; the bar for their ratio is 1.2. Both packages are compiled to bytecode, as
installed ones are: once, into a folder of this run.
"""

import os
import re
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import measure

PACKAGES = ("torch", "tnconv")
WAYS = ("processor time", "-X importtime")
BAR = 1.2


def seconds(package: str, folder: str) -> tuple[float, float]:
    """User and system time of a process that imports a package, and what ``-X importtime`` says."""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": folder}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    before = os.times()
    plain = [sys.executable, "-c", f"import {package}"]
    subprocess.run(plain, check=True, env=environment)
    after = os.times()
    spent = after.children_user + after.children_system
    command = [sys.executable, "-X", "importtime", "-c", f"import {package}"]
    done = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    return spent - before.children_user - before.children_system, cumulative(done.stderr, package)


def cumulative(report: str, package: str) -> float:
    r"""Seconds that ``-X importtime`` reports of a package with all that it imports.

    >>> cumulative("import time:   self [us] | cumulative | imported package\n"
    ...            "import time:       120 |       5000 | torch", "torch")
    0.005
    """
    found = re.findall(rf"\|\s*(\d+) \| {re.escape(package)}$", report, re.M)
    return int(found[-1]) / 1e6


def rows(rounds: int) -> Iterator[dict[str, Any]]:
    """Medians and minima of both packages, and their ratios, by each way to measure."""
    times: dict[str, list[tuple[float, float]]] = {package: [] for package in PACKAGES}
    with TemporaryDirectory() as folder:
        for package in PACKAGES:  # writes the bytecode
            seconds(package, folder)
        for _ in range(rounds):
            for package, taken in times.items():
                taken.append(seconds(package, folder))
    for at, way in enumerate(WAYS):
        torch, tnconv = ([each[at] for each in times[package]] for package in PACKAGES)
        yield {
            "way": way,
            "torch": {"median": median(torch), "minimum": min(torch)},
            "tnconv": {"median": median(tnconv), "minimum": min(tnconv)},
            "ratio": {
                "median": median(tnconv) / median(torch),
                "minimum": min(tnconv) / min(torch),
            },
        }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write."""
    parser = ArgumentParser("python -m benchmarks.import_time", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    given = parser.parse_args(arguments)
    found = list(rows(given.rounds))
    for row in found:
        for package in PACKAGES:
            middle, least = row[package]["median"], row[package]["minimum"]
            print(f"{row['way']}: import {package} {middle:.2f} s, at least {least:.2f} s")
        middle, least = row["ratio"]["median"], row["ratio"]["minimum"]
        print(f"{row['way']}: ratio of medians {middle:.2f}, of minima {least:.2f}; bar {BAR}")
    if given.json is not None:
        measure.write_results(given.json, "cpu", found, rounds=given.rounds)


if __name__ == "__main__":
    main()
