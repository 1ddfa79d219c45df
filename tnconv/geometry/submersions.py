"""Reparametrizations in which several parameters stand for one, and torch's parametrizations."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tnconv.geometry.channels import Channels
from tnconv.geometry.elementwise_maps import expect_names
from tnconv.geometry.points import Point
from tnconv.geometry.reparametrization import Reparametrization


class WeightNorm(Reparametrization):
    """``W[d] = g[d] v[d] / |v[d]|``: a submersion from ``W_g, W_v`` to W, rows along ``dim``.

    >>> norm = WeightNorm(["w"])
    >>> {name: part.shape for name, part in norm({"w": torch.rand(2, 3)}).items()}
    {'w_g': torch.Size([2, 1]), 'w_v': torch.Size([2, 3])}
    """

    bijective = False

    def __init__(self, names: Collection[str], dim: int = 0) -> None:
        self.names, self.dim = tuple(names), dim

    def forward(self, theta: Point) -> Point:
        expect_names(theta, self.names)
        new: dict[str, Tensor] = {}
        for name, part in theta.items():
            if name in self.names:
                new |= {f"{name}_g": self._norms(part), f"{name}_v": part}
            else:
                new[name] = part
        return new

    def inverse(self, psi: Point) -> Point:
        expect_names(psi, [f"{name}_{letter}" for name in self.names for letter in "gv"])
        new: dict[str, Tensor] = {}
        for name, part in psi.items():
            whole = name[:-2]
            if whole in self.names and name.endswith("_v"):
                new[whole] = psi[f"{whole}_g"] * part / self._norms(part)
            elif not (whole in self.names and name.endswith("_g")):
                new[name] = part
        return new

    def _norms(self, part: Tensor) -> Tensor:
        others = [dim for dim in range(part.dim()) if dim != self.dim]
        return part.square().sum(others, keepdim=True).sqrt()


class BatchNormFold(Reparametrization):
    """A convolution and the BatchNorm after it, in evaluation mode, for one folded layer.

    ``W = γ/√(s² + ε) w`` and ``b = β + γ/√(s² + ε) (b₀ - m)`` of ψ = ``(w, b₀, γ, β)`` with running
    mean m and variance s²; θ has ``layer.weight`` and ``layer.bias`` alone. A submersion.

    Args:
        model: with both layers.
        layer: the name of the convolution or linear layer, with or without a bias.
        norm: the name of its BatchNorm.

    >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).eval()
    >>> fold = BatchNormFold(model, "0", "1")
    >>> sorted(fold.inverse(dict(model.named_parameters())))
    ['0.bias', '0.weight']

    Raises:
        ValueError: a BatchNorm without factors or running statistics.
    """

    bijective = False

    def __init__(self, model: nn.Module, layer: str, norm: str) -> None:
        found: Any = model.get_submodule(norm)
        if getattr(found, "running_var", None) is None or getattr(found, "weight", None) is None:
            kind = type(found).__name__
            raise ValueError(
                f"{norm!r} is a {kind}; expected a BatchNorm with factors and running statistics"
            )
        self.layer, self.norm = layer, norm
        self.channels = Channels(model, layer, "outgoing")
        self.has_bias = self.channels.bias is not None
        self.mean = found.running_mean.detach().clone()
        self.spread = (found.running_var.detach() + found.eps).sqrt()

    def forward(self, theta: Point) -> Point:
        """With ``γ = √(s² + ε)``, ``b₀ = 0`` and ``β = b + m``."""
        weight, bias = f"{self.layer}.weight", f"{self.layer}.bias"
        expect_names(theta, [weight, bias])
        new = {name: part for name, part in theta.items() if name != bias}
        if self.has_bias:
            new[bias] = torch.zeros_like(theta[bias])
        new[f"{self.norm}.weight"] = self.spread.to(theta[bias]).expand_as(theta[bias])
        new[f"{self.norm}.bias"] = theta[bias] + self.mean
        return new

    def inverse(self, psi: Point) -> Point:
        weight, bias = f"{self.layer}.weight", f"{self.layer}.bias"
        own = [f"{self.norm}.{key}" for key in ("weight", "bias")]
        expect_names(psi, [weight, *own])
        factor = psi[own[0]] / self.spread
        before = psi[bias] - self.mean if self.has_bias else -self.mean
        new = {name: part for name, part in psi.items() if name not in (*own, bias)}
        new[weight] = self.channels.along(factor) * psi[weight]
        new[bias] = psi[own[1]] + factor * before
        return new


class TorchParametrization(Reparametrization):
    """What ``torch.nn.utils.parametrize`` did to a module: θ are the tensors it uses, ψ the stored.

    ``bijective`` is found out at the stored tensors, unless it is said: one tensor for each, which
    comes back from right inverse and parametrization where it is moved a little.

    >>> class Exp(nn.Module):
    ...     def forward(self, x):
    ...         return x.exp()
    ...     def right_inverse(self, y):
    ...         return y.log()
    >>> layer = nn.Linear(2, 1, bias=False)
    >>> with torch.no_grad():
    ...     _ = layer.weight.fill_(1.0)
    >>> _ = parametrize.register_parametrization(layer, "weight", Exp())
    >>> map = TorchParametrization(layer)
    >>> map({"weight": torch.ones(1, 2)}), map.bijective
    ({'parametrizations.weight.original': tensor([[0., 0.]])}, True)

    Raises:
        ValueError: a module without parametrizations.
    """

    def __init__(self, model: nn.Module, bijective: bool | None = None) -> None:
        self.lists: dict[str, Any] = {}
        for prefix, module in model.named_modules():
            if parametrize.is_parametrized(module):
                own: Any = module.parametrizations
                for name, found in own.items():
                    self.lists[f"{prefix}." * bool(prefix) + name] = found
        if not self.lists:
            raise ValueError("no module of the model is parametrized; expected one or more")
        self.bijective = self._comes_back() if bijective is None else bijective

    def forward(self, theta: Point) -> Point:
        """By the right inverses."""
        expect_names(theta, self.lists)
        new: dict[str, Tensor] = {}
        for name, part in theta.items():
            if name not in self.lists:
                new[name] = part
                continue
            for each in reversed(self.lists[name]):
                part = each.right_inverse(part)
            stored = (part,) if isinstance(part, Tensor) else tuple(part)
            new |= dict(zip(self.stored(name), stored, strict=True))
        return new

    def inverse(self, psi: Point) -> Point:
        owners = {key: name for name in self.lists for key in self.stored(name)}
        expect_names(psi, owners)
        new: dict[str, Tensor] = {}
        for key, part in psi.items():
            if key not in owners:
                new[key] = part
            elif owners[key] not in new:
                first, *rest = self.lists[owners[key]]
                part = first(*[psi[each] for each in self.stored(owners[key])])
                for each in rest:
                    part = each(part)
                new[owners[key]] = part
        return new

    def stored(self, name: str) -> list[str]:
        """The names of the tensors that stand for one."""
        prefix, _, last = name.rpartition(".")
        start = f"{prefix}." * bool(prefix) + f"parametrizations.{last}."
        found = self.lists[name]
        if hasattr(found, "original"):
            return [start + "original"]
        return [f"{start}original{at}" for at in range(found.ntensors)]

    @torch.no_grad()
    def _comes_back(self) -> bool:
        psi: dict[str, Tensor] = {}
        for name, found in self.lists.items():
            keys = self.stored(name)
            if len(keys) > 1:
                return False
            stored = found.original
            steps = torch.linspace(0.5, 1.5, stored.numel()).to(stored).reshape(stored.shape)
            psi[keys[0]] = stored + 0.01 * stored.abs().mean() * steps
        back = self.forward(self.inverse(psi))
        close = (torch.allclose(back[key], part, rtol=1e-3, atol=1e-6) for key, part in psi.items())
        return all(back[key].shape == part.shape for key, part in psi.items()) and all(close)
