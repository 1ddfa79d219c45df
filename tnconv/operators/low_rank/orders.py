"""Orders in which Gram networks of per-sample gradients are contracted, forced or by price.

For a layer with patches ``U[n, g, a, o]`` and vectors ``v[m, n, g, d, o]`` after it, a Gram matrix
``K[m, n, m', n'] = Σ v U U' v'`` over (g, d, a) and both positions o, o' is contracted as

    order             intermediate results
    parameter_space   J = v U (m n g d a), for both sides
    data_space        A = U U' (n n' g o o') and D = v v' (m n m' n' g o o')
    mixed             A, then v A (m n n' g d o')
    one_sided         J of the first side, then J U' (m n n' g d o')
    pixel_gram        as mixed, with A as shifted sums of products of pixels Σ_c x x'

None is best for every layer: which one is cheaper depends on samples, positions and channels.
Source: Novak, Sohl-Dickstein & Schoenholz 2022 for the first three.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

from tnconv.codegen import Nest
from tnconv.diagrams import Expression

Order = Literal["auto", "parameter_space", "data_space", "mixed", "one_sided", "pixel_gram"]
Orders = Order | Mapping[str, Order]
"""One order for all parameters, or an order by parameter name; others are chosen by price."""
ORDERS: tuple[Order, ...] = get_args(Order)[1:]
VECTORS = ("grad_output", "other_grad_output")


def check_orders(orders: Orders, names: Mapping[str, Any]) -> None:
    """Raise unless orders are known, of parameters that there are.

    Raises:
        ValueError: they are not.
    """
    if isinstance(orders, Mapping) and (foreign := sorted(orders.keys() - names.keys())):
        raise ValueError(f"order: no parameters are called {', '.join(foreign)}")
    for order in orders.values() if isinstance(orders, Mapping) else (orders,):
        if order not in get_args(Order):
            raise ValueError(f"order is {order!r}; expected one of {list(get_args(Order))}")


def order_of(orders: Orders, name: str) -> Order:
    """The order for one parameter."""
    return orders.get(name, "auto") if isinstance(orders, Mapping) else orders


def nest(network: Expression, order: Order) -> Nest | None:
    """The nest of a Gram network's tensors that is an order; None if their gradients are given."""
    names = [tensor.name for term in network.terms for tensor in term.tensors]
    vectors = [at for at, name in enumerate(names) if name in VECTORS]
    if len(vectors) != 2:
        return None
    (v, w), half = vectors, len(names) // 2
    x = tuple(at for at in range(half) if at != v)
    y = tuple(at for at in range(half, len(names)) if at != w)
    rows, inputs = Nest((*x, v)), tuple(_nest_of(x + y, order))
    nests = {
        "parameter_space": Nest((rows, Nest((*y, w)))),
        "data_space": Nest((*inputs, Nest((v, w)))),
        "mixed": Nest((Nest((*inputs, v)), w)),
        "one_sided": Nest((Nest((rows, *y)), w)),
    }
    return nests["mixed" if order == "pixel_gram" else order]


def _nest_of(tensors: tuple[int, ...], order: Order) -> Iterator[Nest]:
    """The inputs of both sides, if there are any."""
    if tensors:
        yield Nest(tensors, "pixel gram" if order == "pixel_gram" else None)


def worth_trying(network: Expression) -> tuple[Order, ...]:
    """The orders that may differ: none where patches and vectors do not meet at positions."""
    (term,) = network.terms
    summed = {leg for leg in term.sizes if leg not in term.open_legs}
    vectors = [tensor for tensor in term.tensors if tensor.name in VECTORS]
    if len(vectors) != 2 or len(list(term.tensors)) < 4:
        return ()
    first, second = ({*vector.legs} & summed for vector in vectors)
    positions = term.size(first - second) * term.size(second - first)  # of one side alone
    return ORDERS if positions > 1 else ()
