"""Plans do not depend on what operands are called; names are given when programs are printed."""

import ast
import copy
import gc
import keyword
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.strategies import assert_close, networks, operands_for, shipped
from tnconv import codegen, compile
from tnconv.codegen.lowering import strided
from tnconv.codegen.lowering.strided import operand
from tnconv.codegen.programs.names import argument_names
from tnconv.diagrams import TensorNetwork, conv, gradient_norms, kfac_expand, linear

pytestmark = pytest.mark.usefixtures("double_precision")

NAMES = (
    *("reshape", "permute", "conv", "é", "e\u0301", "ﬁ", "fi", "self", "network", "like", "one"),
    *("t1", "u1", "part_1", "piece_1", "operand_1", "lambda", "None", "", "a b", "0", "operand 1"),
    *("x", "weight", "index", "torch", "F", "pattern", "gram", "totals", "kept", "contraction"),
)


@settings(max_examples=300)
@given(
    network=networks(selections=True) | shipped(max_dims=2),
    names=st.permutations(NAMES),
)
def test_plans_and_values_are_those_of_any_other_names(
    network: TensorNetwork, names: list[str]
) -> None:
    renaming = dict(zip(network.operands, names, strict=False))
    program, other = compile(network), compile(network.rename_operands(renaming))
    assert other.terms == program.terms
    assert other.has_native_kernels == program.has_native_kernels
    given = operands_for(network)
    expected = program(**given)
    renamed = {renaming[name]: array for name, array in given.items()}
    assert_close(other(**renamed), expected, 0.0)
    assert_close(other.run(*(renamed[name] for name in other.operands)), expected, 0.0)


@pytest.mark.parametrize("names", [("reshape", "permute"), ("mT", "unfold"), ("conv", "like")])
def test_what_torch_does_is_recognised_by_what_is_done(names: tuple[str, str]) -> None:
    layer = conv((8, 3, 32, 32), (16, 3, 3, 3), padding=1)
    renamed = layer.rename_operands(dict(zip(layer.operands, names, strict=True)))
    (plan, *_), (other, *_) = compile(layer).terms[0], compile(renamed).terms[0]
    assert plan == other and plan.is_torchs and not plan.unfolds
    products = linear((8, 3), (4, 3)).rename_operands({"x": "conv"})
    assert not compile(products).has_native_kernels
    windows = kfac_expand((8, 16, 12, 12), 3, padding=1).rename_operands({"x": names[0]})
    assert any(plan.unfolds for plan in compile(windows, routes=["window"]).terms[0])


@given(st.lists(st.sampled_from(NAMES) | st.text(max_size=3), unique=True, max_size=6))
def test_arguments_are_variables_each_its_own(names: list[str]) -> None:
    arguments = argument_names(names)
    assert [*arguments] == names
    (function,) = ast.parse(f"def f({', '.join(arguments.values())}): pass").body
    assert isinstance(function, ast.FunctionDef)
    parsed = [each.arg for each in function.args.args]
    assert len({*parsed}) == len(names) and not any(map(keyword.iskeyword, parsed))
    assert all(
        argument in (name, f"operand_{at}") for at, (name, argument) in enumerate(arguments.items())
    )


def test_equal_expressions_are_one() -> None:
    x, y = operand(0, (4, 6)), operand(0, [4, 6])
    assert x is y and x is not operand(1, (4, 6))
    assert x.mT is y.permute((1, 0)) and x.mT.mT is x
    assert x.free_reshape((2, 2, 6)) is y.free_reshape((4, 3, 2)).free_reshape((2, 2, 6))  # type: ignore[union-attr]
    assert x.unfold(1, 3, 2).origin is x and copy.deepcopy(x.mT) is x.mT


@pytest.mark.parametrize("network", [conv((2, 3, 9), (4, 3, 3)), kfac_expand((2, 3, 9), 3)])
def test_plans_are_the_same_after_pickling(network: TensorNetwork) -> None:
    program = compile(network)
    again = pickle.loads(pickle.dumps(program))
    assert again.terms == program.terms and again.source == program.source
    assert again.explain() == program.explain()


def test_nothing_keeps_expressions_that_no_program_needs() -> None:
    network = gradient_norms(conv((3, 5, 17), (7, 5, 3), stride=2))
    compile(network)
    gc.collect()
    before = len(strided._known)
    compile(network.rename_operands({"x": "y"}))
    compile(replace(network, scale=network.scale * 3))
    gc.collect()
    assert len(strided._known) <= before


def test_no_code_is_parsed() -> None:
    """Text is printed last: nothing that has been printed is looked into."""
    for path in sorted(Path(codegen.__path__[0]).resolve().rglob("*.py")):
        tree = ast.parse(path.read_text())
        imported = {
            name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in (getattr(node, "module", None), *(alias.name for alias in node.names))
        }
        assert not imported & {"re", "ast", "tokenize", "dis"}, f"{path.name} parses text"
        assert not [*_read_texts(tree)], f"{path.name} looks into code"


def _read_texts(tree: ast.AST) -> Any:
    """Where a ``code``, ``text`` or ``source`` is searched."""
    searches = {"startswith", "endswith", "find", "index", "split", "count", "replace", "partition"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In | ast.NotIn):
            yield from (x for x in node.comparators if _is_text(x))
        if isinstance(node, ast.Attribute) and node.attr in searches and _is_text(node.value):
            yield node


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr in ("code", "text", "source", "call")


def test_the_test_for_parsing_sees_it() -> None:
    code = "any('.unfold(' in step.code for step in steps) or plan.text.startswith('conv')"
    assert len([*_read_texts(ast.parse(code))]) == 2
