"""What the legs of a layer are to one of its parameters, and the two halves of its gradients."""

from dataclasses import dataclass

from tnconv.diagrams.affine import Leg, Tensor, View
from tnconv.diagrams.network import TensorNetwork


@dataclass(frozen=True)
class Roles:
    """What each leg of a layer is to one of its parameters; legs in the parameter's order.

    ``groups`` g are in the parameter, the result and x: blocks that see nothing of each other.
    ``outputs`` d are in the parameter and the result, ``patch`` a in the parameter alone, and
    ``positions`` o in the result alone, beside the batch.

    Args:
        groups: g.
        outputs: d.
        patch: a.
        positions: o.
    """

    groups: tuple[Leg, ...]
    outputs: tuple[Leg, ...]
    patch: tuple[Leg, ...]
    positions: tuple[Leg, ...]

    @property
    def alone(self) -> bool:
        """Whether the parameter is a bias, whose patches are nothing but a 1."""
        return not (self.groups or self.patch)

    @classmethod
    def of(cls, layer: TensorNetwork, operand: str = "weight") -> "Roles":
        """The roles of a layer's legs.

        >>> from tnconv.diagrams import conv
        >>> Roles.of(conv((8, 4, 32), (6, 2, 3), groups=2))
        Roles(groups=('g',), outputs=('d',), patch=('c', 'k1'), positions=('o1',))

        Raises:
            ValueError: a layer without the operand.
        """
        own = list(dict.fromkeys(_parameter(layer, operand).legs))
        result = layer.result.legs
        others = {leg for node in layer.tensors if node.name != operand for leg in node.legs}
        return cls(
            tuple(leg for leg in own if leg in result and leg in others),
            tuple(leg for leg in own if leg in result and leg not in others),
            tuple(leg for leg in own if leg not in result),
            tuple(leg for leg in dict.fromkeys(result) if leg not in (*own, "n")),
        )


def input_half(layer: TensorNetwork, operand: str = "weight") -> TensorNetwork:
    """The patches ``U[n, g, a, o]``, one result dimension per leg: the layer without its parameter.

    >>> from tnconv.diagrams import conv
    >>> input_half(conv((8, 4, 32), (6, 2, 3), groups=2)).shape
    (8, 2, 2, 3, 30)

    Raises:
        ValueError: a layer without the operand.
    """
    roles = Roles.of(layer, operand)
    nodes = (n for n in layer.nodes if not isinstance(n, Tensor) or n.name != operand)
    sizes = {leg: size for leg, size in layer.sizes.items() if leg not in roles.outputs}
    shown = (*_samples(layer), *roles.groups, *roles.patch, *roles.positions)
    return layer.with_(nodes, View.of(sizes, *shown), sizes)


def output_half(
    layer: TensorNetwork, operand: str = "weight", vectors: int | None = None
) -> TensorNetwork:
    """``v[m, n, g, d, o]``, operand ``grad_output`` with one result dimension per leg.

    >>> from tnconv.diagrams import conv
    >>> output_half(conv((8, 4, 32), (6, 2, 3), groups=2), vectors=5).shape
    (5, 8, 2, 3, 30)

    Raises:
        ValueError: a layer without the operand.
    """
    roles = Roles.of(layer, operand)
    extra = {} if vectors is None else {"m": vectors}
    sizes = {leg: layer.sizes[leg] for leg in layer.result.legs} | extra
    given = Tensor("grad_output", layer.result.prepend(sizes, extra))
    shown = (*extra, *_samples(layer), *roles.groups, *roles.outputs, *roles.positions)
    return TensorNetwork((given,), View.of(sizes, *shown), sizes)


def sample_count(
    layer: TensorNetwork, operand: str = "weight", vectors: int | None = None
) -> TensorNetwork:
    """``Σ_n 1``, a scalar: the samples of a layer, over which its factors are averaged.

    >>> from tnconv.diagrams import linear
    >>> sample_count(linear((8, 5, 3), (4, 3))).reference()
    tensor(8., dtype=torch.float64)
    """
    return TensorNetwork((), View((), ()), {"n": layer.sizes["n"]})


def _samples(layer: TensorNetwork) -> tuple[Leg, ...]:
    """The batch leg, if there is one."""
    return ("n",) if "n" in layer.sizes else ()


def _parameter(layer: TensorNetwork, operand: str) -> View:
    found = [node.view for node in layer.tensors if node.name == operand]
    if len(found) != 1:
        raise ValueError(f"the layer holds {operand!r} in {len(found)} places; expected one")
    return found[0]
