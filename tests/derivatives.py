"""Derivatives and transforms of a function of one tensor, to compare two implementations."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

Function = Callable[[Tensor], Tensor]
DERIVATIVES: dict[str, Callable[[Function, Tensor, Tensor], Tensor]] = {
    "grad": lambda f, x, _: grad(lambda a: f(a).pow(2).sum())(x),
    "jvp": lambda f, x, tangent: jvp(f, (x,), (tangent,))[1],
    "jvp of grad": lambda f, x, t: jvp(grad(lambda a: f(a).pow(2).sum()), (x,), (t,))[1],
    "vmap": lambda f, x, other: vmap(f)(torch.stack([x, other])),
    "vmap of grad": lambda f, x, t: vmap(grad(lambda a: f(a).sum()))(torch.stack([x, t])),
}
