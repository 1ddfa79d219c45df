"""The picture of a program: its steps as a contraction tree, with kernels, flops and bytes."""

import html
from typing import Any

import graphviz

from tnconv.codegen.lowering.strided import LIKE, ONE
from tnconv.codegen.programs.names import Names, argument_names
from tnconv.codegen.programs.program import Program
from tnconv.diagrams.drawing import Picture
from tnconv.diagrams.look import Style


def picture(program: Program[Any], style: Style) -> Picture:
    """Operands, steps and results; a step tells its kernel, its shape, flops and bytes.

    Raises:
        ValueError: the program runs in chunks.
    """
    if program.chunks:
        raise ValueError(
            "the program runs in chunks; draw its parts: program.chunks[0].parts[0].draw()"
        )
    graph = graphviz.Graph(graph_attr=style.graph, node_attr=style.node, edge_attr=style.edge)
    arguments = argument_names(program.operands)
    names = Names.of(list(arguments.values()), program.steps)
    for operand, argument in arguments.items():
        shape = " × ".join(map(str, program.operands[operand]))
        marked = style.marked if operand in style.highlight else {}
        graph.node(f"operand_{argument}", _label(operand, shape), **style.tensor | marked)
    made = {step.value: names.text(step.value) for step in program.steps}
    for step in program.steps:
        name, kernel = names.text(step.value), step.kernel
        costs = f"{kernel.flops:,} flop, {kernel.bytes:,} B"
        shape = " × ".join(map(str, step.shape)) or "scalar"
        marked = style.marked if name in style.highlight else {}
        graph.node(
            name, _label(f"{name}: {kernel.kind}", shape, costs), **style.pattern | _BOX | marked
        )
        for array in dict.fromkeys(step.value.reads):
            if array not in (LIKE, ONE):
                graph.edge(made.get(array) or f"operand_{names.text(array)}", name)
    for at, output in enumerate(program.schedule.outputs):
        label = "result" if len(program.schedule.outputs) == 1 else f"result {at}"
        graph.node(f"result{at}", label, **style.loose)
        origin = output.origin
        if origin not in (LIKE, ONE):
            graph.edge(made.get(origin) or f"operand_{names.text(origin)}", f"result{at}")
    return Picture(graph, repr(program), style.dpi)


_BOX = {"shape": "box", "margin": "0.08,0.05"}


def _label(title: str, *lines: str) -> str:
    small = "".join(f'<BR/><FONT POINT-SIZE="8">{html.escape(line)}</FONT>' for line in lines)
    return f"<{html.escape(title)}{small}>"
