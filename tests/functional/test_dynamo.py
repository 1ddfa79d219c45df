"""Importing the library is light, and torch.compile knows its functions whenever it is imported."""

import subprocess
import sys

import pytest

from benchmarks.import_time import cumulative

HEAVY = ("torch._dynamo", "torch._inductor", "sympy", "networkx", "graphviz", "cotengra", "rich")
LIGHT = f"""
import sys
import tnconv
assert set(tnconv.__all__) <= set(dir(tnconv))
assert "tnconv.optim" not in sys.modules and "tnconv.models" not in sys.modules
for name in tnconv.__all__:
    assert getattr(tnconv, name) is getattr(tnconv, name)
assert not (loaded := [name for name in {HEAVY} if name in sys.modules]), loaded
"""
COMPILED = """
import torch, tnconv
x, w = torch.rand(2, 3, 9), torch.rand(4, 3, 3)
expected = tnconv.functional.conv(x, w, padding=1)
compiled = torch.compile(tnconv.functional.conv, fullgraph=True, backend="eager")
assert torch.allclose(compiled(x, w, padding=1), expected)
assert not any("tnconv" in type(finder).__module__ for finder in sys.meta_path)

layer = tnconv.nn.TensorDropoutConv1d(3, 4, 3, keep=0.5, generator=torch.Generator())
graphs = torch._dynamo.explain(layer)(x).graphs
assert all("rand" not in str(each.graph) for each in graphs)  # draws are made outside the graph
"""


@pytest.mark.parametrize("before", [LIGHT, "import sys, torch._dynamo"], ids=["after", "before"])
def test_dynamo_is_told_when_it_is_imported(before):
    subprocess.run([sys.executable, "-c", before + COMPILED], check=True)


def test_import_times_are_read_from_pythons_report():
    """Of a package with all that it imports: its last line, not that of a module inside of it."""
    report = "\n".join(
        f"import time: {own:9} | {whole:10} | {name}"
        for own, whole, name in ((90, 90, "  torch.nn"), (10, 4000, "torch"), (1, 5000, "tnconv"))
    )
    assert cumulative(report, "torch") == 0.004 and cumulative(report, "tnconv") == 0.005
