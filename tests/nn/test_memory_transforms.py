"""Memory-saving layers under ``torch.func`` and in forward mode: what torch's layers give."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap

from tests.nn.memory_cases import D, close, each_case, pair

Layer = Callable[[dict[str, Tensor], Tensor], Tensor]
SAME = {"randomness": "same"}


def gradient(f: Layer):
    return grad(lambda p, x: f(p, x).sin().sum(), argnums=(0, 1))


def over_vmap(f: Layer, p, xs, _):
    """Samples inside, differentiation outside: the layer does not see what is differentiable."""
    xs.requires_grad_()
    y = vmap(f, (None, 0), **SAME)(p, xs)
    return y, torch.autograd.grad(y.sin().sum(), xs)


def of_duals(f: Layer, p, xs, tangents):
    """A tangent of the values, and of the gradients."""
    x = xs[0].requires_grad_()
    p = {name: t.clone().requires_grad_() for name, t in p.items()}
    with forward_ad.dual_level():
        y = f(p, forward_ad.make_dual(x, tangents[1]))
        found = (y, *torch.autograd.grad(y.sin().sum(), (x, *p.values()), create_graph=True))
        return [forward_ad.unpack_dual(t).tangent for t in found]


TRANSFORMS = {
    "jvp": lambda f, p, xs, t: jvp(f, (p, xs[0]), t),
    "vjp": lambda f, p, xs, t: (lambda y, pull: pull(y.cos()))(*vjp(f, p, xs[0])),
    "jvp of grad": lambda f, p, xs, t: jvp(gradient(f), (p, xs[0]), t),
    "jacobians": lambda f, p, xs, t: [jac(f, 1)(p, xs[0]) for jac in (jacrev, jacfwd_same)],
    "vmap": lambda f, p, xs, t: vmap(f, (None, 0), **SAME)(p, xs),
    "vmap of weights": lambda f, p, xs, t: vmap(f, (0, None), **SAME)(several(p), xs[0]),
    "vmap of grad": lambda f, p, xs, t: vmap(gradient(f), (None, 0), **SAME)(p, xs),
    "grad of vmap": lambda f, p, xs, t: gradient(vmap(f, (None, 0), **SAME))(p, xs),
    "vmap of jvp": lambda f, p, xs, t: vmap(lambda x: jvp(f, (p, x), t), **SAME)(xs),
    "jvp of grad of vmap": lambda f, p, xs, t: jvp(
        gradient(vmap(f, (None, 0), **SAME)), (p, xs), (t[0], t[1].expand_as(xs))
    ),
    "backward over vmap": over_vmap,
    "dual numbers": of_duals,
}


def jacfwd_same(f, argument):
    return jacfwd(f, argument, randomness="same")


def several(p):
    """Three of each parameter; a name must not be missing."""
    return {name: torch.stack([t, 2 * t, t + 1]) for name, t in p.items()} or {"": torch.ones(3)}


def impossible(transform: str, layer: nn.Module) -> bool:
    """What torch refuses for its own layer."""
    changes_buffers = layer.training and getattr(layer, "running_mean", None) is not None
    no_second = isinstance(layer, nn.Hardsigmoid) and transform in SECOND
    return changes_buffers or no_second


SECOND = ("jvp of grad", "jvp of grad of vmap", "dual numbers")


@pytest.mark.parametrize("transform", TRANSFORMS)
@each_case
def test_transforms(layer, shape, reader, transform):
    if impossible(transform, layer):
        pytest.skip("torch's own layer cannot")
    torch.manual_seed(2)
    x, tangent = torch.randn(3, *shape, **D), torch.randn(shape, **D)
    results = []
    for module in pair(layer, reader):
        p = {name: t.detach() for name, t in module.named_parameters()}

        def call(p, x, module=module):
            torch.manual_seed(1)
            return functional_call(module, {n: t for n, t in p.items() if n}, (x,))

        tangents = {name: torch.ones_like(t) for name, t in p.items()}, tangent
        results.append(TRANSFORMS[transform](call, p, x.clone(), tangents))
    close(results[1], results[0], 1e-10)
