"""Records on disk, and everything that shows them."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.monitor.oracle import chain
from tnconv.cli import main
from tnconv.monitor import GradHist2d, Monitor, Run, configuration, read_run
from tnconv.monitor.cockpit_logs import read_cockpit_log
from tnconv.monitor.events import Alert, Event
from tnconv.monitor.run_folder import RunWriter
from tnconv.monitor.terminal_view import TerminalView, gauge, plain, rendered, sparkline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """A run of a few steps."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("runs") / "first"
    model, loss_fn = chain(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kinds = [*configuration("economy"), GradHist2d()]
    monitor = Monitor(model, loss_fn, kinds, folder=path)
    for _ in range(4):
        x, y = torch.randn(6, 2, 4, 4), torch.randint(3, (6,))
        with monitor.step():
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()
    torch.save(monitor.records, path.parent / "records.pt")
    return path


def test_records_are_read_back(folder: Path) -> None:
    run = read_run(folder)
    expected = torch.load(folder.parent / "records.pt", weights_only=False)
    assert not run.problems and list(run.names) == [n for n, _ in chain().named_parameters()]
    for found, record in zip(run.records, expected, strict=True):
        assert found.keys() == record.keys()
        for name, value in record.items():
            if isinstance(value, dict) and "hist" in value:
                assert np.array_equal(found[name]["hist"], value["hist"])
                pairs = zip(np.ravel(found[name]["edges"]), np.ravel(value["edges"]), strict=True) \
                    if not isinstance(value["edges"], tuple) else ()  # fmt: skip
                assert all(a == b for a, b in pairs)
            else:
                assert found[name] == value


def test_torn_lines_are_skipped_and_reported(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path, {"parameters": ["weight"]})
    writer.write(0, {"Loss": math.nan, "GradNorm": [math.inf]})
    writer.write(
        1, {"Loss": 1.0, "Hist": {"hist": np.arange(3), "edges": (np.ones(2), np.ones(1))}}
    )
    with (tmp_path / "scalars.jsonl").open("a") as file:
        file.write('{"step": 2, "Lo')  # a crash in the middle of a write
    with pytest.warns(UserWarning, match=r"line 4 of scalars.jsonl is torn"):
        run = read_run(tmp_path)
    assert [r["step"] for r in run.records] == [0, 1] and math.isnan(run.records[0]["Loss"])
    assert run.records[0]["GradNorm"] == [math.inf]
    assert isinstance(run.records[1]["Hist"]["edges"], tuple)
    again = RunWriter(tmp_path, {"parameters": ["weight"]})
    again.write(2, {"Loss": 0.5})
    again.write(1, {"Alpha": 0.25})  # of a step that is written already
    with pytest.warns(UserWarning, match="torn"):
        run = read_run(tmp_path)
    assert [r["step"] for r in run.records] == [0, 1, 2] and run.records[1]["Alpha"] == 0.25
    (tmp_path / "arrays" / "step-000000001.npz").write_bytes(b"PK torn")
    with pytest.warns(UserWarning, match=r"step-000000001.npz cannot be read"):
        assert read_run(tmp_path).records[1]["Loss"] == 1.0
    with pytest.raises(FileNotFoundError, match="no run in"):
        read_run(tmp_path / "nowhere")


@pytest.mark.parametrize("kind", ["png", "pdf", "svg"])
def test_static_report(folder: Path, tmp_path: Path, kind: str, capsys: Any) -> None:
    """All panels in a picture, and a few in files of vectors."""
    pytest.importorskip("matplotlib")
    before = sys.modules.get("matplotlib.pyplot")
    if kind != "png":
        RunWriter(tmp_path, {"parameters": ["w"]}).write(0, {"Loss": 1.0, "Alpha": 0.1})
    given = str(folder if kind == "png" else tmp_path)
    assert main(["monitor", "report", given, "--format", kind]) == 0
    path = Path(capsys.readouterr().out.strip())
    starts = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}
    assert path.read_bytes().startswith(starts[kind])
    assert sys.modules.get("matplotlib.pyplot") is before  # no global state


def test_a_report_is_written_to_the_file_that_is_named(tmp_path: Path, capsys: Any) -> None:
    """In the format that it names; a folder is for several runs, or for another format."""
    pytest.importorskip("matplotlib")
    RunWriter(tmp_path, {"parameters": ["w"]}).write(0, {"Loss": 1.0, "Alpha": 0.1})
    file = tmp_path / "new" / "picture.svg"
    report = ["monitor", "report", str(tmp_path)]
    assert main([*report, "--output", str(file)]) == 0
    assert Path(capsys.readouterr().out.strip()) == file
    assert file.read_bytes().startswith(b"<?xml")
    for wrong in ([str(tmp_path)], ["--format", "png"]):
        with pytest.raises(SystemExit):
            main([*report, *wrong, "--output", str(file)])
        assert "expected a folder" in capsys.readouterr().err
    assert main([*report, "--format", "svg", "--output", str(tmp_path / "folder")]) == 0
    assert Path(capsys.readouterr().out.strip()).parent == tmp_path / "folder"


def test_a_diverging_value_hides_no_others(tmp_path: Path, capsys: Any) -> None:
    """Alpha's axis ends where steps are far too long, in both reports; others keep all."""
    pytest.importorskip("plotly")
    for name, last in (("calm", 0.5), ("wild", 1e9)):
        writer = RunWriter(tmp_path / name, {"parameters": ["w"]})
        for step, alpha in enumerate((0.1, -0.4, last)):
            writer.write(step, {"Alpha": alpha, "Loss": 1 + alpha**2})
        out = tmp_path / f"{name}.html"
        assert main(["monitor", "report", str(tmp_path / name), "--output", str(out)]) == 0
        body = out.read_text().split("</head>")[1]
        assert ('"range": [-2.0, 3.0]' in body) == (name == "wild")
        assert body.count('"range": [') == (name == "wild")


def test_html_report_needs_nothing_else(folder: Path, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("plotly")
    out = tmp_path / "both.html"
    assert main(["monitor", "compare", str(folder), str(folder), "--output", str(out)]) == 0
    text = out.read_text()
    body = text[text.index("</head>") :]
    assert "src=" not in body and "http" not in body
    for name in ("panel-loss", "histogram-GradHist1d", "histogram-GradHist2d", 'id="slider"'):
        assert name in body
    frames = json.loads(body.split("frames = ")[1].split(";\nfor")[0])
    assert set(frames["histogram-GradHist1d"]) == {"0", "1", "2", "3"}


def test_browser_moves_the_slider(folder: Path, tmp_path: Path) -> None:
    """In headless Chromium: the panels are there, and the slider changes the histogram."""
    pytest.importorskip("plotly")
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="no driver: pip install playwright"
    )
    from tnconv.monitor.interactive_report import html_report

    path = html_report(read_run(folder), tmp_path / "run.html")
    with playwright.sync_playwright() as driver:
        try:
            own = os.environ.get("TNCONV_CHROMIUM") or shutil.which("chromium")
            browser = driver.chromium.launch(executable_path=own, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no browser: {str(error).splitlines()[0]}; playwright install chromium")
        page = browser.new_page()
        page.goto(path.as_uri())
        page.wait_for_selector("#panel-loss .main-svg")
        read = "() => document.getElementById('histogram-GradHist1d').data[0].y.join()"
        last = page.evaluate(read)
        page.evaluate(
            "() => { const s = document.getElementById('slider'); s.value = 0;"
            " s.dispatchEvent(new Event('input')); }"
        )
        assert page.evaluate(read) != last
        assert page.evaluate("() => document.getElementById('step').value") == "0"
        browser.close()


def test_terminal(folder: Path, capsys: Any) -> None:
    rich = pytest.importorskip("rich.console")
    run = read_run(folder)
    run.alerts.append({"step": 3, "level": "warning", "title": "dead units", "text": "half"})
    console = rich.Console(width=140, record=True, file=open(os.devnull, "w"))
    console.print(rendered(run))
    text = console.export_text()
    for word in ("Alpha", "●", "NormTest", "GradHist1d", "dead units", "▁"):
        assert word in text
    assert "NormTest" in plain(run) and "dead units" in plain(run)
    assert main(["monitor", "show", str(folder)]) == 0
    assert "NormTest" in capsys.readouterr().out
    assert sparkline([]) == "" and gauge(None).count("●") == 0 and gauge(9.0)[-2] == "●"


@pytest.mark.parametrize("terminal", [True, False])
def test_live_view(terminal: bool) -> None:
    rich = pytest.importorskip("rich.console")
    import io

    out = io.StringIO()
    view = TerminalView(0.0, rich.Console(file=out, force_terminal=terminal, width=120))
    for step in range(3):
        event = Event(step, {"Loss": 1.0 / (step + 1), "GradNorm/total": 2.0, "GradNorm/w": 2.0})
        event.histograms["GradHist1d"] = np.arange(4), np.linspace(-1, 1, 5)
        if step == 2:
            event.alerts.append(Alert("error", "loss is not finite", "look"))
        view.event(event)
    view.close()
    assert "loss is not finite" in out.getvalue() and "0.3333" in out.getvalue()


def test_cockpit_logs(tmp_path: Path, capsys: Any) -> None:
    array = {"__ndarray__": [[1, 2], [3, 4]], "dtype": "int64", "shape": [2, 2]}
    edges = {"__ndarray__": [0.0, 1.0, 2.0], "dtype": "float64", "shape": [3]}
    histogram = {"hist": array, "edges": [edges] * 2}
    log = {
        "0": {"Loss": 1.5, "GradNorm": [1.0, 2.0], "GradHist2d": histogram},
        "10": {"Loss": 1.0, "Alpha": -0.5, "GradNorm": [1.0, 1.0], "epoch_count": 0},
    }
    path = tmp_path / "log.json"
    path.write_text(json.dumps(log))
    run = read_cockpit_log(path)
    assert run.series("Loss") == ([0, 10], [1.5, 1.0]) and len(run.names) == 2
    assert run.records[0]["GradHist2d"]["hist"].tolist() == [[1, 2], [3, 4]]
    assert main(["monitor", "show", str(path)]) == 0 and "Alpha" in capsys.readouterr().out
    path.write_text("[1]")
    with pytest.raises(ValueError, match="no log of Cockpit"):
        read_cockpit_log(path)


def test_command_line_errors(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["monitor", "show", str(tmp_path)])
    assert stopped.value.code == 2 and "no run in" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no records"):
        from tnconv.monitor.interactive_report import html_report

        html_report(Run(), tmp_path / "x.html")


def test_to_pandas(folder: Path) -> None:
    pytest.importorskip("pandas")
    table = read_run(folder).to_pandas()
    assert table.shape[0] == 4 and "GradNorm/0.weight" in table and "Loss" in table
    assert table.index.name == "step"


def test_import_needs_no_extra() -> None:
    """Nothing of the extras is imported with the library."""
    code = (
        "import sys, tnconv.monitor; print([m for m in ('rich', 'plotly', 'matplotlib', 'pandas', "
    )
    code += "'wandb', 'lightning', 'transformers', 'mlflow') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
