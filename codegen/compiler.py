"""The compiler: forms of a network, the plans for them, and the program of the best one."""

from collections.abc import Sequence

from tnconv.codegen.planner import ROUTES, plans
from tnconv.codegen.program import Program, argument_names
from tnconv.diagrams.expression import Expression
from tnconv.diagrams.network import TensorNetwork
from tnconv.simplify import Firing
from tnconv.simplify import simplify as simplified


def compile(
    network: Expression,
    simplify: bool = True,
    optimize: str = "auto",
    routes: Sequence[str] = tuple(ROUTES),
) -> Program:
    """Find the cheapest program for a network.

    ``simplify=False`` covers the network as it is given only. ``optimize`` chooses the path search
    (``"optimal"``, ``"dp"``, or ``"auto"``). ``routes`` are the routes that may be used, of
    ``"native"``, ``"window"``, ``"pixel gram"``, ``"taps"``, ``"loop"`` and ``"dense"``; the last
    always exists.

    >>> from tnconv.diagrams import conv
    >>> print(compile(conv((8, 3, 32, 32), (16, 3, 3, 3), padding=1)).source)
    import torch
    import torch.nn.functional as F
    <BLANKLINE>
    <BLANKLINE>
    def contraction(x, weight):
        t1 = F.conv2d(x, weight, padding=1)  # convolution over i1, i2
        return t1
    <BLANKLINE>

    Raises:
        ValueError: an unknown route or path search.
    """
    if not routes or any(name not in ROUTES for name in routes):
        raise ValueError(f"routes are {list(routes)}; expected some of {list(ROUTES)}")
    used = tuple(name for name in ROUTES if name in (*routes, "dense"))
    arguments = argument_names(network)
    terms, firings = [], []
    for term in network.terms:
        forms, fired = _forms(term, simplify)
        terms.append(tuple(plans(forms, arguments, used, optimize, len(network.terms) == 1)))
        firings += fired
    return Program(network, tuple(terms), tuple(firings))


def _forms(network: TensorNetwork, simplify: bool) -> tuple[dict[str, TensorNetwork], list[Firing]]:
    """The forms to plan for, equal ones once. An empty network has only its normal form."""
    empty = network.scale == 0 or 0 in network.sizes.values()
    if not simplify and not empty:
        return {"as given": network}, []
    result = simplified(network)
    assert isinstance(result.normal, TensorNetwork) and isinstance(result.views, TensorNetwork)
    forms = {} if empty else {"as given": network}
    for name, form in (("in form N", result.normal), ("in form V", result.views)):
        if form not in forms.values():
            forms[name] = form
    return forms, list(result.trace)
