"""Saved modules: formatted, readable, and run with torch alone."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given

from tests.strategies import SUMS, ZOO, Case, networks, operands_for
from tnconv import Program, compile
from tnconv.codegen import ROUTES
from tnconv.codegen.programs.source import WIDTH
from tnconv.diagrams import (
    Expression,
    TensorNetwork,
    conv,
    ggn_diagonal,
    gradient_sum,
    kfac_expand,
    kfac_reduce,
)

CASE = Case((3, 4, 7, 6), (6, 2, 3, 2), (2, 1), ((1, 0), (2, 1)), (1, 2), 2)
LAYER = conv((4, 6, 12, 12), (8, 6, 3, 3), padding=1)
WIDE = conv((32, 96, 6, 6), (128, 96, 3, 3), padding=1)
FACTOR = kfac_expand((4, 6, 12, 12), 3, padding=1)


def cases() -> dict[str, Program]:
    """Every shipped diagram, every route, chunks, several networks, loops and selections."""
    found = {name: compile(diagram(CASE)) for name, diagram in (ZOO | SUMS).items()}
    found |= {f"by_{route.split()[0]}": compile(FACTOR, routes=[route]) for route in ROUTES}
    limited = {"placed": [LAYER], "added": [FACTOR], "in_chunks": [LAYER, FACTOR]}
    for name, network in limited.items():
        with pytest.raises(ValueError, match="the least that would do") as caught:
            compile(network, memory_limit=1)
        found[name] = compile(network, memory_limit=int(str(caught.value).split()[-2]))
    found["several"] = compile([LAYER, LAYER.vjp("weight"), FACTOR])
    found["loops"] = compile([gradient_sum(WIDE), ggn_diagonal(WIDE)])
    found["sampled"] = compile(LAYER.vjp("weight").sampled("c", 2).sampled("o2", 5))
    found["constants"] = compile(kfac_reduce((4, 2, 9, 9), 3, stride=2), routes=["dense"])
    return found


def operands_of(program: Program) -> dict[str, torch.Tensor]:
    return {n: x for net in program.networks for n, x in operands_for(net).items()}


@pytest.fixture(scope="module")
def programs() -> dict[str, Program]:
    return cases()


@pytest.fixture(scope="module")
def folder(programs: dict[str, Program], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    for name, program in programs.items():
        program.save(path / f"saved_{name}.py")
    return path


def ruff(*arguments: str) -> None:
    beside = Path(sys.executable).with_name("ruff")
    command = str(beside) if beside.exists() else shutil.which("ruff")
    if command is None:
        pytest.skip("ruff is not installed")
    options = ["--isolated", "--no-cache", "--line-length", str(WIDTH)]
    done = subprocess.run([command, *arguments, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_kind_is_there(programs: dict[str, Program]) -> None:
    texts = {name: program.source for name, program in programs.items()}
    for name in ("placed", "added", "in_chunks"):
        assert "piece_1" in texts[name]
    assert "for part_1" in texts["loops"] and "index_select" in texts["sampled"]
    assert "kept(" in texts["constants"]


def test_formatters_leave_them_alone(folder: Path) -> None:
    ruff("format", "--check", str(folder))


def test_linters_find_nothing(folder: Path) -> None:
    ruff("check", "--select", "E,F,W,I,UP,C4,SIM,PIE", str(folder))


def test_they_tell_equation_shapes_and_what_steps_do(folder: Path) -> None:
    text = (folder / "saved_weight_vjp.py").read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(text))
    assert docstring is not None
    assert "[(g d), c, k1, k2] = Σ_{n, i1, o1, i2, o2}" in docstring
    assert "x: (3, 4, 7, 6)\ngrad_output: (3, 6, 3, 7)" in docstring
    assert "sum over n, o1, o2" in text
    for path in folder.iterdir():
        text = path.read_text(encoding="utf-8")
        assert "tnconv" not in text and max(map(len, text.splitlines())) <= WIDTH


def test_they_run_with_torch_alone(programs: dict[str, Program], folder: Path) -> None:
    values = {}
    for name, program in programs.items():
        operands = operands_of(program)
        given = [operands[operand] for operand in program.operands]
        values[name] = given, program.run(*given)
    torch.save(values, folder / "values.pt")
    code = (
        "import sys\n"
        "class Blocker:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.split('.')[0] in ('tnconv', 'cotengra', 'opt_einsum', 'networkx'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Blocker())\n"
        f"sys.path.insert(0, {str(folder)!r})\n"
        "import importlib, torch\n"
        "torch.set_default_dtype(torch.float64)\n"
        f"for name, (given, expected) in torch.load({str(folder / 'values.pt')!r}).items():\n"
        "    module = importlib.import_module(f'saved_{name}')\n"
        "    torch.testing.assert_close(module.contraction(*given), expected)\n"
        "    print(name)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == list(programs)


@given(network=networks(max_nodes=5, selections=True))
def test_equations_of_any_network_keep_within_the_width(network: TensorNetwork) -> None:
    check_docstring(network)


def test_names_that_end_docstrings(tmp_path: Path) -> None:
    from tnconv.diagrams import Tensor, View

    node = Tensor('quotes """ and \\ here', View.of({"a": 2}, "a"))
    network = TensorNetwork((node,), View.of({"a": 2}, "a"), {"a": 2})
    path = compile(network).save(tmp_path / "saved.py")
    assert node.name in (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "")


def check_docstring(network: Expression) -> None:
    from tnconv.codegen.programs.source import documented

    text = documented([str(network)], "")
    docstring = ast.get_docstring(ast.parse(text))
    assert docstring is not None and docstring.split() == str(network).split()
    assert max(map(len, text.splitlines())) <= WIDTH
