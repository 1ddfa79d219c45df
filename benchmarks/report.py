"""Results of `benchmarks.layers` and `benchmarks.overhead` as tables and plots beside the JSON.

Run as ``python -m benchmarks.report results.json``; it writes ``results.md`` and ``results.png``.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import bars, overhead
from benchmarks.layers import Row, others, summary


def rows(file: Path) -> list[Row]:
    """The rows that a run has written."""
    return [Row(**values) for values in json.loads(file.read_text())["rows"]]


def peers(found: Sequence[Row]) -> list[tuple[str, str]]:
    """(operation, contestant) of all that were timed beside tnconv, other plans of it left out."""
    operations = dict.fromkeys(row.operation for row in found)
    return [(operation, name) for operation in operations for name in others(found, operation)]


def table(found: Sequence[Row]) -> str:
    """Ratios to tnconv, one line per operation and contestant, in Markdown."""
    lines = [
        "| operation | against | layers | geometric mean | median | worst | at |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for operation, name in peers(found):
        timed = [r for r in found if r.operation == operation and r.ratio(name) is not None]
        if not timed:
            continue
        cases, *numbers = summary(timed, name).values()
        worst = min(timed, key=lambda row: row.ratio(name) or 0.0)
        cells = " | ".join(f"{number:.2f}" for number in numbers)
        lines.append(f"| {operation} | {name} | {cases} | {cells} | {worst.shapes} |")
    return "\n".join(lines)


def plot(found: Sequence[Row], file: Path) -> None:
    """The ratios to each contestant on all layers, sorted, on a logarithmic axis."""
    from matplotlib.figure import Figure

    operations = list(dict.fromkeys(row.operation for row in found))
    columns = min(len(operations), 7)
    lines = -(-len(operations) // columns)
    figure = Figure(figsize=(4 * columns, 3.5 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, sharey=True, squeeze=False)
    for axis in axes.flat[len(operations) :]:
        axis.remove()
    for axis, operation in zip(axes.flat, operations, strict=False):
        for name in (peer for where, peer in peers(found) if where == operation):
            ratios = [row.ratio(name) for row in found if row.operation == operation]
            given = sorted(ratio for ratio in ratios if ratio is not None)
            axis.plot(given, label=name, marker=".", markersize=3)
        axis.axhline(1, color="black", linewidth=0.5)
        axis.set(title=operation, xlabel="layers, sorted", yscale="log")
        if axis.lines[1:]:
            axis.legend(fontsize=7)
    for axis in axes[:, 0]:
        axis.set_ylabel("time / time of tnconv")
    figure.savefig(file)


def main(arguments: Sequence[str]) -> None:
    """Render every file that is named."""
    for file in map(Path, arguments):
        saved = json.loads(file.read_text())
        given, picture = saved["environment"], file.with_suffix(".png")
        about = f"torch {given['torch']}, {given['device']}, {given['threads']} thread(s)"
        text = [f"# {file.stem}", "", f"{about}, {saved['clock']}. Bold: missed.", ""]
        if "calls" in saved:
            called, compiled, longest = overhead.loaded(saved)
            text += overhead.lines(called, compiled, longest)
            overhead.plot(compiled, picture)
        else:
            found = rows(file)
            text += ["Above 1, tnconv is faster; of memory, below 1 it needs less.", ""]
            asked = list(bars.lines(found, bars.of_run(saved)))
            text += [*asked, "", "## Ratios", ""] if asked else []
            text.append(table(found))
            plot(found, picture)
        file.with_suffix(".md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
