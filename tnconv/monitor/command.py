"""``python -m tnconv monitor show|report|compare RUN...``: recorded runs, also unfinished ones."""

import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tnconv.monitor.cockpit_logs import read_cockpit_log
from tnconv.monitor.interactive_report import html_report
from tnconv.monitor.run_folder import Run, read_run
from tnconv.monitor.static_report import static_report
from tnconv.monitor.terminal_view import show

FORMATS = ("html", "png", "pdf", "svg")


def add(commands: Any) -> None:
    """Add ``monitor`` to the commands of the command line."""
    parser: ArgumentParser = commands.add_parser("monitor", help="show recorded training runs")
    actions = parser.add_subparsers(title="actions", required=True)
    shown = actions.add_parser("show", help="in the terminal")
    shown.add_argument("--follow", type=float, metavar="SECONDS", help="again and again")
    report = actions.add_parser("report", help="write a picture or an HTML file for each run")
    report.add_argument("--format", choices=FORMATS, help="by default the file's, or html")
    report.add_argument(
        "--output", type=Path, help="a folder, by default each run's own; or one run's file"
    )
    compare = actions.add_parser("compare", help="several runs in one picture or HTML file")
    compare.add_argument("--output", type=Path, default=Path("comparison.html"))
    for action, run in ((shown, _show), (report, _report), (compare, _compare)):
        action.add_argument("runs", nargs="+", type=Path, metavar="RUN")
        action.set_defaults(run=partial(_or_say_why_not, run))


def _or_say_why_not(run: Callable[[Namespace], None], given: Namespace) -> None:
    try:
        run(given)
    except OSError as error:
        named = f"{error.filename}: " if error.filename is not None else ""
        raise ValueError(f"{named}{error.strerror or error}") from error
    except ModuleNotFoundError as error:
        raise SystemExit(f"no module {error.name}; pip install 'tnconv[monitor]'") from error


def load(path: Path) -> Run:
    """A run's folder, or a JSON log of the published tool."""
    return read_cockpit_log(path) if path.suffix == ".json" else read_run(path)


def _show(given: Namespace) -> None:
    while True:
        for path in given.runs:
            show(load(path))
        if given.follow is None:
            return
        time.sleep(given.follow)


def _report(given: Namespace) -> None:
    output = given.output
    named = output is not None and output.suffix[1:] in FORMATS and not output.is_dir()
    if named and (len(given.runs) > 1 or given.format not in (None, output.suffix[1:])):
        runs, kind = len(given.runs), given.format or "any format"
        raise ValueError(f"--output is {output} for {runs} runs in {kind}; expected a folder")
    kind = output.suffix[1:] if named else given.format or "html"
    for path in given.runs:
        run, folder = load(path), output or (path if path.is_dir() else path.parent)
        file = output if named else folder / f"{run.label or 'report'}.{kind}"
        file.parent.mkdir(parents=True, exist_ok=True)
        print((html_report if kind == "html" else static_report)(run, file))


def _compare(given: Namespace) -> None:
    runs = [load(path) for path in given.runs]
    given.output.parent.mkdir(parents=True, exist_ok=True)
    write = html_report if given.output.suffix == ".html" else static_report
    print(write(runs, given.output))
