"""Approximate Hessian diagonals by a recursion over the autograd graph."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from tnconv.losses.diagonals import Method
from tnconv.quantities.base import Quantity, Statistic
from tnconv.recursions import check_method


@dataclass(frozen=True)
class HesScale(Quantity[Tensor]):
    """``s ≈ ∂²L / ∂θ²`` in the parameter's shape, or with ``per_sample`` ``(n, *parameter)``.

    See `tnconv.hesscale` for the recursion and its ``method``; models of any topology, as there.
    With ``per_sample`` parameters must belong to layers with diagrams, and samples must not see
    each other. No statistic is made of layers: the graph itself is walked (`tnconv.models.walks`).

    >>> import tnconv
    >>> from torch import nn, rand, randint
    >>> model, x, y = nn.Linear(3, 4), rand(8, 3), randint(4, (8,))
    >>> whole, each = HesScale(), HesScale("gn", per_sample=True)
    >>> result = tnconv.compute(model, nn.CrossEntropyLoss(), x, y, [whole, each])
    >>> result[whole]["weight"].shape, result[each]["weight"].shape
    (torch.Size([4, 3]), torch.Size([8, 4, 3]))

    Raises:
        ValueError: a method that there is not.
    """

    method: Method = "hesscale"
    per_sample: bool = False

    @property
    def apart(self) -> bool:  # type: ignore[override]
        """Only then."""
        return self.per_sample

    def __post_init__(self) -> None:
        check_method(self.method)

    def statistics(self) -> Mapping[str, Statistic]:
        return {}

    def result(self, found: Mapping[str, Tensor], samples: int) -> Tensor:
        return found["diagonal"]
