"""Runs with odd values and names, and files that are none of a run's, wherever they are shown."""

import io
import math
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tnconv.cli import main
from tnconv.monitor import Alert, read_run
from tnconv.monitor.events import event_of
from tnconv.monitor.run_folder import Run, RunWriter
from tnconv.monitor.terminal_view import TerminalView, plain, rendered, sparkline

NAMES = st.sampled_from(
    [
        "Loss",
        "GradNorm",
        "DeadUnits",
        "<b>Own</b>",
        "$\\bar{$",
        "[red]x[/nope]",
        "<!--<script>",
        "\"q'",
    ]
)
NUMBERS = st.sampled_from([1.0, -2.5, 0.0, math.nan, math.inf, 1e308, -1e308, 1e-320, None, 7])


def histogram(counts: list[int], joint: bool) -> dict[str, Any]:
    edges = np.linspace(-1, 1, len(counts) + 1)
    if joint:
        return {"hist": np.outer(counts, counts), "edges": (edges, edges)}
    return {"hist": np.array(counts), "edges": edges}


HISTOGRAMS = st.builds(
    histogram, st.lists(st.integers(0, 3), min_size=2, max_size=4), st.booleans()
)
VALUES = st.one_of(
    NUMBERS, st.tuples(NUMBERS, NUMBERS).map(list), st.dictionaries(NAMES, NUMBERS), HISTOGRAMS
)
RECORDS = st.lists(st.dictionaries(NAMES, VALUES, min_size=1), min_size=1, max_size=3)
ALERT = {"level": "warning", "title": "<i>t</i>[/x]", "text": "[bold]'a'[/nope] & $\\foo$"}


def written(records: list[dict[str, Any]], label: str = "<b>[red]$x_$") -> Run:
    folder = Path(mkdtemp())
    writer = RunWriter(folder, {"parameters": ["$\\bar{$", "<img src=x>"]})
    for step, record in enumerate(records):
        writer.write(step, {name.replace("/", "|"): value for name, value in record.items()})
    writer.alert(0, ALERT)
    run = read_run(folder)
    run.label = label
    return run


@pytest.mark.filterwarnings("ignore:Data has no positive values")
@settings(max_examples=2)
@given(records=RECORDS)
def test_static_report(
    records: list[dict[str, Any]],
) -> None:
    """A picture, or words that say that there is nothing to draw."""
    pytest.importorskip("matplotlib")
    from tnconv.monitor.static_report import static_report

    run = written(records)
    try:
        path = static_report([run, run], Path(mkdtemp()) / "report.png")
    except ValueError as error:
        assert "no finite values" in str(error)
    else:
        assert path.stat().st_size > 0


@settings(max_examples=30)
@given(records=RECORDS, width=st.sampled_from([3, 20, 160]))
def test_terminal(records: list[dict[str, Any]], width: int) -> None:
    """Names as they are, at any width; live, with and without a terminal."""
    rich = pytest.importorskip("rich.console")
    run = written(records)
    console = rich.Console(width=width, record=True, file=io.StringIO())
    console.print(rendered(run))
    shown = console.export_text()
    assert width < 100 or ("<b>[red]$x_$" in shown and "[bold]'a'[/nope]" in shown)
    assert "[/nope]" in plain(run)
    for terminal in (True, False):
        view = TerminalView(
            0.0, rich.Console(file=io.StringIO(), force_terminal=terminal, width=width)
        )
        for step, record in enumerate(records):
            event = event_of(step, record, ["a", "b"])
            event.alerts.append(Alert("info", ALERT["title"], ALERT["text"]))
            view.event(event)
        view.close()


@given(values=st.lists(st.floats()))
def test_sparklines(values: list[float]) -> None:
    assert len(sparkline(values, 50)) == min(50, len(values))


@settings(max_examples=20)
@given(records=RECORDS)
def test_html_report(records: list[dict[str, Any]]) -> None:
    """No name ends a tag or a script."""
    pytest.importorskip("plotly")
    from tnconv.monitor import interactive_report

    run = written(records)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("plotly.offline.get_plotlyjs", lambda: "")
        body = interactive_report.html_report(run, Path(mkdtemp()) / "report.html").read_text()
    for name in ("<b>", "<img", "<!--", "<i>", "[red]x[/nope]<"):
        assert name not in body
    assert body.count("<script>") == body.count("</script>") == 2
    ids = body.split('id="')[1:]
    assert all(part.split('"')[0].replace("-", "").isalnum() for part in ids)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("text.txt", b"hello\n", "text.txt is no run; expected lines of JSON"),
        ("bytes.bin", bytes(range(256)), "bytes.bin is no run"),
        ("torn.json", b"{", "torn.json is no log of Cockpit"),
        ("bytes.json", b"\xff\xfe", "bytes.json is no log of Cockpit"),
        ("nowhere.json", None, "nowhere.json: No such file"),
        ("nowhere", None, "no run in"),
    ],
)
@pytest.mark.parametrize("action", ["show", "report", "compare"])
def test_files_of_other_kinds(
    action: str, name: str, content: bytes | None, match: str, tmp_path: Path, capsys: Any
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        main(["monitor", action, str(path)])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and match in said and len(said.splitlines()) == 1


def test_places_that_cannot_be_written(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("plotly")
    run = tmp_path / "run"
    RunWriter(run, {"parameters": ["w"]}).write(0, {"Loss": 1.0})
    for output in (run / "scalars.jsonl", run / "scalars.jsonl" / "report.html"):
        with pytest.raises(SystemExit):
            main(["monitor", "report", str(run), "--output", str(output)])
        assert "scalars.jsonl: " in capsys.readouterr().err
    assert main(["monitor", "compare", str(run), "--output", str(tmp_path / "new" / "a.html")]) == 0


@pytest.mark.filterwarnings("ignore:line .* is")
def test_lines_that_are_none_of_a_run(tmp_path: Path, capsys: Any) -> None:
    """They are reported; the others count."""
    lines = [
        '{"header": {"parameters": ["a"]}}',
        '{"step": "x", "Loss": 2}',
        '{"step": 1, "Loss": 3}',
    ]
    lines += [
        '{"step": 2, "alert": "no"}',
        '{"header": 3}',
        '{"step": 3, "alert": {"title": "x"}}',
        "{",
    ]
    (tmp_path / "scalars.jsonl").write_text("\n".join(lines))
    run = read_run(tmp_path)
    assert run.series("Loss") == ([1], [3]) and run.names == ["a"] and not run.alerts
    assert len(run.problems) == 5
    (tmp_path / "scalars.jsonl").write_text("")  # is just being made
    assert main(["monitor", "show", str(tmp_path)]) == 0
    assert "nothing is recorded yet" in capsys.readouterr().out
