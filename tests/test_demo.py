"""The command line: what it prints and writes, and how it refuses."""

import runpy
import sys

import pytest
import torch

from tnconv.cli import OF_INPUT, OF_LAYER, main, network

CONV = "conv --input 8 4 12 12 --weight 16 2 3 3 --groups 2 --stride 2 1 --padding 1".split()
LINEAR = "linear --input 8 5 4 --weight 16 4".split()
SHAPES = {
    "forward": ((8, 16, 6, 12), (8, 5, 16)),
    "weight_vjp": ((16, 2, 3, 3), (16, 4)),
    "input_vjp": ((8, 4, 12, 12), (8, 5, 4)),
    "per_sample": ((8, 16, 2, 3, 3), (8, 16, 4)),
    "unfold": ((8, 36, 72), (8, 4, 5)),
    "kfac_expand": ((2, 18, 18), (1, 4, 4)),
    "kfac_reduce": ((2, 18, 18), (1, 4, 4)),
}


def test_demo_trains_compares_explains_and_draws(capsys, tmp_path):
    folder, threads = tmp_path / "pictures", torch.get_num_threads()
    assert main(["demo", "--quick", "--first-seed", "4", "--folder", str(folder)]) == 0
    printed = capsys.readouterr().out
    for part in (
        "chosen by",  # the grid
        "0.03",
        "loss 1",  # both side by side
        "KFAC ran with its defaults: lr=0.1",
        "Mean test accuracy: KFAC",
        "1/16384 · Σ",  # the diagram, rules, plan and source
        "removes legs o1",
        "predicted time",
        "def contraction(x):",
        "simplified, in form V",
    ):
        assert part in printed
    written = {path.name for path in folder.iterdir()}
    assert {"factor", "factor-simplified"} == {name.split(".")[0] for name in written}
    assert all(path.stat().st_size > 500 for path in folder.iterdir())
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("name", ["rich", "sklearn"])
def test_demo_without_its_packages_says_what_to_install(monkeypatch, capsys, name):
    for module in [m for m in sys.modules if m.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delitem(sys.modules, "tnconv.demo", raising=False)
    monkeypatch.delattr("tnconv.demo", raising=False)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match="1"):
        main(["demo", "--quick"])
    error = capsys.readouterr().err
    assert "pip install 'tnconv[demo]'" in error and error.count("\n") == 1


@pytest.mark.parametrize("operation", [*OF_LAYER, *OF_INPUT])
def test_every_operation_is_explained(capsys, operation):
    for layer, shape in zip((CONV, LINEAR), SHAPES[operation], strict=True):
        assert main(["explain", *layer, "--operation", operation]) == 0
        assert "def contraction(" in capsys.readouterr().out
        assert parsed(["explain", *layer, "--operation", operation]) == shape


def parsed(arguments: list[str]) -> tuple[int, ...]:
    from tnconv.cli import _parser

    return network(_parser().parse_args(arguments)).shape


@pytest.mark.parametrize("extra", [[], ["--simplified"]])
def test_draw_writes_a_picture(capsys, tmp_path, extra):
    file = tmp_path / "picture.dot"
    assert main(["draw", *CONV, "--operation", "kfac_reduce", "--output", str(file), *extra]) == 0
    assert capsys.readouterr().out.strip() == str(file)
    assert ("simplified" in file.read_text()) == bool(extra)


def test_draw_shows_every_step(capsys, tmp_path):
    file = tmp_path / "picture.dot"
    assert (
        main(["draw", *CONV, "--operation", "kfac_reduce", "--output", str(file), "--steps"]) == 0
    )
    capsys.readouterr()
    assert file.read_text().count("label=free") == 4


def test_explain_says_where_rules_fire_and_what_they_save(capsys):
    assert main(["explain", *CONV, "--operation", "kfac_reduce"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  free")]
    assert lines[0].startswith("  free at Π[2·o1 + k1 - i1 = 1]: removes legs o1; ")
    before, after = (int(n.replace(",", "")) for n in lines[0].split("; ")[1].split()[:3:2])
    assert before > after > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["explain", "conv", "--input", "8", "4", "9", "--weight", "6", "3", "3"], "channels"),
        (["explain", *CONV, "--padding", "x"], "'x'; expected ints, same or valid"),
        (["draw", *CONV, "--output", "a.bmp"], "expected a suffix"),
        (["draw", *CONV, "--output", "missing/a.svg"], "expected a file in a folder that exists"),
        (["draw", *CONV, "--steps", "--output", "missing/a.svg"], "folder that exists"),
        (["demo", "--seeds", "0"], "0; expected at least 1"),
        ([], "explain,draw,demo"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(capsys, arguments, words):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert words in capsys.readouterr().err


def test_module_runs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tnconv", "explain", *LINEAR])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("tnconv", run_name="__main__")
    assert "def contraction(x, weight):" in capsys.readouterr().out
