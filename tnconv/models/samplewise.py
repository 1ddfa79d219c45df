"""Per-sample gradients of modules that no diagram describes, by running them sample by sample."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from tnconv.models.modules import tensors


def per_sample_gradients(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    cotangents: Sequence[Tensor],  # one (n, ...) per output
    parameters: Mapping[str, Tensor],
    samples: int,
) -> dict[str, Tensor]:
    """``J[n, θ] = Σ_o v[n, o] ∂y[n, o] / ∂θ``, of shape ``(n, *θ)``, for some of the parameters.

    Every tensor whose first dimension is the batch is taken apart into samples.
    """
    fixed = {"args": args, "kwargs": dict(kwargs)}
    flat, spec = torch.utils._pytree.tree_flatten(fixed)
    batched = [isinstance(a, Tensor) and a.shape[:1] == (samples,) for a in flat]
    given = [a.detach() for a, sliced in zip(flat, batched, strict=True) if sliced]
    held = {name: p.detach() for name, p in parameters.items()}

    def one(sample: Sequence[Tensor], v: Sequence[Tensor]) -> dict[str, Tensor]:
        left = iter(sample)
        whole = [next(left)[None] if s else a for a, s in zip(flat, batched, strict=True)]
        inputs = torch.utils._pytree.tree_unflatten(whole, spec)

        def outputs(own: dict[str, Tensor]) -> tuple[Tensor, ...]:
            return tensors(functional_call(module, own, inputs["args"], inputs["kwargs"]))

        pull = vjp(outputs, held)[1]
        grads: dict[str, Tensor] = pull(tuple(each[None] for each in v))[0]
        return grads

    with torch.enable_grad():
        try:
            return vmap(one)(given, list(cotangents))
        except RuntimeError:  # what vmap cannot map over: control flow, in-place writes
            each = [one([a[n] for a in given], [v[n] for v in cotangents]) for n in range(samples)]
    return {name: torch.stack([grads[name] for grads in each]) for name in held}
