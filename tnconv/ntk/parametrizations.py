"""Tangent kernels of other parametrisations: the layers' kernels, rescaled.

With ``W = a w`` for a constant a the function stays and ``∂f/∂w = a ∂f/∂W``, so the kernel in w is
``a²`` times that in W, layer by layer; learning rates per layer act the same way. Sources: Jacot,
Gabriel & Hongler 2018 for the NTK parametrisation, Mei, Montanari & Nguyen 2018 for mean field.
"""

from collections.abc import Mapping
from math import prod
from typing import Literal, get_args

from torch import nn

from tnconv.models.layers import layout
from tnconv.models.modules import unwrapped

Parametrization = Literal["standard", "ntk", "mean-field"]


def parametrization_scales(
    model: nn.Module, parametrization: Parametrization, output_layer: str | None = None
) -> dict[str, float]:
    """The factor of each parameter's kernel, by name; biases and other parameters have 1.

    ``"ntk"`` writes ``W = w / √fan_in`` with ``fan_in = C_in/g · K`` for every linear and
    convolutional layer, ``"mean-field"`` the same but for the output layer, whose ``W`` is
    ``w / fan_in``. The output layer is the last of them in the model's order by default. A weight
    that several layers share has the factor of the first.

    >>> parametrization_scales(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.ReLU()), "ntk")
    {'0.weight': 0.05555555555555555, '0.bias': 1.0}

    Raises:
        ValueError: an unknown word, or an output layer that has no weight.
    """
    if parametrization not in get_args(Parametrization):
        words = ", ".join(get_args(Parametrization))
        raise ValueError(f"parametrization is {parametrization!r}; expected one of {words}")
    model = unwrapped(model)
    found = {name: 1.0 for name, _ in model.named_parameters()}
    if parametrization == "standard":
        return found
    fans = _fans(model)
    last = output_layer if output_layer is not None else next(reversed(fans), None)
    if last is not None and last not in fans:
        raise ValueError(f"output_layer is {last!r}; expected one of {', '.join(fans)}")
    for name, fan in fans.items():
        mean_field = parametrization == "mean-field" and name == last
        key = f"{name}.weight" if name else "weight"
        if key in found:
            found[key] = 1 / fan**2 if mean_field else 1 / fan
    return found


def scales_of(
    model: nn.Module, scales: Parametrization | Mapping[str, float] | None
) -> Mapping[str, float]:
    """Factors by name, from a word or given.

    Raises:
        ValueError: names that are not among the parameters.
    """
    if scales is None:
        return {}
    if isinstance(scales, str):
        return parametrization_scales(model, scales)
    names = {name for name, _ in unwrapped(model).named_parameters()}
    if foreign := sorted(set(scales) - names):
        raise ValueError(f"scales has {', '.join(foreign)}; expected names of parameters")
    return scales


def _fans(model: nn.Module) -> dict[str, int]:
    """How many products each output of a linear or convolutional layer sums up."""
    fans = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or (found := layout(module, "weight")) is None:
            continue
        groups, inputs_first = found
        shape = weight.shape
        inputs = shape[0] // groups if inputs_first else shape[1]
        fans[name] = int(inputs * prod(shape[2:]))
    return fans
