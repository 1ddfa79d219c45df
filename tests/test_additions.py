"""What an addition must have is asked for by name; the trials of ``docs/additions.md`` work."""

import ast
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tnconv
from tests import strategies
from tests.models.test_layers import LAYERS
from tests.strategies import assert_close, operands_for
from tnconv import compile, diagrams, functional, quantities
from tnconv.codegen.programs import source
from tnconv.codegen.programs.source import Definition, Function
from tnconv.codegen.programs.styles import STYLES
from tnconv.diagrams import Sum, TensorNetwork, View
from tnconv.models import layers
from tnconv.quantities import Quantity, Statistic

ROOT = Path(__file__).resolve().parents[1]


def test_every_diagram_is_in_the_zoo() -> None:
    """Rules, forms, routes and programs are tested on what `ZOO` and `SUMS` are made of."""
    tree = ast.parse(inspect.getsource(strategies))
    named = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for name in diagrams.__all__:
        made = getattr(diagrams, name)
        if inspect.isfunction(made) and _is_network(made.__annotations__.get("return")):
            assert name in named, f"{name} is in no entry of ZOO or SUMS in tests/strategies.py"


def _is_network(returned: object) -> bool:
    return any(kind.__name__ in str(returned) for kind in (TensorNetwork, Sum))


ELSEWHERE = {"_embedding": "test_embedding", "_bilinear": "tests/models/test_descriptions.py"}
"""Layers that take no tensor of numbers, or two, and their tests."""


def test_every_described_layer_has_a_row() -> None:
    tested = set(ELSEWHERE)
    for make, _ in LAYERS.values():
        found = layers._registered(make())
        assert found is not None
        tested.add(found.description.__name__)
    for kind, registered in layers._LAYERS.items():
        own = registered.description.__module__ == "tnconv.models.known_layers"
        if own and not isinstance(kind, str):
            name = registered.description.__name__
            assert name in tested, f"{kind.__name__} has no row in LAYERS of test_layers.py"


def test_every_quantity_has_a_row_in_the_readme_and_a_test() -> None:
    readme = (ROOT / "README.md").read_text()
    files = (ROOT / "tests" / "loops.py", *(ROOT / "tests" / "models").glob("*.py"))
    tests = "\n".join(path.read_text() for path in files)
    for name in quantities.__all__:
        kind = getattr(quantities, name)
        if inspect.isclass(kind) and issubclass(kind, Quantity) and not inspect.isabstract(kind):
            assert re.search(rf"\b{name}\b", readme), f"{name} is not in README.md"
            assert re.search(rf"\b{name}\b", tests), f"{name} has no test"


def test_functions_of_many_arguments_explain_them_in_the_same_words() -> None:
    """One vocabulary: an argument of one name and type means the same everywhere."""
    words: dict[tuple[str, object], str] = {}
    for name in functional.__all__:
        parameters = inspect.signature(getattr(functional, name)).parameters
        explained = dict(
            re.findall(r"^    (\w+): (.+)$", inspect.getdoc(getattr(functional, name)) or "", re.M)
        )
        for each in parameters.values() if len(parameters) > 3 else ():
            assert each.name in explained, f"{name} does not explain {each.name}"
            kind = each.name, str(each.annotation)
            assert words.setdefault(kind, explained[each.name]) == explained[each.name], name


def test_every_trial_is_written_up() -> None:
    """Its heading, and files that exist."""
    text = (ROOT / "docs" / "additions.md").read_text()
    for kind in ("diagram", "rule", "route", "printer", "layer", "quantity"):
        assert re.search(rf"^\| \*\*{kind}", text, re.MULTILINE | re.IGNORECASE), kind
    for path in re.findall(r"`((?:tests|docs|tnconv|diagrams|simplify|codegen)/[\w/.]+)`", text):
        assert (ROOT / path).exists(), path


def row_means(shape: tuple[int, int]) -> TensorNetwork:
    """``m[i] = 1/J Σ_j x[i, j]``."""
    sizes = dict(zip("ij", shape, strict=True))
    x = diagrams.Tensor("x", View.of(sizes, "i", "j"))
    return TensorNetwork((x,), View.of(sizes, "i"), sizes, Fraction(1, shape[1]))


def test_a_diagram() -> None:
    network = row_means((3, 4))
    (x,) = operands_for(network).values()
    assert_close(compile(network)(x=x), x.mean(1), 1e-12)


def numbered(definition: Definition) -> list[Function]:
    """Torch's words, with the number of steps in front."""
    *others, last = source.printed(definition)
    text = f"# {len(definition.schedule.steps)} steps\n{last.text}"
    return [*others, replace(last, text=text)]


def test_a_printer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STYLES, "numbered", numbered)  # type: ignore[arg-type]
    network = diagrams.kfac_reduce((4, 2, 7), 3)
    program = replace(compile(network), style="numbered")
    operands = operands_for(network)
    assert f"# {len(program.steps)} steps\ndef contraction(x):" in program.source
    assert_close(program(**operands), network.reference(**operands), 1e-10)


class Gated(nn.Module):
    """Two inputs, and one parameter for each of their columns."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return x * gate * self.weight


def gated(shape: tuple[int, int]) -> dict[str, TensorNetwork]:
    """``y[n, d] = x[n, d] gate[n, d] w[d]``."""
    sizes = dict(zip("nd", shape, strict=True))
    both = [diagrams.Tensor(name, View.of(sizes, "n", "d")) for name in ("x", "gate")]
    weight = diagrams.Tensor("weight", View.of(sizes, "d"))
    return {"weight": TensorNetwork((*both, weight), View.of(sizes, "n", "d"), sizes)}


class TwoGates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gated, self.last = Gated(), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.gated(x, x.sigmoid()))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class LargestNorm(Quantity[Tensor]):
    """``max_n Σ_θ g[n, θ]²``."""

    def statistics(self) -> Mapping[str, Statistic]:
        return {"norms": Statistic(diagrams.gradient_norms, samples=0)}

    def result(self, found: Mapping[str, Tensor], samples: int) -> Tensor:
        return found["norms"].max()


@pytest.mark.usefixtures("float64")
def test_a_layer_of_two_inputs_and_a_quantity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither knows the other."""
    monkeypatch.setattr(layers, "_LAYERS", dict(layers._LAYERS))

    @tnconv.models.register_layer(Gated)
    def describe(layer: Gated, x: Tensor, gate: Tensor, output_shape: object) -> object:
        shape = tuple(x.shape)
        return tnconv.models.Operation(gated, (shape,)), {"x": x, "gate": gate}

    model, x, y = TwoGates(), torch.randn(5, 3), torch.randn(5, 2)
    found = tnconv.compute(model, nn.MSELoss(), x, y, [LargestNorm()])[LargestNorm]
    norms = []
    for n in range(5):
        model.zero_grad()
        (nn.MSELoss()(model(x[n : n + 1]), y[n : n + 1]) / 5).backward()
        norms.append([p.grad.square().sum() for p in model.parameters() if p.grad is not None])
    expected = torch.stack([torch.stack(row) for row in norms]).amax(0)
    for value, other in zip(found.values(), expected, strict=True):
        assert_close(value, other, 1e-10)
    layers._NEAREST.clear()
