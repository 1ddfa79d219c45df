import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tnconv.codegen.prices.accelerator_scales import MOST, SCALES, scaled
from tnconv.codegen.prices.kinds import every_coefficient
from tnconv.codegen.prices.shipped import shipped
from tnconv.codegen.prices.tables import Table

H100 = shipped(torch.device("cuda", 0), torch.float32, 1)
ratios = st.fixed_dictionaries(dict.fromkeys(SCALES, st.sampled_from([0.3, 0.8, 1.0, 3.0])))


def device(by: dict[str, float]) -> Table:
    """One that takes so many times as long as an H100 for each kind of kernel."""
    table = H100
    for name, ratio in by.items():
        table = SCALES[name].applied(table, ratio)
    return table


def times(table: Table) -> dict[str, float]:
    return {name: scale.probe.seconds(table) for name, scale in SCALES.items()}


@settings(max_examples=8)
@given(ratios)
def test_prices_of_probes_become_their_times(by: dict[str, float]) -> None:
    truth = times(device(by))
    found, refused = scaled(H100, truth)
    assert not refused
    assert times(found) == pytest.approx(truth, rel=0.02)


def test_the_measured_device_keeps_its_table() -> None:
    found, refused = scaled(H100, times(H100))
    assert not refused
    for one in every_coefficient():
        assert found.value(one.name) == pytest.approx(H100.value(one.name)), one.name


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("factor", [math.inf, 0.0, 5 * MOST])
def test_times_that_no_device_takes_are_refused(name: str, factor: float) -> None:
    taken = times(H100)
    taken[name] *= factor
    found, refused = scaled(H100, taken)
    assert list(refused) == [name]
    assert all(found.value(each) == H100.value(each) for each in SCALES[name].names)


def test_coefficients_belong_to_one_scale() -> None:
    names = [name for scale in SCALES.values() for name in scale.names]
    assert len(names) == len(set(names))
    assert set(names) <= {one.name for one in every_coefficient()}
