"""The benchmarks' cases and contestants, never their times."""

import json

import pytest
import torch

from benchmarks import cases, contestants, layers, report
from benchmarks.cases import Layer
from benchmarks.contestants import OPERATIONS, PEERS, TOLERANCE

TINY = {
    "general": Layer("tiny", ("a",), 3, 4, (3, 2), (1, 1), (1, 0), (1, 1), 1, (3, 6, 5), (4, 6, 4)),
    "strided": Layer("tiny", ("b",), 2, 3, (3, 3), (2, 2), (1, 1), (1, 1), 1, (2, 8, 7), (3, 4, 4)),
    "pointwise": Layer(
        "tiny", ("c",), 4, 3, (1, 1), (1, 1), (0, 0), (1, 1), 1, (4, 5, 5), (3, 5, 5)
    ),
    "patch": Layer("tiny", ("d",), 3, 4, (2, 2), (2, 2), (0, 0), (1, 1), 1, (3, 6, 6), (4, 3, 3)),
    "grouped": Layer("tiny", ("e",), 4, 6, (3, 3), (1, 1), (1, 1), (1, 1), 2, (4, 5, 5), (6, 5, 5)),
    "depthwise": Layer(
        "tiny", ("f",), 4, 4, (3, 3), (1, 1), (1, 1), (1, 1), 4, (4, 5, 5), (4, 5, 5)
    ),
}


def test_layers_are_those_of_the_nine_networks():
    layers = cases.layers()
    assert len(layers) == len(set(layers)) == 130
    assert sum(len(layer.layers) for layer in layers) == 329
    assert len({layer.network for layer in layers}) == 9


@pytest.mark.parametrize("layer", [*cases.layers(), *TINY.values()], ids=lambda layer: layer.name)
def test_output_shape_is_torchs(layer):
    x = torch.empty(1, *layer.input_shape, device="meta")
    weight = torch.empty(layer.weight_shape, device="meta")
    result = torch.nn.functional.conv2d(
        x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups
    )
    assert result.shape == (1, *layer.output_shape)
    assert layer.batch in (1, 2, 4, 8, 16, 32)


def test_quick_has_every_kind_of_every_network_once():
    strata = [(layer.network, layer.kind) for layer in cases.quick()]
    assert len(strata) == len(set(strata))
    assert set(strata) == {(layer.network, layer.kind) for layer in cases.layers()}
    assert {kind for _, kind in strata} == set(TINY)


@pytest.mark.parametrize("kind", TINY)
def test_kinds(kind):
    assert TINY[kind].kind == kind


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("name", ["tnconv", *PEERS])
def test_contestants_agree(name, kind, operation):
    makers = contestants.contestants(operation)
    if name not in makers:
        pytest.skip(f"{name} does not take part")
    case = contestants.case(TINY[kind], batch=2)
    result = makers[name](operation, case)()
    assert contestants.error(result, makers["torch"](operation, case)()) <= TOLERANCE


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("kind", TINY)
def test_torch_agrees_with_the_definition(kind, operation):
    case = contestants.case(TINY[kind], batch=2)
    network = contestants.network(operation, case)
    expected = network.reference(**{name: getattr(case, name) for name in network.operands})
    result = contestants.contestants(operation)["torch"](operation, case)()
    assert contestants.error(result, expected) <= TOLERANCE


def test_what_disagrees_is_an_error():
    assert contestants.error(torch.ones(2), torch.ones(2, 1)) == float("inf")
    assert contestants.error(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 2.0])) == 0.5


def test_the_table_of_simplification_has_a_row_for_every_layer():
    from benchmarks import simplification

    layers = [TINY["general"], TINY["patch"]]
    text = simplification.table(layers)
    lines = text.splitlines()
    assert "| patch | 1 | forward |" in text and "injective_view 2" in text
    assert sum(line.startswith("| tiny ") for line in lines) == 2
    (reduced,) = [line for line in lines if line.startswith("| general | 1 | kfac_reduce")]
    assert "free 4" in reduced and float(reduced.split("|")[4]) > 1
    deep = simplification.three_dimensional(layers[0])
    assert simplification.OPERATIONS["forward"](deep, 2).shape == (2, *deep.output_shape)


def test_an_interrupted_run_goes_on_with_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(cases, "layers", lambda: (TINY["general"], TINY["patch"]))
    file = tmp_path / "run.json"
    options = layers.parser().parse_args(["--json", str(file), "--seconds", "0", "--batch", "2"])
    options.operation = ["forward"]
    first = next(layers.rows(options))
    layers._write(options, [first])
    found = layers.resumed(options)
    assert found == [first]
    rest = list(layers.rows(options, {(row.operation, row.layer) for row in found}))
    assert [row.layer for row in rest] == [TINY["patch"].name]
    report.main([str(file)])
    assert "| forward | torch | 1 |" in file.with_suffix(".md").read_text()
    options.batch = 4
    with pytest.raises(SystemExit, match="batch = 2, this run 4"):
        layers.resumed(options)
    assert len(json.loads(file.read_text())["rows"]) == 1
