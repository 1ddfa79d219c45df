"""What a computation found, by quantity and by parameter."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

from tnconv.displays import described, html_table, text_table
from tnconv.models.modules import unwrapped
from tnconv.quantities.base import Quantity

R = TypeVar("R")


@dataclass(frozen=True, repr=False)
class Result:
    """``result[quantity][name]`` is a quantity of the parameter that the model calls ``name``.

    A quantity's class stands for the one quantity of that class. Parameters that are frozen, or
    that no gradient reached, are left out. ``samples`` is the number of samples, ``loss`` what the
    loss function returned (None where the loop was the user's own).
    """

    values: Mapping[Quantity[Any], Mapping[str, Any]]
    samples: int
    loss: Tensor | None = None

    @overload
    def __getitem__(self, quantity: Quantity[R]) -> Mapping[str, R]: ...
    @overload
    def __getitem__(self, quantity: type[Quantity[R]]) -> Mapping[str, R]: ...
    def __getitem__(self, quantity: Quantity[R] | type[Quantity[R]]) -> Mapping[str, R]:
        """The values of a quantity by parameter name.

        Raises:
            KeyError: a quantity that was not computed, or a class of which there are several.
        """
        found = [each for each in self.values if quantity in (each, type(each))]
        if len(found) != 1:
            asked = quantity.__name__ if isinstance(quantity, type) else repr(quantity)
            known = ", ".join(map(repr, self.values)) or "none"
            raise KeyError(f"{len(found)} quantities are {asked}; expected one of {known}")
        return self.values[found[0]]

    def __repr__(self) -> str:
        """A table of parameters, their quantities and shapes."""
        return f"{self._title}\n{text_table(self._rows())}" if self.values else self._title

    def _repr_html_(self) -> str:
        return html_table(self._title, self._rows())

    @property
    def _title(self) -> str:
        kinds = ", ".join(type(each).__name__ for each in self.values) or "nothing"
        return f"Result of {self.samples} samples: {kinds}"

    def _rows(self) -> Iterator[tuple[str, ...]]:
        yield ("parameter", *(type(each).__name__ for each in self.values))
        for name in dict.fromkeys(name for found in self.values.values() for name in found):
            shapes = (
                described(found[name]) if name in found else "" for found in self.values.values()
            )
            yield (name, *shapes)

    def __iter__(self) -> Iterator[Quantity[Any]]:
        return iter(self.values)

    def of(self, name: str) -> dict[Quantity[Any], Any]:
        """All quantities of one parameter."""
        return {quantity: found[name] for quantity, found in self.values.items() if name in found}

    def write(self, model: nn.Module, names: Mapping[Any, str]) -> None:
        """Set attributes of the model's parameters: the name given to each quantity, or its class.

        >>> from tnconv import compute
        >>> from tnconv.quantities import Variance
        >>> model = nn.Linear(3, 2)
        >>> result = compute(model, nn.MSELoss(), torch.rand(8, 3), torch.rand(8, 2), [Variance()])
        >>> result.write(model, {Variance: "variance"})
        >>> model.weight.variance.shape
        torch.Size([2, 3])

        Raises:
            KeyError: as ``result[quantity]``.
            ValueError: a name that parameters use already, for something else than a result.
        """
        for name in names.values():
            if hasattr(nn.Parameter, name):
                raise ValueError(f"{name!r} is an attribute of all parameters; name another")
        parameters = dict(unwrapped(model).named_parameters())
        for quantity, attribute in names.items():
            for name, value in self[quantity].items():
                setattr(parameters[name], attribute, value)

    def total(self, quantity: Quantity[Tensor] | type[Quantity[Tensor]]) -> Tensor:
        """The sum over all parameters of a quantity with one shape, such as squared norms.

        Raises:
            KeyError: as ``result[quantity]``.
        """
        return torch.stack(list(self[quantity].values())).sum(0)
