"""What ``import tnconv`` takes beside ``import torch``: processor time of new processes.

Both are compiled to bytecode, as installed packages are: once, into a folder of this run.

``python -m benchmarks.import_time`` prints medians and minima over interleaved rounds, and the
ratio that the bar of 1.2 is about.
"""

import json
import os
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

STATEMENTS = ("import torch", "import tnconv")


def seconds(statement: str, folder: str) -> float:
    """User and system time of a process that runs the statement, with bytecode in a folder."""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": folder}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    before = os.times()
    subprocess.run([sys.executable, "-c", statement], check=True, env=environment)
    after = os.times()
    spent = after.children_user + after.children_system
    return spent - before.children_user - before.children_system


def main() -> None:
    parser = ArgumentParser("python -m benchmarks.import_time", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    given = parser.parse_args()
    times: dict[str, list[float]] = {statement: [] for statement in STATEMENTS}
    with TemporaryDirectory() as folder:
        for statement in STATEMENTS:  # writes the bytecode
            seconds(statement, folder)
        for _ in range(given.rounds):
            for statement, taken in times.items():
                taken.append(seconds(statement, folder))
    torch, tnconv = (times[statement] for statement in STATEMENTS)
    for statement, taken in times.items():
        print(f"{statement}: median {median(taken):.2f} s, minimum {min(taken):.2f} s")
    ratios = {"median": median(tnconv) / median(torch), "minimum": min(tnconv) / min(torch)}
    print(f"ratio of medians {ratios['median']:.2f}, of minima {ratios['minimum']:.2f}")
    if given.json is not None:
        given.json.write_text(json.dumps({"seconds": times, "ratios": ratios}, indent=1) + "\n")


if __name__ == "__main__":
    main()
