"""Long lines of programs are broken as black breaks them, and mean the same."""

import ast

import black
import pytest
from hypothesis import given

from tests.strategies import networks, shipped
from tnconv import compile
from tnconv.codegen.programs.layout import WIDTH, laid_out

MODE = black.Mode(line_length=WIDTH)


@pytest.mark.parametrize("style", ["torch", "einsum"])
@given(network=networks(selections=True) | shipped(max_dims=2))
def test_programs_keep_their_meaning(style, network):
    program = compile(network, style=style)
    laid = program.source
    assert ast.dump(ast.parse(laid)) == ast.dump(ast.parse(program.text))
    assert max(map(len, laid.splitlines())) <= WIDTH
    assert laid_out(laid) == laid


LINES = [
    't1 = torch.einsum("' + 40 * "a" + "," + 40 * "b" + "->" + 10 * "c" + '", first, second)',
    f"t1 = {'x' * 60} * {'y' * 20} + {'z' * 40}  # a comment, (with brackets]",
    f"t1 = x.unfold(2, 8, 8).permute({', '.join(map(str, range(20)))}).reshape(1, 2, 3, 4, 5, 6)",
    f"return torch.cat([{', '.join(f'first_of_{i}' for i in range(12))}], dim=1)",
    f"return {', '.join(f'a_result_of_some_length_{i}' for i in range(6))}",
    f"t1 = one.convolution_backward({', '.join(f'operand_{i}' for i in range(12))})[1]",
]


@pytest.mark.parametrize("line", LINES)
def test_lines_break_as_black_breaks_them(line):
    text = f"def contraction(x):\n    {line}\n"
    assert laid_out(text) == black.format_str(text, mode=MODE)
