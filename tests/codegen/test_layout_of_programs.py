"""Long lines of programs are broken as black breaks them, and mean the same."""

import ast

import black
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import networks, shipped
from tnconv import compile
from tnconv.codegen import ROUTES
from tnconv.codegen.programs.layout import WIDTH, laid_out
from tnconv.codegen.programs.styles import STYLES

MODE = black.Mode(line_length=WIDTH)


@pytest.mark.parametrize("style", STYLES)
@given(
    network=networks(selections=True) | shipped(max_dims=2),
    routes=st.sampled_from((tuple(ROUTES), ("loop", "native"))),
)
def test_programs_keep_their_meaning(style, network, routes):
    """Loops among them, whose comprehensions have commas that separate nothing."""
    program = compile(network, style=style, routes=routes)
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
    f"del {', '.join(f't{i}' for i in range(40))}",
    f"t1 = torch.cat([{', '.join(f'an_operand_{i}' for i in range(12))}])",
    "t1 = torch.cat([u1.reshape(1, 2) for part_1, part_2 in zip(x.split(1), grad_output.split(1)) "
    f"for u1 in [torch.mm({', '.join(f'operand_{i}' for i in range(12))})[1]]])",
]


@pytest.mark.parametrize("line", LINES)
def test_lines_break_as_black_breaks_them(line):
    text = f"def contraction(x):\n    {line}\n"
    assert laid_out(text) == black.format_str(text, mode=MODE)
