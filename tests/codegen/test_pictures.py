"""Programs are drawn as trees of steps, and say in a line what they are."""

import re

import pytest
from hypothesis import given, settings

from tests.strategies import networks, shipped
from tnconv import compile
from tnconv.codegen.programs.program import Program
from tnconv.diagrams import conv, kfac_reduce, linear, with_bias
from tnconv.simplify import simplify

NET = kfac_reduce((8, 3, 16, 16), 4, stride=4)


@settings(max_examples=20)
@given(network=networks() | shipped(max_dims=1))
def test_every_step_and_operand_is_drawn(network):
    program = compile(network)
    source = program.draw().graph.source
    for at, step in enumerate(program.steps, 1):
        assert f"t{at}: {step.kernel.kind}" in source and f"{step.kernel.flops:,} flop" in source
    edges = re.findall(r"^\t(\S+) -- (\S+)", source, re.M)
    drawn = {name for edge in edges for name in edge}
    assert all(f"t{at}" in drawn for at in range(1, len(program.steps) + 1))
    assert all(earlier != later for earlier, later in edges)


def test_words_of_programs_networks_and_simplifications(tmp_path):
    program = compile(NET)
    assert repr(program).startswith("<Program of x (8, 3, 16, 16): 4 steps")
    assert program._repr_mimebundle_()["text/plain"] == repr(program)
    assert repr(linear((8, 3), (4, 3))) == "<[n, d] = Σ_{c} x[n, c] · weight[d, c]>"
    assert "\n + bias[d]" in repr(with_bias(linear((8, 3), (4, 3))))
    result = simplify(NET)
    assert repr(result).startswith("<Simplified by 5 rules to [0, (c k1 k2),")
    assert "injective_view at" in result._repr_mimebundle_()["text/plain"]
    assert result.draw(tmp_path / "steps.dot").read_text().count("subgraph") == 6
    assert program.draw(tmp_path / "program.dot").read_text() == program.draw().graph.source


def test_what_cannot_be_drawn():
    program = compile(NET)
    chunked: Program = compile(conv((64, 8, 32), (8, 8, 3)).vjp("weight"), memory_limit=40_000)
    if chunked.chunks:
        with pytest.raises(ValueError, match="runs in chunks; draw its parts"):
            chunked.draw()
        assert "in chunks" in repr(chunked)
    with pytest.raises(ValueError, match="cannot draw the steps of 2 networks"):
        simplify(with_bias(linear((8, 3), (4, 3)))).draw("steps.svg")
    with pytest.raises(ValueError, match="theme is 'blue'"):
        program.draw(theme="blue")
