"""Per-sample gradients of a whole model, by running it sample by sample."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from tnconv.models.calls import Pass
from tnconv.models.modules import tensors
from tnconv.models.sample_maps import Owned, unfolded


def per_sample_gradients(
    model: nn.Module,
    here: Pass,
    cotangents: Sequence[Tensor],  # one per output
    parameters: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """``J[n, θ] = Σ_o v[n, o] ∂y[n, o] / ∂θ``, of shape ``(n, *θ)``, for some of the parameters.

    The inputs that have the samples are taken apart, and outputs' gradients by the outputs' maps.
    """
    flat, spec = tree_flatten((here.args, here.kwargs))
    dim = here.batch_dim
    given = [a.detach().movedim(dim, 0) for a, own in zip(flat, here.batched, strict=True) if own]
    held = {name: p.detach() for name, p in parameters.items()}
    maps = {at: m for at, m in enumerate(here.maps) if isinstance(m, Owned)}
    vectors = [unfolded(cotangents[at], m, here.samples) for at, m in maps.items()]

    def one(sample: Sequence[Tensor], v: Sequence[Tensor]) -> dict[str, Tensor]:
        left = iter(sample)
        pairs = zip(flat, here.batched, strict=True)
        args, kwargs = tree_unflatten(
            [next(left).unsqueeze(dim) if s else a for a, s in pairs], spec
        )

        def outputs(own: dict[str, Tensor]) -> tuple[Tensor, ...]:
            found = tensors(functional_call(model, own, args, kwargs))
            return tuple(found[at] for at in maps)

        grads: dict[str, Tensor] = vjp(outputs, held)[1](tuple(v))[0]
        return grads

    with torch.enable_grad():
        try:
            return vmap(one)(given, vectors)
        except RuntimeError:  # what vmap cannot map over: control flow, in-place writes
            rows = range(here.samples)
            each = [one([a[n] for a in given], [v[n] for v in vectors]) for n in rows]
    return {name: torch.stack([grads[name] for grads in each]) for name in held}
