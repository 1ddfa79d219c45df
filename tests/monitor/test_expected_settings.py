"""Settings that are wrong are refused by name, before any work."""

import inspect
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tnconv.monitor import Monitor
from tnconv.monitor.expected_settings import SETTINGS
from tnconv.monitor.sinks import TensorBoard

CHECKED_ELSEWHERE = {"model", "loss_fn", "quantities", "reduction", "process_group"}
FLAGS = {"batch_statistics_as_constants"}
ANYTHING = st.one_of(
    st.integers(-3, 3), st.floats(-2, 2), st.text(max_size=3), st.booleans(), st.binary(max_size=2),
    st.sampled_from([object(), torch.zeros(2), nn.ReLU(), TensorBoard, [TensorBoard], ["x"], [3]]),
)  # fmt: skip
ALLOWED: dict[str, Any] = {
    "every": (1, 7, lambda step: True),
    "sinks": ((), [print], (lambda scalars, step: None,)),
    "optimizer": (torch.optim.Adam([torch.zeros(1)]),),
    "scaler": (torch.amp.GradScaler("cpu"),),
    "samples": (1, 8),
    "curvature": ("gn", "diag_h"),
    "products": (1, 3),
    "alerts": ((), [print]),
    "batch_dim": (0, 1),
    "seed": (0, -1),
    "budget": (0.05, 1),
}


def test_every_setting_is_checked() -> None:
    """A new setting fails here until it is listed."""
    names = {*inspect.signature(Monitor).parameters}
    assert names == {*SETTINGS} | CHECKED_ELSEWHERE | FLAGS


@given(st.sampled_from(sorted(SETTINGS)), ANYTHING)
def test_what_is_wrong_is_named(name: str, value: Any) -> None:
    """Anything at all is taken or refused by the setting's name, in one line."""
    expected = SETTINGS[name]
    allowed = expected.kind(value) and expected.value(value)
    if name == "folder" and allowed:
        return
    how = {name: value}
    if allowed:
        Monitor(nn.Linear(2, 2), nn.MSELoss(), **how)
        return
    with pytest.raises((TypeError, ValueError), match=rf"^{name} is .*; expected ") as caught:
        Monitor(nn.Linear(2, 2), nn.MSELoss(), **how)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "values"), ALLOWED.items())
def test_what_is_right_is_taken(name: str, values: Any) -> None:
    for value in values:
        Monitor(nn.Linear(2, 2), nn.MSELoss(), **{name: value})


def test_arguments_in_the_wrong_order() -> None:
    """A loss is a module, too, but has no parameters."""
    with pytest.raises(ValueError, match="model is a MSELoss without parameters"):
        Monitor(nn.MSELoss(), nn.Linear(2, 2))
