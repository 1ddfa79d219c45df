"""Forms: a network as it is given, simplified, and with offered rewrites, to be planned for."""

from tnconv.diagrams.explicit import explicit
from tnconv.diagrams.network import TensorNetwork
from tnconv.simplify import Firing
from tnconv.simplify import simplify as simplified
from tnconv.simplify.offered import polyphase

POLYPHASE = "by polyphase"


def forms_of(
    network: TensorNetwork, simplify: bool = True, style: str = "torch"
) -> tuple[dict[str, TensorNetwork], list[Firing]]:
    """The forms to plan for, by name and equal ones once, and the rules that fired.

    An empty network has only its normal form. In einsum style every other is `explicit`.
    """
    if style == "einsum" and network.scale and 0 not in network.sizes.values():
        forms, fired = _forms(network, network, simplify)
        return {name: explicit(form) for name, form in forms.items()}, fired
    return _forms(network, _without_single_positions(network), simplify)


def _forms(
    network: TensorNetwork, given: TensorNetwork, simplify: bool
) -> tuple[dict[str, TensorNetwork], list[Firing]]:
    """The forms, where the first is a ``given`` one."""
    empty = network.scale == 0 or 0 in network.sizes.values()
    if not simplify and not empty:
        return {"as given": network}, []
    result = simplified(network)
    assert isinstance(result.normal, TensorNetwork) and isinstance(result.views, TensorNetwork)
    if result.views.scale == 0:  # nothing is read: zero, also where operands are not finite
        return {"in form V": result.views}, list(result.trace)
    if given is not network and given == result.normal:
        given = result.normal
    forms = {} if empty else {"as given": given}
    for name, form in (("in form N", result.normal), ("in form V", result.views)):
        if form not in forms.values():
            forms[name] = form
    if not empty:
        forms |= _by_polyphase(result.normal)
    return forms, list(result.trace)


def _without_single_positions(network: TensorNetwork) -> TensorNetwork:
    """Without legs of size one that no pattern holds: then it often is its own normal form.

    The others stay: native kernels match patterns with windows or outputs of one position.
    """
    held = {leg for _, pattern in network.patterns for leg in pattern.legs}
    for leg, size in network.sizes.items():
        if size == 1 and leg not in held:
            network = network.substitute(leg)
    return network


def _by_polyphase(normal: TensorNetwork) -> dict[str, TensorNetwork]:
    """The one offered rewrite whose gains are predicted well, for every pattern that it fits.

    Squares of gradients, of four tensors, took longer by it wherever it was measured.
    """
    after = normal
    for _ in normal.patterns if len(list(normal.tensors)) <= 2 else ():
        after = next(polyphase(after), after)
    return {} if after is normal else {POLYPHASE: after}
