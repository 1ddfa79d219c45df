"""Losses: roots of their Hessian in the model's outputs, exact or sampled.

A loss ``L = r Σ_n l(y[n], t[n])`` couples no samples, and the losses here couple no positions
either, only the channels of one: there is one root R per position,

    ``∂²L / ∂y[n, c, p] ∂y[n, c', p] = Σ_j R[n, c, j, p] R[n, c', j, p]``.

Gauss-Newton and Fisher quantities send its columns backwards through the network, the exact ones
all, the sampled ones (Monte Carlo Fisher) a few random mixtures.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from math import prod, sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tnconv.displays import Shown
from tnconv.generators import on_device


@dataclass(frozen=True, eq=False, repr=False)
class Curvature(Shown, ABC):
    """The Hessian of a loss in outputs ``y`` of a shape ``(n, *shape)``, seen as ``(n, c, p)``."""

    y: Tensor  # (n, c, p)
    shape: tuple[int, ...]
    places: Tensor | None = field(default=None, kw_only=True)  # (samples, q), of rows and positions

    @abstractmethod
    def root(self) -> Tensor:
        """``R[n, c, j, p]``: for every sample and position the columns of a root."""

    @abstractmethod
    def draw(self, generator: torch.Generator | None = None) -> Tensor:
        """``s[n, c, p]``, random with mean 0 and ``E[s sᵀ] = R Rᵀ`` at every position.

        It is the gradient for a target drawn from the likelihood that the loss belongs to, so
        positions are independent.
        """

    @cached_property
    def _root(self) -> Tensor:
        return self.root()

    @property
    def columns(self) -> int:
        """How many vectors `vectors` gives: columns at a position times positions of a sample."""
        positions = self.y.shape[2] if self.places is None else self.places.shape[1]
        return self.rank * positions

    @property
    def rank(self) -> int:
        """How many columns the root has at one position."""
        return 1

    def vectors(self, start: int = 0, stop: int | None = None) -> Tensor:
        """``S[m, n, *shape]`` with ``Σ_m S[m] S[m]ᵀ`` the Hessian; ``start`` and ``stop`` choose m.

        Every position has vectors of its own, zero elsewhere. Where samples have several rows of
        y, these are more positions.
        """
        n, c, positions = self.y.shape
        at = torch.arange(start, self.columns if stop is None else stop, device=self.y.device)
        column, position = at % max(1, self.rank), at // max(1, self.rank)
        found = self.y.new_zeros(len(at), n, c, positions)
        if self.places is not None:
            return self._placed(found, column, self.places[:, position])
        root = self._root[:, :, column, position]  # (n, c, m)
        found[torch.arange(len(at), device=at.device), :, :, position] = root.permute(2, 0, 1)
        return found.reshape(len(at), *self.shape)

    def _placed(self, found: Tensor, column: Tensor, places: Tensor) -> Tensor:
        """Vectors m with the root's columns at one place of each sample; -1 is none."""
        positions = self.y.shape[2]
        samples, m = (places >= 0).nonzero().unbind(1)
        row, position = places[samples, m] // positions, places[samples, m] % positions
        found[m, row, :, position] = self._root[row, :, column[m], position]
        return found.reshape(len(found), *self.shape)

    def samples(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """``S[m, n, *shape]`` for ``count`` draws m, with ``E[Σ_m S[m] S[m]ᵀ]`` the Hessian.

        A generator of another device gives a seed for one of the outputs' device.
        """
        generator = on_device(generator, self.y.device)
        draws = torch.stack([self.draw(generator) for _ in range(count)])
        return draws.reshape(count, *self.shape) / sqrt(count)


@dataclass(frozen=True, eq=False, repr=False)
class Softmax(Curvature):
    """``∂²L = a (diag(π) - π πᵀ)`` with probabilities π: cross-entropy, a[n, p] its factors."""

    factor: Tensor  # (n, p)

    @property
    def rank(self) -> int:
        return int(self.y.shape[1]) - 1

    def root(self) -> Tensor:
        """C - 1 columns ``√a √π_c (δ_cj - u_c u_j / (1 + q_C))``, with q = √π, u = q + e_C.

        ``diag(q) (I - q qᵀ)`` is a root: diag(q) times a basis of what is orthogonal to q.
        """
        q = self.y.softmax(1).sqrt()
        return (self.factor.sqrt().unsqueeze(1) * q).unsqueeze(2) * complement(q)

    def draw(self, generator: torch.Generator | None = None) -> Tensor:
        n, c, positions = self.y.shape
        probabilities = self.y.softmax(1)
        flat = probabilities.transpose(1, 2).reshape(-1, c)
        labels = torch.multinomial(flat, 1, generator=generator).reshape(n, 1, positions)
        hit = torch.zeros_like(probabilities).scatter_(1, labels, 1)
        return (probabilities - hit) * self.factor.sqrt().unsqueeze(1)


def complement(q: Tensor) -> Tensor:  # (n, c, p)
    """An orthonormal basis ``(n, c, c - 1, p)`` of all that is orthogonal to unit vectors q.

    The Householder reflection that maps q to minus the last axis, without its last column.
    """
    last = q[:, -1:]
    u = torch.cat([q[:, :-1], last + 1], 1)
    reflected = -u.unsqueeze(2) * (u / (1 + last))[:, :-1].unsqueeze(1)
    reflected.diagonal(dim1=1, dim2=2).add_(1)
    return reflected


@dataclass(frozen=True, eq=False, repr=False)
class Gaussian(Curvature):
    """``∂²L = a`` at every entry: squared errors. Entries are positions of one channel."""

    factor: Tensor  # (n, p)

    def root(self) -> Tensor:
        return self.factor.sqrt()[:, None, None]

    def draw(self, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.empty_like(self.y).normal_(generator=generator)
        return noise * self.factor.sqrt().unsqueeze(1)


@dataclass(frozen=True, eq=False, repr=False)
class Bernoulli(Curvature):
    """``∂²L = a σ (1 - σ)`` at every entry: binary cross-entropy of logits."""

    factor: Tensor  # (n, p)

    def root(self) -> Tensor:
        sigma = self.y.sigmoid()
        return (self.factor.unsqueeze(1) * sigma * (1 - sigma)).sqrt().unsqueeze(2)

    def draw(self, generator: torch.Generator | None = None) -> Tensor:
        sigma = self.y.sigmoid()
        hit = torch.bernoulli(sigma, generator=generator)
        return (sigma - hit) * self.factor.sqrt().unsqueeze(1)


@dataclass(frozen=True, eq=False, repr=False)
class Flat(Curvature):
    """No curvature: absolute errors. There are no columns, and every draw is zero."""

    @property
    def rank(self) -> int:
        return 0

    def root(self) -> Tensor:
        n, c, positions = self.y.shape
        return self.y.new_zeros(n, c, 0, positions)

    def draw(self, generator: torch.Generator | None = None) -> Tensor:
        return torch.zeros_like(self.y)


def curvature(
    loss_fn: Callable[..., Tensor],
    outputs: Tensor,
    targets: Tensor,
    owners: Tensor | None = None,
) -> Curvature:
    """The Hessian of ``loss_fn(outputs, targets)`` in outputs of shape ``(n, *shape)``.

    ``loss_fn`` is one of torch's modules `CrossEntropyLoss`, `MSELoss`, `BCEWithLogitsLoss` and
    `L1Loss`, or the function of ``torch.nn.functional`` behind it, also as a ``functools.partial``
    with keywords. The factors of reduction, class weights, label smoothing and ignored targets are
    part of the Hessian. ``owners``, of the outputs' shape, are the samples that entries belong to,
    where these are not the rows of dimension 0.

    >>> loss = curvature(nn.CrossEntropyLoss(), torch.rand(8, 10), torch.zeros(8, dtype=torch.long))
    >>> loss.vectors().shape, loss.samples(2).shape
    (torch.Size([9, 8, 10]), torch.Size([2, 8, 10]))

    Args:
        loss_fn: a loss whose Hessian is known.
        outputs: of the model, ``(n, *shape)``.
        targets: as the loss takes them.
        owners: the samples that entries of the outputs belong to.

    Raises:
        NotImplementedError: another loss, or channels of one position that are different samples'.
        ValueError: a reduction that gives no number, or outputs without a batch.
    """
    function, settings = recognised(loss_fn)
    reduction = settings.pop("reduction", "mean")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"the loss has reduction {reduction!r}; expected 'mean' or 'sum'")
    if outputs.dim() == 0 or (function is F.cross_entropy and outputs.dim() < 2):
        raise ValueError(f"outputs have shape {tuple(outputs.shape)}; expected a batch dimension")
    found = _CURVATURES[function](outputs.detach(), targets.detach(), reduction, **settings)
    if owners is None:
        return found
    return replace(found, places=_places(owners.reshape(found.y.shape)))


def _places(owners: Tensor) -> Tensor:
    """``(samples, q)``: the places of each sample, numbered row by row; -1 where it has fewer.

    Raises:
        NotImplementedError: samples in the dimension of channels, which losses couple.
    """
    if not bool((owners == owners[:, :1]).all()):
        raise NotImplementedError(
            "the samples are in the outputs' channels (dimension 1), which the loss couples; "
            "expected them in another dimension"
        )
    own = owners[:, 0].reshape(-1)
    order = own.argsort(stable=True)
    counts = own.bincount()
    starts = counts.cumsum(0) - counts
    places = own.new_full((len(counts), int(counts.max())), -1)
    places[own[order], torch.arange(len(own), device=own.device) - starts[own[order]]] = order
    return places


def _cross_entropy(
    outputs: Tensor,
    targets: Tensor,
    reduction: str,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Curvature:
    """Every term ``-log π_c`` has one Hessian, so it counts the terms' weights.

    A mean divides by the weights of the labels, without smoothing; where targets are
    probabilities, by the number of positions.
    """
    y = outputs.flatten(2) if outputs.dim() > 2 else outputs.unsqueeze(2)
    weights = y.new_ones(y.shape[1]) if weight is None else weight.to(y.dtype)
    if targets.is_floating_point():
        t = targets.reshape(y.shape) * (1 - label_smoothing) + label_smoothing / y.shape[1]
        factor = torch.einsum("ncp,c->np", t.to(y.dtype), weights)
        total = y.new_tensor(y.shape[0] * y.shape[2])
    else:
        labels = targets.reshape(y.shape[0], y.shape[2])
        counts = labels != ignore_index
        own = weights[labels.where(counts, 0)] * counts
        factor = (1 - label_smoothing) * own + label_smoothing * weights.mean() * counts
        total = own.sum()
    return Softmax(y, tuple(outputs.shape), factor / total if reduction == "mean" else factor)


def _mse(
    outputs: Tensor, targets: Tensor, reduction: str, weight: Tensor | None = None
) -> Curvature:
    """A mean divides by the number of entries, or by the sum of their weights."""
    factor = _entries(outputs, targets) if weight is None else weight.expand_as(outputs)
    total = factor.sum() if reduction == "mean" else 1
    return Gaussian(_one_channel(outputs), tuple(outputs.shape), 2 * _flat(factor) / total)


def _binary_cross_entropy(
    outputs: Tensor,
    targets: Tensor,
    reduction: str,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
) -> Curvature:
    factor = _entries(outputs, targets)
    if pos_weight is not None:
        factor = pos_weight * targets + 1 - targets
    factor = factor if weight is None else factor * weight
    total = outputs.numel() if reduction == "mean" else 1
    flat = _flat(factor.expand_as(outputs)) / total
    return Bernoulli(_one_channel(outputs), tuple(outputs.shape), flat)


def _l1(outputs: Tensor, targets: Tensor, reduction: str) -> Curvature:
    return Flat(_one_channel(outputs), tuple(outputs.shape))


def _entries(outputs: Tensor, targets: Tensor) -> Tensor:
    """A one for every entry.

    Raises:
        ValueError: targets of another shape, which torch would broadcast.
    """
    if targets.shape != outputs.shape:
        raise ValueError(
            f"targets have shape {tuple(targets.shape)}; expected the outputs' "
            f"{tuple(outputs.shape)}"
        )
    return torch.ones_like(outputs)


def _one_channel(outputs: Tensor) -> Tensor:
    return outputs.reshape(len(outputs), 1, prod(outputs.shape[1:]))


def _flat(factor: Tensor) -> Tensor:
    return factor.reshape(len(factor), prod(factor.shape[1:]))


Build = Callable[..., Curvature]
_CURVATURES: Mapping[Callable[..., Tensor], Build] = {
    F.cross_entropy: _cross_entropy,
    F.mse_loss: _mse,
    F.binary_cross_entropy_with_logits: _binary_cross_entropy,
    F.l1_loss: _l1,
}
_MODULES: Mapping[type[nn.Module], tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    nn.CrossEntropyLoss: (F.cross_entropy, ("weight", "ignore_index", "label_smoothing")),
    nn.MSELoss: (F.mse_loss, ()),
    nn.BCEWithLogitsLoss: (F.binary_cross_entropy_with_logits, ("weight", "pos_weight")),
    nn.L1Loss: (F.l1_loss, ()),
}


def recognised(loss_fn: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], dict[str, Any]]:
    """The function of ``torch.nn.functional`` that a known loss is, and its settings.

    Raises:
        NotImplementedError: another loss.
    """
    for kind, (function, names) in _MODULES.items():
        if isinstance(loss_fn, kind) and type(loss_fn).forward is kind.forward:
            return function, {name: getattr(loss_fn, name) for name in ("reduction", *names)}
    inner, settings = loss_fn, {}
    if isinstance(loss_fn, partial) and not loss_fn.args:
        inner, settings = loss_fn.func, dict(loss_fn.keywords)
    if inner in _CURVATURES and not settings.keys() & {"size_average", "reduce"}:
        return inner, settings
    given = getattr(loss_fn, "__name__", type(loss_fn).__name__)
    known = ", ".join(kind.__name__ for kind in _MODULES)
    raise NotImplementedError(
        f"no second derivative is known of the loss {given}; expected {known}, or one of torch's "
        "functions behind them"
    )
