"""Whole networks: watching a model, and quantities of every parameter."""

from tnconv.models import known_layers  # noqa: F401  (registers them)
from tnconv.models.computing import compute, observe
from tnconv.models.layers import Operation, register_layer
from tnconv.models.observation import Observation
from tnconv.models.result import Result

__all__ = [
    "Observation",
    "Operation",
    "Result",
    "compute",
    "observe",
    "register_layer",
]
