import json
from collections.abc import Iterator
from dataclasses import fields, replace
from math import isfinite
from pathlib import Path

import pytest
import torch

from tnconv.codegen.prices import calibration, cost, store, timing
from tnconv.codegen.prices.calibration import PROBES, calibrate, coefficients
from tnconv.codegen.prices.cost import SHIPPED

CPU = torch.device("cpu")
NAMES = [name for name, *_ in PROBES]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(store.VARIABLE, str(tmp_path))
    store._warn.cache_clear()
    calibration._known.cache_clear()
    yield tmp_path
    calibration._known.cache_clear()


@pytest.mark.parametrize("factor", [0.4, 1.0, 3.0])
@pytest.mark.parametrize("one", [None, *NAMES])
def test_coefficients_are_found_from_times(
    monkeypatch: pytest.MonkeyPatch, one: str | None, factor: float
) -> None:
    """Where times are prices by other coefficients, these come out: each probe shows its own.

    That is, unless its price hangs on another one, as for fast writing of slow products.
    """
    chosen = {name: factor * getattr(SHIPPED, name) for name in ([one] if one else NAMES)}
    truth, prices = replace(SHIPPED, **chosen), iter(PROBES)

    def seconds_of(*_: object) -> list[float]:
        with cost.using(truth):
            return [next(prices)[2]().seconds]

    monkeypatch.setattr(timing, "seconds_of", seconds_of)
    found = calibration.measured(CPU)
    shown = 0
    for name, _, price in PROBES:
        value = getattr(truth, name)
        times = []
        for table in (truth, found, replace(truth, **{name: 1.1 * value})):
            with cost.using(table):
                times.append(price().seconds)
        assert times[1] == pytest.approx(times[0], rel=1e-3)
        if times[2] != times[0]:
            assert getattr(found, name) == pytest.approx(value, rel=1e-3)
            shown += 1
    assert shown >= len(PROBES) - 2


def test_a_device_is_measured_and_remembered(folder: Path) -> None:
    assert coefficients(CPU) == SHIPPED
    assert not list(folder.iterdir())
    found = calibrate()
    assert all(isfinite(getattr(found, field.name)) for field in fields(found))
    assert coefficients(CPU) == found
    calibration._known.cache_clear()
    assert coefficients(CPU) == found


@pytest.mark.parametrize("text", ["[]", "{", '{"launch": 1.0}', '{"launch": "fast"}'])
def test_files_of_something_else_are_ignored(folder: Path, text: str) -> None:
    calibrate()
    (file,) = (folder / calibration.KIND).iterdir()
    entry = json.loads(file.read_text())
    file.write_text(f'{{"key": {json.dumps(entry["key"])}, "value": {text}}}')
    calibration._known.cache_clear()
    with pytest.warns(RuntimeWarning, match="is ignored"):
        assert coefficients(CPU) == SHIPPED


def test_other_devices_are_measured_on_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """No accelerator is at hand here: the processor under another name."""
    asked = []
    monkeypatch.setattr(calibration, "calibrate", lambda device: asked.append(device) or SHIPPED)
    monkeypatch.setattr(store, "circumstances", lambda device: {"device": str(device)})
    for _ in range(2):
        coefficients(torch.device("cuda", 0))
    coefficients(torch.device("meta"))
    assert asked == [torch.device("cuda", 0)]
