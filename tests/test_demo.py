"""The command line: what it prints and writes, and how it refuses."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tnconv
from tnconv import compile
from tnconv.cli import OF_LAYER, main, network
from tnconv.commands.accounts import fitted_to_terminal, random_operands
from tnconv.commands.asked_layers import LAYERS, OF_INPUT, OF_OUTPUT
from tnconv.commands.benching import Timed, table
from tnconv.commands.contestants import contestants, torchs

CONV = "conv --input 8 4 12 12 --weight 16 2 3 3 --groups 2 --stride 2 1 --padding 1".split()
LINEAR = "linear --input 8 5 4 --weight 16 4".split()
OTHERS = {
    "conv_transpose": "conv_transpose --input 2 4 6 --weight 4 3 2 --stride 2 --output-padding 1",
    "avg_pool": "avg_pool --input 2 3 9 --weight 3 --padding 1",
}
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
        "A route is a way to compute a pattern",
        "measured: torch: unfold, mean, product",
        "Next: python -m tnconv explain",
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


@pytest.mark.parametrize("operation", SHAPES)
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
        (["draw", *CONV, "--output", "a.bmp"], "a name that ends in one of .svg, .pdf"),
        (
            ["explain", "bias", "--input", "2", "3", "--weight", "3", "--operation", "ggn_block"],
            "no w",
        ),
        (["explain", *LINEAR[:-2], "16", "5", "--operation", "grad_expand"], "5"),
        (["explain", "scale", *CONV[1:6], "--weight", "4", "--operation", "unfold"], "no patches"),
        (
            ["bench", "torch.nn:Identity", "--input", "2", "--stride", "2"],
            "a model has no --stride",
        ),
        (["bench", "tests.test_demo:narrow", "--input", "2", "3"], "no input of shape (2, 3): "),
        (["calibrate", "--device", "nowhere"], "--device is 'nowhere': "),
        (["demo", "--folder", "missing/pictures"], "expected a folder or a new one"),
        (["draw", *CONV, "--output", "missing/a.svg"], "expected a file in a folder that exists"),
        (["draw", *CONV, "--steps", "--output", "missing/a.svg"], "folder that exists"),
        (["demo", "--seeds", "0"], "0; expected at least 1"),
        ([], "explain,draw,source,bench,tune,calibrate,cache,demo"),
        (["explain", *LINEAR, "--stride", "2"], "linear has no --stride; expected no options"),
        (
            ["explain", "avg_pool", "--input", "2", "3", "9", "--weight", "3", "--groups", "2"],
            "no --g",
        ),
        (["explain", "what", *CONV[1:]], "layer is 'what'; expected one of conv"),
        (["explain", "conv", "--input", "2", "3", "9"], "--weight is not given"),
        (["explain", *CONV, "--html", "missing/a.html"], "file in a folder that exists"),
        (["explain", *CONV, "--html", "a.txt"], "a name that ends in .html"),
        (["source", *CONV, "--output", "a.txt"], "a name that ends in .py"),
        (["explain", "nowhere:net", "--input", "2"], "no module 'nowhere'"),
        (["explain", "torch.nn:ReLU", "--input", "2", "--operation", "unfold"], "for a model"),
        (["explain", "math:pi", "--input", "2"], "gives a float; expected a torch.nn.Module"),
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


@pytest.mark.parametrize("operation", [name for name in OF_LAYER if name not in SHAPES])
def test_other_operations_are_explained(capsys, operation):
    small = CONV if operation != "hessian_vjp" else "conv --input 3 5 --weight 2 3 2".split()
    assert main(["explain", *small, "--operation", operation]) == 0
    assert "def contraction(" in capsys.readouterr().out


@pytest.mark.parametrize("layer", OTHERS)
def test_other_layers_are_explained(capsys, layer):
    assert main(["explain", *OTHERS[layer].split(), "--operation", "input_vjp"]) == 0
    assert "grad_output[" in capsys.readouterr().out


def narrow():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Linear(5, 2))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("operation", [*OF_LAYER, *OF_INPUT, *OF_OUTPUT])
def test_every_operation_of_every_layer_is_a_diagram_or_refused_in_words(layer, operation):
    shapes = {
        "conv": "--input 2 4 6 --weight 6 4 3",
        "avg_pool": "--input 2 4 6 --weight 2",
        "conv_transpose": "--input 2 4 6 --weight 4 3 2",
        "linear": "--input 2 4 --weight 3 4",
        "bilinear": "--input 2 4 --weight 3 4 5",
        "lookup": "--input 2 6 --weight 6 3",
        "scale": "--input 2 4 6 --weight 4",
        "bias": "--input 2 4 --weight 4",
    }
    try:
        assert parsed(["explain", layer, *shapes[layer].split(), "--operation", operation])
    except ValueError as error:
        assert "\n" not in str(error)
        assert (layer not in ("conv", "linear") and operation != "forward") or (
            operation == "hessian_vjp" and "expected one without" in str(error)
        )


def test_json_and_html(capsys, tmp_path):
    assert main(["explain", *CONV, "--operation", "weight_vjp", "--json", "--measure"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["shape"] == [16, 2, 3, 3] and {"tnconv", "torch"} <= set(told["measured_seconds"])
    assert told["steps"][0]["flops"] > 0 and "def contraction" in told["source"]
    page = tmp_path / "report.html"
    assert main(["explain", *CONV, "--html", str(page)]) == 0
    assert "def contraction" in page.read_text() and "http" not in _without_svg(page.read_text())


def _without_svg(text: str) -> str:
    return re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL)


def test_models_are_explained(capsys, tmp_path, monkeypatch):
    factory = (
        "from torch import nn\ndef small():\n    return nn.Sequential(nn.Conv1d(3, 4, 3), Own())\n"
    )
    own = (
        "class Own(nn.Bilinear):\n    def forward(self, x):\n        return super().forward(x, x)\n"
    )
    body = factory.replace("def small", own + "def small").replace("Own()", "Own(7, 7, 2)")
    (tmp_path / "my_nets.py").write_text(body)
    monkeypatch.chdir(tmp_path)
    command = ["explain", "my_nets:small", "--input", "2", "3", "9", "--operation", "per_sample"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "0 (Conv1d)" in printed and "without a diagram: 1 (Own)" in printed
    assert main([*command, "--json"]) == 0
    assert [each["shape"] for each in json.loads(capsys.readouterr().out)["layers"]] == [
        [2, 4, 3, 3]
    ]


def test_sources_are_written_and_run(capsys, tmp_path):
    file = tmp_path / "program.py"
    assert main(["source", *LINEAR, "--output", str(file)]) == 0
    assert capsys.readouterr().out.strip() == str(file)
    contraction = runpy.run_path(str(file))["contraction"]
    x, weight = torch.rand(8, 5, 4), torch.rand(16, 4)
    torch.testing.assert_close(contraction(x, weight), x @ weight.mT)
    assert main(["source", *CONV, "--style", "einsum"]) == 0
    assert "torch.einsum(" in capsys.readouterr().out


@pytest.mark.parametrize("operation", ["forward", "weight_vjp", "input_vjp", "per_sample"])
@pytest.mark.parametrize("layer", [CONV, LINEAR, OTHERS["conv_transpose"].split()])
def test_torchs_way_has_the_same_value(operation, layer):
    from tnconv.cli import _parser

    if layer is LINEAR and operation == "per_sample":
        pytest.skip("positions are samples of vmap, too")
    given = _parser().parse_args(["explain", *layer, "--operation", operation])
    program = compile(network(given))
    operands = dict(random_operands(program))
    way = torchs(given)
    assert way is not None
    expected = way(**{name: operand.clone() for name, operand in operands.items()})()
    torch.testing.assert_close(program(**operands), expected.detach(), rtol=1e-4, atol=1e-4)


def test_measurements_and_caches(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TNCONV_CACHE_DIR", str(tmp_path))
    assert main(["bench", *CONV]) == 0
    assert "torch takes" in (printed := capsys.readouterr().out) and "times as long" in printed
    assert main(["bench", *CONV, "--operation", "gradient_norms"]) == 0
    assert "torch has no function for gradient_norms" in capsys.readouterr().out
    assert main(["tune", *CONV]) == 0
    assert "other plans\nremembered in" in capsys.readouterr().out
    assert main(["cache"]) == 0
    count = int(capsys.readouterr().out.split(" holds ")[1].split()[0])
    assert main(["cache", "--clear"]) == 0 and count == 1
    assert not list(tmp_path.rglob("*.json"))


def test_models_are_timed_beside_torch_and_peers(capsys, monkeypatch, tmp_path):
    """The values are those of torch, whatever a layer's settings; a table has a line for each."""
    command = ["bench", "tests.test_demo:narrow", "--input", "2", "3", "4", "5"]
    assert main(command) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[:5] == ["layer", "tnconv", "us", "torch", "us"]
    assert rows[0].startswith("0 (Conv2d)") and rows[1].startswith("1 (Linear)")
    assert any("times as long (geometric mean)" in row for row in rows[2:])
    assert main([*command, "--operation", "weight_vjp", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [each["layer"] for each in told] == ["0 (Conv2d)", "1 (Linear)"]
    assert all({"tnconv", "torch"} <= each["seconds"].keys() for each in told)
    text = table([Timed("a", {"tnconv": 1e-6, "torch": 2e-6}), Timed("b", {"tnconv": 1.0})])
    assert text.splitlines()[2].split()[-1] == "-"
    assert text.endswith("torch takes 2.00 times as long (geometric mean)")


PEERS = ["forward", "weight_vjp", "input_vjp", "per_sample", "kfac_expand", "kfac_reduce", "unfold"]


@pytest.mark.parametrize("operation", PEERS)
def test_contestants_agree(operation):
    """Up to the scale of Kronecker factors, which other libraries choose otherwise."""
    pytest.importorskip("einconv")
    pytest.importorskip("opacus")
    from tnconv.cli import _parser

    given = _parser().parse_args(["bench", *CONV, "--operation", operation])
    program = compile(network(given))
    operands = dict(random_operands(program))
    found = contestants(given)
    assert "torch" in found and ("einconv" in found or operation in ("per_sample", "unfold"))
    assert ("opacus" in found) == (operation == "per_sample")
    value = program(**operands)
    for way in found.values():
        other = way(**{name: operand.clone() for name, operand in operands.items()})().detach()
        ratio = other.norm() / value.norm() if operation.startswith("kfac") else 1.0
        torch.testing.assert_close(value * ratio, other, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_an_interrupted_command_is_one_line():
    code = (
        "import os, signal, sys, threading; from tnconv.__main__ import run; import tnconv.cli; "
        "stop = threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)); stop.start(); "
        "sys.exit(run(sys.argv[1:]))"
    )
    big = "conv --input 64 64 56 56 --weight 64 64 3 3 --padding 1 --operation kfac_expand --tune"
    command = [sys.executable, "-c", code, "bench", *big.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 130 and done.stderr == "python -m tnconv: interrupted\n", done


INTERRUPTED_AT = """
import os, signal, sys
class Finder:
    def find_spec(name, path=None, target=None):
        if name == os.environ["INTERRUPTED_AT"]:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder)
"""
AS_INSTALLED = "import sys; from tnconv.__main__ import run; sys.exit(run())"


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("module", "installed"),
    [("torch", False), ("torch", True), ("torch.nn", False), ("tnconv.cli", True)],
)
def test_an_interrupted_import_is_one_line(module, installed, tmp_path):
    """The signal comes while a module is looked for, so at one place, not after some time."""
    site, script = tmp_path / "site", tmp_path / "bin" / "tnconv"
    for folder in (site, script.parent):
        folder.mkdir()
    (site / "sitecustomize.py").write_text(INTERRUPTED_AT)
    script.write_text(AS_INSTALLED)
    paths = os.pathsep.join(map(str, (site, Path(__file__).resolve().parents[1])))
    environment = {**os.environ, "PYTHONPATH": paths, "INTERRUPTED_AT": module}
    command = [sys.executable, *([str(script)] if installed else ["-m", "tnconv"]), "cache"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 130 and done.stderr == "python -m tnconv: interrupted\n", done


def test_interruption_is_one_line(capsys, monkeypatch):
    def stop(given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tnconv.cli._cache", stop)
    assert main(["cache"]) == 130
    assert capsys.readouterr().err == "python -m tnconv: interrupted\n"


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"tnconv {tnconv.__version__}\n"


def test_wide_text_is_wrapped_on_terminals(monkeypatch):
    text = "  " + "word " * 50
    assert fitted_to_terminal(text) == text
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    lines = fitted_to_terminal(text).splitlines()
    assert max(map(len, lines)) <= 60 and lines[1].startswith("      word")


def test_other_packages_keep_their_interruptions(tmp_path: Path) -> None:
    package = tmp_path / "other"
    package.mkdir()
    text = "import sys, tnconv\nprint(sys.excepthook is sys.__excepthook__)\n"
    (package / "__init__.py").write_text(text)
    (package / "__main__.py").touch()
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "other"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.stdout == "True\n", done.stderr
