"""The benchmarks' cases and contestants, never their times."""

import importlib
import json
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import pairwise
from math import isnan
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import all as everything
from benchmarks import bars, cases, contestants, further, layers, measure, overhead, report
from benchmarks.cases import Layer
from benchmarks.contestants import OPERATIONS, PEERS, TOLERANCE
from tnconv import functional
from tnconv.codegen.tiers import cache_info

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
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

FURTHER = {
    "sides": cases._own("tiny", "g", (2, 7, 6), 3, (2, 3), 2, ((1, 0), (0, 2))),
    "signal": cases._own("tiny", "h", (4, 20), 6, 3, 2, 1, 2, 2),
    "video": cases._own("tiny", "i", (2, 4, 5, 5), 3, 3, (1, 2, 2), 1),
    "transposed": cases._own("tiny", "j", (4, 5, 4), 6, 3, 2, 1, groups=2, output_padding=1),
    "transposed signal": cases._own("tiny", "k", (4, 9), 2, 4, 2, 1, output_padding=0),
}
TINY_AND_FURTHER = TINY | FURTHER


def test_layers_are_those_of_the_nine_networks():
    layers = cases.layers()
    assert len(layers) == len(set(layers)) == 130
    assert sum(len(layer.layers) for layer in layers) == 329
    assert len({layer.network for layer in layers}) == 9


def test_every_case_has_a_name_of_its_own():
    names = [layer.name for layer in cases.layers() + cases.own()]
    assert len(set(names)) == len(names) == 150


@pytest.mark.parametrize(
    "layer",
    [*cases.layers(), *cases.own(), *TINY_AND_FURTHER.values()],
    ids=lambda layer: layer.name,
)
def test_output_shape_is_torchs(layer):
    shapes = (1, *layer.input_shape), layer.weight_shape, (1, *layer.output_shape)
    case = contestants.Case(layer, *(torch.empty(shape, device="meta") for shape in shapes))
    result = contestants._forward(case.padded())
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


@contextmanager
def peers():
    """Where torch has no unfold, unfoldNd takes its place, which is an extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        pytest.skip(f"{error.name} is not installed")


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("kind", TINY_AND_FURTHER)
@pytest.mark.parametrize("name", ["tnconv", *PEERS])
def test_contestants_agree(name, kind, operation):
    makers = contestants.contestants(operation)
    if name not in makers:
        pytest.skip(f"{name} does not take part")
    case = contestants.case(TINY_AND_FURTHER[kind], batch=2)
    with peers():
        expected = makers["torch"](operation, case)()
    try:
        with peers():
            result = makers[name](operation, case)()
    except NotImplementedError:
        assert case.layer.transposed and name in ("einconv", "opacus")
    else:
        assert contestants.error(result, expected) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("kind", TINY_AND_FURTHER)
def test_torch_agrees_with_the_definition(kind, operation):
    case = contestants.case(TINY_AND_FURTHER[kind], batch=2)
    network = contestants.network(operation, case)
    expected = network.reference(**{name: getattr(case, name) for name in network.operands})
    with peers():
        result = contestants.contestants(operation)["torch"](operation, case)()
    assert contestants.error(result, expected) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("operation", further.WAYS)
@pytest.mark.parametrize("kind", TINY)
def test_further_operations_agree_with_torch(kind, operation):
    case = contestants.case(TINY[kind], batch=4)
    if operation == "sampled_input_vjp" and case.layer.groups > 1:
        pytest.skip("torch has no such part of its kernels")
    with peers():
        pair = further.WAYS[operation](case)
        expected = pair.torch()
    assert contestants.error(pair.ours(), expected) <= TOLERANCE[torch.float32]


def test_further_operations_are_all_others():
    names = {operation.partition(",")[0] for operation in further.WAYS}
    main = {"forward" if name == "conv" else name for name in functional.__all__} & {*OPERATIONS}
    assert names | main >= {*functional.__all__} - {"conv"}
    operation = "input_jacobian"
    layer = next(layer for layer in cases.layers() if layer.network == "alexnet")
    options = layers.parser().parse_args(["--seconds", "0"])
    row = layers.row(operation, contestants.case(layer, 1), options)
    assert not row.median and "entries" in row.not_timed["torch"]


def test_tuned_programs_agree(tmp_path, monkeypatch):
    monkeypatch.setenv("TNCONV_CACHE_DIR", str(tmp_path))
    case = contestants.case(TINY["general"], batch=2)
    expected = contestants.contestants("kfac_expand")["torch"]("kfac_expand", case)()
    assert (
        contestants.error(contestants.tuned("kfac_expand", case)(), expected)
        <= TOLERANCE[torch.float32]
    )


def test_what_cannot_take_part_is_reported():
    pytest.importorskip("einconv")
    case = contestants.case(FURTHER["transposed"], batch=2)
    options = layers.parser().parse_args(["--seconds", "0", "--self-check"])
    row = layers.row("forward", case, options)
    assert row.median.keys() == {"tnconv", "torch", "tnconv again", "torch again"}
    assert "no transposed" in row.not_timed["einconv"]
    assert layers.others([row], "forward") == ["torch", "tnconv again", "torch again"]


def test_every_second_round_is_the_reverse_of_the_one_before():
    ticks, order = iter(range(10**6)), []

    def call(name, ticks_taken=50):
        def run():
            order.append(name)
            for _ in range(ticks_taken):
                next(ticks)

        return run

    calls = {"a": call("a"), "b": call("b"), "c": call("c"), "slow": call("slow", 500)}
    timings = measure.interleaved(calls, 2000, clock=lambda: float(next(ticks)))
    assert len(timings["slow"].samples) == measure.FEW
    rounds = len(timings["a"].samples)
    assert rounds >= measure.FEWEST
    near = order[-3 * rounds :]
    turns = [near[at : at + 3] for at in range(0, len(near), 3)]
    assert all(two == one[::-1] for one, two in zip(turns[::2], turns[1::2], strict=False))
    assert len(set(map(tuple, turns))) > 2


def test_what_is_close_to_the_first_call_is_repeated_as_often():
    now = [0.0]

    def call(seconds):
        def run():
            now[0] += seconds

        return run

    calls = {"a": call(9e-4), "b": call(3e-4), "slow": call(1e-2), "once": call(0.6)}
    timings = measure.interleaved(calls, 0.1, clock=lambda: now[0])
    assert [timings[name].repetitions for name in calls] == [7, 7, 1, 1]
    assert [len(timings[name].samples) for name in ("slow", "once")] == [measure.FEW, 1]


@given(st.randoms(use_true_random=False), st.booleans())
def test_rounds_go_on_until_ratios_are_settled(random, noisy):
    now = [0.0]

    def call(longer):
        def run():
            now[0] += 0.025 * longer()

        return run

    calls = {"a": call(lambda: 1), "b": call(lambda: random.choice((1, 2)) if noisy else 2)}
    timings = [*measure.interleaved(calls, 1.0, clock=lambda: now[0]).values()]
    rounds = len(timings[0].samples)
    assert rounds >= measure.FEWEST if noisy else rounds == measure.FEWEST
    assert measure.settled(timings) or now[0] > measure.LONGEST


@given(st.lists(st.floats(1.0, 2.0), min_size=15, max_size=60), st.floats(0.1, 10.0))
def test_what_slows_whole_rounds_down_leaves_ratios_settled(rounds, ratio):
    timings = [measure.Timing(1, [each * of for each in rounds]) for of in (1.0, ratio)]
    assert measure.settled(timings)
    halves = [1.0 + at % 2 for at in range(len(rounds))]
    spread = measure.Timing(1, [each * half for each, half in zip(rounds, halves, strict=True)])
    assert not measure.settled([timings[0], timings[1], spread])


def test_what_disagrees_is_an_error():
    assert contestants.error(torch.ones(2), torch.ones(2, 1)) == float("inf")
    assert contestants.error(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 2.0])) == 0.5


def test_bars_pick_their_layers_and_contestants():
    def row(operation, layer, **values):
        found = layers.Row(operation, layer.name, layer.kind, "", 1, 8, "", "", 0.0, 0.0)
        return replace(found, **values)

    by_kind = {layer.kind: layer for layer in cases.layers()}
    times = {"tnconv": 2.0, "tnconv tuned": 1.0, "vmap": 8.0, "grouped": 3.0, "torch again": 0.5}
    gradients = row("per_sample_weight_grad", by_kind["general"], median=times)
    found = {(bar.name, bar.peer): bar.ratio(gradients) for bar in bars.BARS}
    assert found["per-sample gradients", "vmap"] == 4.0
    assert found["per-sample gradients", "unfold"] is None
    assert found["per-sample gradients", bars.BEST] == 1.5
    assert found["per-sample gradients, tuned", bars.BEST] == 3.0
    assert found["forward", "torch"] is None
    memory = {"tnconv": 1, "torch": 4}
    both = [
        row("kfac_expand", by_kind["strided"], memory=memory, median=memory),
        row("kfac_expand", by_kind["pointwise"], memory=memory, median=memory),
    ]
    text = "\n".join(bars.lines(both))
    assert "| peak memory of both factors, larger than 1x1 | torch | 1 | ≤ 0.4 | 0.25 |" in text
    assert "| KFAC-expand, 1x1 | torch | 1 | ≥ 1.5 | 4.00 |" in text and "ungrouped" not in text


def test_overhead_has_a_row_for_every_operation(tmp_path):
    called = [overhead.calls(operation, 0.0) for operation in OPERATIONS]
    compiled = list(overhead.compiles([TINY["patch"]], 1))
    assert cache_info().currsize == 0
    file = tmp_path / "overhead.json"
    rows = [asdict(row) for row in compiled]
    longest = [asdict(overhead.Long("a chain", 0.5, 1.0)), asdict(overhead.Long("b", 3.0, 2.0))]
    saved = {"calls": [asdict(row) for row in called], "long": longest}
    measure.write_results(file, "cpu", rows, clock="", **saved)
    report.main([str(file)])
    text = file.with_suffix(".md").read_text().splitlines()
    for operation in OPERATIONS:
        assert sum(line.startswith(f"| {operation} |") for line in text) == 2
    assert {"| a chain | 0.50 | ≤ 1 |", "| b | **3.00** | ≤ 2 |"} <= {*text}


def test_chains_are_products_of_matrices():
    network = overhead.chain(5)
    operands = {name: torch.randn(shape) for name, shape in network.operands.items()}
    expected = torch.linalg.multi_dot(list(operands.values()))
    torch.testing.assert_close(network.reference(**operands).float(), expected)


@pytest.mark.parametrize("name", [*everything.RUNS, *everything.ON_GPU])
def test_all_results_have_commands_that_parse(name):
    (_, _, module, *arguments), render = everything.commands(name)
    own = {everything.LAYERS: layers, everything.OVERHEAD: overhead}[module]
    assert own.parser().parse_args(arguments).json.name == render[-1].rpartition("/")[-1]


def test_new_sizes_are_timed_for_every_kind(monkeypatch):
    from benchmarks import new_sizes

    monkeypatch.setitem(new_sizes.SIZES, "batch", range(2, 4))
    monkeypatch.setattr(new_sizes, "IMAGE", 8)
    taken = new_sizes.timed("batch")
    assert taken.keys() == set(new_sizes.KINDS)
    assert all(len(times["new"]) == len(times["warm"]) == 2 for times in taken.values())


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
    options = layers.parser().parse_args(
        ["--json", str(file), "--seconds", "0", "--batch", "2", "--cases", "cnn"]
    )
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


def test_the_root_free_study_tunes_all_optimizers_alike():
    from benchmarks import root_free

    assert root_free.GRIDS.keys() == root_free.OPTIMIZERS.keys()
    for grid in root_free.GRIDS.values():
        ratios = [b / a for a, b in pairwise(grid)]
        assert len(grid) == 6 and all(2.9 < ratio < 3.5 for ratio in ratios)
    tuning = [(0.1, 90.0, 0.4), (0.3, 95.0, 0.3), (1.0, 95.0, 0.2), (3.0, 0.0, float("nan"))]
    assert root_free.best(tuning) == 1.0


def test_the_root_free_study_keeps_its_parts_apart():
    pytest.importorskip("sklearn")
    from benchmarks import root_free

    found = root_free.data()
    assert {name: len(labels) for name, (_, labels) in found.items()} == root_free.PARTS
    images = {part: {x.numpy().tobytes() for x in found[part][0]} for part in found}
    assert not images["train"] & images["test"] and not images["validation"] & images["test"]
    drawn = root_free.batches(3)
    epoch = [x for _, (x, _) in zip(range(9), drawn, strict=False)]
    seen = {image.numpy().tobytes() for x in epoch for image in x}
    assert {len(x) for x in epoch} == {root_free.BATCH}
    assert seen <= images["train"] and len(seen) == 9 * root_free.BATCH


def test_the_root_free_study_runs_in_small(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    from benchmarks import root_free

    for name, rate in (("SGD", 0.1), ("RMSprop", 1e30), ("RF-RMSProp", 1e-3), ("AdamW", 1e-2)):
        monkeypatch.setitem(root_free.GRIDS, name, (rate,))
    file = tmp_path / "found.json"
    command = ["--epochs", "1", "--json", str(file), "--only"]
    root_free.main([*command, "attention SGD,attention AdamW", "--seeds", "2"])
    root_free.main([*command, "convolutions SGD,convolutions RMS,ons RF-RMS", "--seeds", "2"])
    rows = {(row["network"], row["optimizer"]): row for row in json.loads(file.read_text())["rows"]}
    assert len(rows) == 5
    broken, twin = rows["convolutions", "RMSprop"], rows["convolutions", "RF-RMSProp"]
    assert broken["test accuracy"]["seeds"] == [0.0, 0.0]
    assert isnan(broken["train loss"]["deviation"])
    assert twin["over its twin"]["seeds"] == twin["test accuracy"]["seeds"]
    adamw, sgd = rows["attention", "AdamW"], rows["attention", "SGD"]
    pairs = zip(*(row["test accuracy"]["seeds"] for row in (adamw, sgd)), strict=True)
    assert adamw["over SGD"]["seeds"] == pytest.approx([a - b for a, b in pairs], abs=1e-3)
    assert "over SGD" not in sgd and sgd["lr"] == 0.1


@pytest.mark.parametrize("name", ["root_free", "inverse_free"])
def test_committed_studies_of_optimizers_are_drawn(name, tmp_path):
    pytest.importorskip("matplotlib")
    module = importlib.import_module(f"benchmarks.{name}")
    files = sorted(RESULTS.glob(f"{name.replace('_', '-')}*.json"))
    assert files
    for file in files:
        picture = tmp_path / "picture.png"
        module.plot(measure.read_rows(file), picture)
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert file.with_suffix(".png").exists()
        picture.unlink()


def test_everything_of_a_device_runs_in_small(tmp_path):
    from benchmarks.device.__main__ import SECTIONS, main

    names = [name for name in SECTIONS if name not in ("facts", "network times")]
    chosen = [argument for name in names for argument in ("--section", name)]
    assert (
        main(["--tiny", "--device", "cpu", "--out", str(tmp_path), "--seconds", "60", *chosen]) == 0
    )
    found = json.loads((tmp_path / "device.json").read_text())
    assert list(found) == names
