import itertools
import json
import math
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tnconv.codegen.kernels.launching import KERNELS_ON
from tnconv.codegen.prices import calibration, store, timing
from tnconv.codegen.prices.calibration import Residual, calibrate, coefficients, residuals
from tnconv.codegen.prices.fitting import WITHIN, fitted, visible
from tnconv.codegen.prices.kinds import Probe, every_coefficient
from tnconv.codegen.prices.shipped import shipped
from tnconv.codegen.prices.tables import ACCELERATOR, SHIPPED, Table

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SHOWN = {one.name: one for one in every_coefficient() if visible(SHIPPED, one)}
NAMES = list(SHOWN)
HIDDEN = 4  # coefficients of products that others can hide


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(store.VARIABLE, str(tmp_path))
    monkeypatch.setattr(calibration, "_here", {})
    store._warn.cache_clear()
    calibration._known.cache_clear()
    yield tmp_path
    calibration._known.cache_clear()


def times(table: Table, **changed: float) -> dict[str, float]:
    """What each probe takes on a device for which a table is true."""
    return {name: one.probe.seconds(table) for name, one in SHOWN.items()} | changed


def pretended(monkeypatch: pytest.MonkeyPatch, seconds: Mapping[str, float]) -> None:
    """Probes are not run, but take these times."""
    monkeypatch.setattr(calibration, "measured", lambda probes, device, dtype: dict(seconds))


def scaled(factor: float, *names: str) -> Table:
    return SHIPPED.changed({name: factor * SHIPPED.value(name) for name in names})


TRUTH = scaled(0.7, "Product.gemm", "Calls.bandwidth", "Copy.row")


def stored(folder: Path) -> list[Path]:
    return list((folder / calibration.KIND).glob("*.json"))


@pytest.mark.parametrize("factor", [0.4, 3.0])
@pytest.mark.parametrize("one", [None, *NAMES])
def test_coefficients_are_found_from_times(one: str | None, factor: float) -> None:
    """Where times are prices by other coefficients, these come out: each probe shows its own.

    A few may be hidden by others, such as slow dot products that GEMM does faster.
    """
    truth = scaled(factor, *([one] if one else NAMES))
    measured = {name: SHOWN[name].probe.seconds(truth) for name in NAMES}
    found, refused = fitted(SHIPPED, measured)
    assert not refused
    for name, one_of in SHOWN.items():
        seconds = one_of.probe.seconds
        assert seconds(found) == pytest.approx(seconds(truth), rel=1e-3), name
    close = [found.value(name) == pytest.approx(truth.value(name), rel=2e-3) for name in NAMES]
    assert sum(close) >= len(NAMES) - HIDDEN


names = st.sampled_from(NAMES)


@settings(max_examples=15)
@given(
    failed=st.sets(names, max_size=4),
    seconds=st.sampled_from([math.inf, math.nan, 0.0]),
    wrong=st.dictionaries(names, st.sampled_from([1e-9, 1e3]), max_size=2),
)
def test_probes_that_fail_or_miss_are_refused(
    failed: set[str], seconds: float, wrong: dict[str, float]
) -> None:
    """What is refused has its shipped value, and the rest is found as without it."""
    measured = {name: SHOWN[name].probe.seconds(SHIPPED) for name in NAMES}
    measured |= {name: measured[name] * factor for name, factor in wrong.items()}
    measured |= dict.fromkeys(failed, seconds)
    found, refused = fitted(SHIPPED, measured)
    assert failed <= refused.keys()
    for name in refused:
        assert found.value(name) == SHIPPED.value(name)
    for name, one in SHOWN.items():
        low, high = one.bounds
        assert low <= found.value(name) <= high
        if name not in refused:
            assert 0.5 <= one.probe.seconds(found) / measured[name] <= 2
    if not wrong:
        assert refused.keys() == failed
        assert found == SHIPPED


@settings(max_examples=20)
@given(factors=st.dictionaries(names, st.floats(1e-6, 1e6), min_size=1, max_size=4))
def test_no_coefficient_is_fitted_far_from_where_it_starts(factors: dict[str, float]) -> None:
    """Whatever the probes take: what they do not determine stays a price of large kernels, too."""
    measured = times(SHIPPED)
    found, refused = fitted(SHIPPED, {n: t * factors.get(n, 1.0) for n, t in measured.items()})
    for name in NAMES:
        ratio = found.value(name) / SHIPPED.value(name)
        assert 1 / WITHIN <= ratio * (1 + 1e-9) and ratio <= WITHIN * (1 + 1e-9), name
        assert name not in refused or ratio == 1


@pytest.mark.parametrize(("threads", "least"), [(1, False), (2, True)])
def test_several_threads_are_timed_by_their_least_sample(threads: int, least: bool) -> None:
    """Other processes only add to the wall's clock; one thread's own does not count them."""
    count = itertools.count()

    def call() -> None:  # every third time is undisturbed
        (time.sleep if threads > 1 else _work)(1e-3 if next(count) % 3 == 0 else 4e-3)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        probe = Probe(lambda random: call, lambda table: 1.0)
        taken = calibration.measured({"probe": probe}, CPU, torch.float32)["probe"]
    finally:
        torch.set_num_threads(before)
    assert (taken < 3e-3) is least


def _work(seconds: float) -> None:
    """Use this thread's own time."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_a_device_is_measured_and_remembered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretended(monkeypatch, times(TRUTH))
    assert coefficients(CPU) == shipped(CPU, torch.float32, torch.get_num_threads())
    assert not stored(folder)
    found = calibrate()
    assert len(stored(folder)) == 1
    assert all(found.value(name) == pytest.approx(TRUTH.value(name), rel=0.1) for name in NAMES)
    for _ in range(2):
        assert coefficients(CPU) == found, "read back with those that no probe tells, too"
        calibration._known.cache_clear()
    doubles = coefficients(CPU, torch.float64)
    assert doubles.value("Product.gemm") == found.value("Product.gemm"), "float32 serves all"


def test_every_probe_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under whatever load: a warning names what it made useless, and then nothing is stored."""
    monkeypatch.setattr(calibration, "BUDGET", 0.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = calibrate()
    refused = [str(one.message) for one in caught if "is refused" in str(one.message)]
    assert not [message for message in refused if "it failed" in message]
    assert len(stored(folder)) == (0 if refused else 1)
    assert coefficients(CPU) == found


def test_residuals_are_those_of_all_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "seconds_of", lambda calls, device, budget, of: [1.0])
    found = {one.name: one for one in residuals(CPU)}
    assert found.keys() > {one.name for one in every_coefficient()}
    gemm = SHOWN["Product.gemm"].probe.seconds(coefficients(CPU))
    assert found["Product.gemm"] == Residual("Product.gemm", 1.0, gemm)
    assert found["Gram, check 1"].predicted > 0


@pytest.mark.parametrize("seconds", [math.inf, 1e3])
def test_nothing_is_stored_if_a_probe_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """A graph that is captured, or a device that is full, once stored 1000 times the price."""
    pretended(monkeypatch, times(TRUTH, **{"Reduction.outer": seconds}))
    with pytest.warns(RuntimeWarning, match=r"probe 'Reduction\.outer' is refused"):
        found = calibrate()
    assert found.value("Reduction.outer") == SHIPPED.value("Reduction.outer")
    assert found.value("Product.gemm") == pytest.approx(0.7 * SHIPPED.value("Product.gemm"), 0.1)
    assert not stored(folder)
    assert coefficients(CPU) == found, "used in this process"
    calibration._here.clear()
    calibration._known.cache_clear()
    assert coefficients(CPU) == shipped(CPU, torch.float32, torch.get_num_threads())


def test_calls_that_fail_take_infinitely_long(monkeypatch: pytest.MonkeyPatch) -> None:
    def synchronize(device: torch.device) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(timing, "synchronize", synchronize)
    assert timing.seconds_of([lambda: None], CPU, 0.0) == [math.inf]


CIRCUMSTANCES: dict[str, Any] = {
    "threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "precision": lambda: torch.set_float32_matmul_precision("medium"),
    "deterministic": lambda: torch.use_deterministic_algorithms(True),
}


@pytest.mark.parametrize("name", CIRCUMSTANCES)
def test_tables_belong_to_circumstances(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    pretended(monkeypatch, times(TRUTH))
    calibrate()
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    keys = [calibration._key(CPU, torch.float32)]
    try:
        CIRCUMSTANCES[name]()
        keys.append(calibration._key(CPU, torch.float32))
        elsewhere = coefficients(CPU)
        assert elsewhere == shipped(CPU, torch.float32, torch.get_num_threads())
    finally:
        torch.set_num_threads(before[0])
        torch.set_float32_matmul_precision(before[1])
        torch.use_deterministic_algorithms(False)
    assert keys[0] != keys[1]
    calibrated = coefficients(CPU).value("Product.gemm")
    assert calibrated not in (elsewhere.value("Product.gemm"), SHIPPED.value("Product.gemm"))


def test_keys_say_what_times_depend_on() -> None:
    key = calibration._key(CPU, torch.bfloat16)
    assert key["device"] and key["torch"] == torch.__version__
    assert key["threads"] == torch.get_num_threads() and key["dtype"] == "torch.bfloat16"
    assert {"cublas", "cudnn", "deterministic"} <= set(key["precision"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"Calls.launch": 1.0}', '{"Calls.launch": "fast"}', "out of bounds"]
)
def test_files_of_something_else_are_ignored(
    folder: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    pretended(monkeypatch, times(SHIPPED))
    calibrate()
    (file,) = stored(folder)
    entry = json.loads(file.read_text())
    if text == "out of bounds":
        text = json.dumps(entry["value"] | {"Calls.launch": 3600.0})
    file.write_text(f'{{"key": {json.dumps(entry["key"])}, "value": {text}}}')
    calibration._known.cache_clear()
    with pytest.warns(RuntimeWarning, match="is ignored"):
        assert coefficients(CPU) == shipped(CPU, torch.float32, torch.get_num_threads())


def test_other_devices_are_measured_on_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """No accelerator is at hand here: the processor under another name."""
    asked: list[Any] = []
    monkeypatch.setattr(calibration, "calibrate", lambda *how: asked.append(how) or SHIPPED)
    monkeypatch.setattr(store, "circumstances", lambda device: {"device": str(device)})
    for _ in range(2):
        coefficients(GPU)
        coefficients(GPU, torch.complex64)
        coefficients(GPU, torch.float16)
    coefficients(torch.device("meta"))
    assert asked == [(GPU, torch.float32), (GPU, torch.float16)]


def test_captures_of_graphs_are_not_disturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be measured then: assumed prices are used, with a warning."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(store, "circumstances", lambda device: {"device": str(device)})
    with pytest.warns(RuntimeWarning, match="CUDA graph is captured"):
        table = coefficients(GPU)
    own = GPU.type in KERNELS_ON  # where Triton is installed
    assert table == shipped(GPU, torch.float32, 1)
    assert table.machine == replace(ACCELERATOR, own_kernels=own)
    with pytest.raises(RuntimeError, match="before a capture"):
        calibrate(GPU)
    values = {one.name: table.value(one.name) for one in every_coefficient()}
    store.save(calibration.KIND, calibration._key(GPU, torch.float32), values)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert coefficients(GPU).value("Product.gemm") == table.value("Product.gemm")
    assert coefficients(CPU) == shipped(CPU, torch.float32, torch.get_num_threads())
