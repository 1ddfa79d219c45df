"""Pages and pictures that come from committed results, or from the library itself."""

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tnconv import diagrams
from tnconv.diagrams.drawing import draw_steps
from tnconv.simplify import simplify

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ROWS = 40
MADE_BY = {
    "layers": "all layers-cpu-one-thread",
    "own": "all own-cpu-one-thread",
    "further": "all further-cpu-one-thread",
    "quick": "layers --quick",
    "quick-cpu-bfloat16": "all quick-cpu-bfloat16",
    "quick-cpu-bfloat16-channels-last": "all quick-cpu-bfloat16-channels-last",
    "quick-cpu-channels-last": "all quick-cpu-channels-last",
    "self-check": "layers --quick --self-check",
    "overhead": "overhead",
    "evidence": "evidence",
    "device": "device --seconds 420 --out DIR",
    "geometry": "geometry_studies",
    "gram-orders": "gram_orders",
    "half-precision": "half_precision",
    "hesscale-cost": "hesscale",
    "hesscale-quality": "hesscale_quality",
    "import-time": "import_time",
    "inverse-free": "inverse_free",
    "kernel": "kernel_studies",
    "kfac-step": "kfac_step",
    "low-rank-3c3d": "low_rank",
    "low-rank-allcnnc": "low_rank",
    "low-rank": "low_rank_studies",
    "monitor": "monitor",
    "monitor-budget": "monitor --budget 0.05",
    "monitor-by-hand": "monitor_by_hand",
    "monitor-eigenvalue-3c3d": "monitor_eigenvalue --network 3c3d --optimizer adam --rate 0.001 "
    "--signal 0.02 --steps 72 --seed 7",
    "monitor-eigenvalue-residual": "monitor_eigenvalue --network residual --optimizer adam "
    "--rate 0.003 --every 5 --seed 3",
    "monitor-eigenvalue-training": "monitor_eigenvalue",
    "networks": "networks",
    "new-sizes": "new_sizes",
    "operators": "operators",
    "rl": "rl.study",
    "root-free": "root_free",
    "sharpness": "sharpness",
    "sharpness-cost": "sharpness --part cost",
    "simplification": "simplification",
    "tangent-kernels": "tangent_kernels",
    "tensor-dropout": "tensor_dropout",
    "training": "training",
}
"""The command of a results file: that of the longest key with which its name begins."""


def _kfac_reduce(path: Path) -> Path:
    net = diagrams.kfac_reduce((8, 3, 32, 32), 3, padding=1)
    steps = [("KFAC-reduce factor of a 3x3 convolution", net), ("simplified", simplify(net).views)]
    return draw_steps([(title, each.terms[0]) for title, each in steps], path)


PICTURES: dict[str, Callable[[Path], Path]] = {"kfac_reduce.svg": _kfac_reduce}
"""What lies in ``docs/pictures``, for pages that are read without a build."""


def command(stem: str) -> str:
    """The command that made a results file."""
    key = max((key for key in MADE_BY if stem.startswith(key)), key=len)
    return f"python -m benchmarks.{MADE_BY[key]}"


def results() -> str:
    """All committed results: command, machine and versions, table, picture."""
    head = (
        "# Results\n\nEvery table is made from a file in `benchmarks/results/`, which the command "
        "above it wrote on the machine that is named there.\n"
    )
    return "\n".join([head, *(_section(file) for file in sorted(RESULTS.glob("*.json")))])


def _section(file: Path) -> str:
    told = json.loads(file.read_text())
    parts = [f"## {file.stem}\n", f"`{command(file.stem)}`; {machine(told)}\n"]
    table = file.with_suffix(".md")
    if table.exists():
        parts.append(re.sub(r"^# .*\n", "", table.read_text()))
    elif isinstance(told.get("rows"), list):
        parts.append(_table([dict(_scalars(row)) for row in told["rows"]], file.name))
    if (picture := file.with_suffix(".png")).exists():
        parts.append(f"![{file.stem}](../../benchmarks/results/{picture.name})\n")
    return "\n".join(parts)


def machine(told: Mapping[str, Any]) -> str:
    """Where and with which versions something was measured."""
    here = told.get("environment", told)
    names = {
        "device": "",
        "card": "",
        "threads": "threads ",
        "torch": "torch ",
        "python": "Python ",
    }
    known = [f"{word}{here[name]}" for name, word in names.items() if name in here]
    return ", ".join([*known, str(here.get("date", ""))[:10]])


def _scalars(row: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{before}{name} ")
        elif isinstance(value, float):
            yield f"{before}{name}", f"{value:.4g}"
        elif isinstance(value, str | int):
            yield f"{before}{name}", str(value).replace("|", "/").replace("\n", " ")


def _table(rows: list[dict[str, str]], name: str) -> str:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    if not columns:
        return f"See `benchmarks/results/{name}`.\n"
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(row.get(c, '') for c in columns)} |" for row in rows[:ROWS]]
    if len(rows) > ROWS:
        lines += ["", f"{len(rows) - ROWS} further rows are in `benchmarks/results/{name}`."]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    for picture, make in PICTURES.items():
        print(make(Path(sys.argv[1]) / picture))
