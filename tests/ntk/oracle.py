"""Tangent kernels by torch.func: the Jacobian of every sample, contracted."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev


def jacobian(
    model: nn.Module,
    x: Tensor,
    seeds: Tensor | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """``J[n, c, θ]`` by parameter name, of ``Σ_o s[c, o] y[n, o]``, or of all outputs."""
    values = dict(model.named_parameters()) | dict(model.named_buffers()) | dict(state or {})
    values = {name: value.detach() for name, value in values.items()}
    learned = {n: values[n] for n, p in model.named_parameters() if p.requires_grad}

    def function(own: dict[str, Tensor], sample: Tensor, s: Tensor | None) -> Tensor:
        y = functional_call(model, values | own, (sample.unsqueeze(0),)).flatten()
        return y if s is None else s.reshape(len(s), -1) @ y

    rows = []
    for n in range(len(x)):
        own = seeds
        if seeds is not None and seeds.dim() > model(x[:1]).dim():
            own = seeds[n]
        rows.append(jacrev(function)(learned, x[n], own))
    return {name: torch.stack([row[name].flatten(1) for row in rows]) for name in learned}


def kernels(j: Mapping[str, Tensor], k: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``Θ[n, c, m, d]`` of every parameter."""
    return {name: torch.einsum("ncp,mdp->ncmd", j[name], k[name]) for name in j}


def kernel(j: Mapping[str, Tensor], k: Mapping[str, Tensor] | None = None) -> Tensor:
    """``Θ[n, c, m, d]``."""
    return torch.stack([*kernels(j, j if k is None else k).values()]).sum(0)


REDUCED = {
    "full": "ncmd->ncmd",
    "trace": "ncmc->nm",
    "class_diagonal": "ncmc->ncm",
    "sample_diagonal": "ncnd->ncd",
}


def reduced(full: Tensor, reduce: str) -> Tensor:
    return torch.einsum(REDUCED[reduce], full)
