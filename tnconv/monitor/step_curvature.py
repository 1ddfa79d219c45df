"""The curvature of a step's loss, on the graph of the user's own forward pass.

Dropout masks and batch statistics are those of the pass; nothing runs forwards again, but for the
exact Hessian diagonal. All random numbers come from a generator of the monitor's own.
"""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from tnconv.losses.diagonals import LossFunction
from tnconv.models.capture import alone
from tnconv.monitor.lanczos import Ritz, extreme
from tnconv.monitor.lanczos_experience import End, Experience
from tnconv.monitor.needs import Diagonal, Spectrum
from tnconv.operators.hessian_diagonal import hessian_diagonal
from tnconv.operators.second_derivative import SecondDerivative
from tnconv.optim.workers import Workers
from tnconv.quantities import GGNDiagonal
from tnconv.quantities.base import Quantity
from tnconv.recursions import diagonals
from tnconv.recursions.naming import describing

WALKED = ("hesscale", "gn", "bl89", "hesscale+")
LITTLE = 0.05


def by_layers(need: Diagonal, generator: torch.Generator) -> Quantity[Tensor] | None:
    """The quantity of layers that a diagonal comes from, if it is one."""
    kinds = {"diag_ggn_exact": GGNDiagonal(), "diag_ggn_mc": GGNDiagonal("mc", 1, generator)}
    return kinds.get(need.kind)


def by_walk(
    need: Diagonal,
    model: nn.Module,
    loss_fn: LossFunction,
    output: Tensor,
    targets: Any,
    parameters: Sequence[Tensor],
) -> list[Tensor]:
    """A diagonal by the recursion of HesScale, of the loss that was given."""
    how = {"describe": describing(model)}
    _, flows = diagonals(loss_fn, output, targets, parameters, need.kind, **how)  # type: ignore[arg-type]
    return [flows[p].diagonal if p in flows else torch.zeros_like(p) for p in parameters]


def exactly(
    model: nn.Module,
    loss_fn: LossFunction,
    inputs: tuple[tuple[Any, ...], Mapping[str, Any]],
    targets: Any,
    names: Sequence[str],
    parameters: Sequence[Tensor],
) -> list[Tensor]:
    """The exact diagonal, by a forward pass of its own.

    Raises:
        NotImplementedError: dropout, whose masks would be others.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p:
            raise NotImplementedError(
                f"layer {name!r} drops entries, so that the exact Hessian diagonal, which runs the "
                "model again, would be of another loss; expected another curvature"
            )
    args, kwargs = inputs
    given: Any = dict(kwargs) if kwargs else args
    with torch.random.fork_rng(devices=[]):
        found = hessian_diagonal(model, loss_fn, given, targets)
    zeros = zip(names, parameters, strict=True)
    return [found[name] if name in found else torch.zeros_like(p) for name, p in zeros]


class HessianProducts:
    """Products with the Hessian of a loss in some parameters, on the loss's own graph."""

    def __init__(
        self, model: nn.Module, loss: Tensor, parameters: Sequence[Tensor], workers: Workers
    ) -> None:
        self.model, self.parameters, self.workers = model, tuple(parameters), workers
        with alone(model):
            self._second = SecondDerivative(loss, self.parameters)

    def __call__(self, vector: Tensor) -> Tensor:
        """``H v`` for a flat vector; the mean over workers."""
        sizes = [p.numel() for p in self.parameters]
        parts = torch.split(vector, sizes)
        given = [v.view(p.shape).to(p) for v, p in zip(parts, self.parameters, strict=True)]
        with alone(self.model):
            found = self._second(tuple(given))
        flat = torch.cat([each.reshape(-1) for each in found]).to(vector)
        many = self.workers.count
        return flat if many == 1 else self.workers.sums([flat])[0] / many

    @property
    def start(self) -> Tensor:
        """The loss's gradient, flat; the mean over workers, to a factor.

        Convolutions of data, at whose outputs the graph ends, have zeros: theirs costs a sweep.
        """
        flat = torch.cat([each.reshape(-1) for each in self._second.known_gradient])
        total: Tensor = self.workers.sums([flat])[0]
        return total

    @property
    def size(self) -> int:
        """The number of entries."""
        return sum(p.numel() for p in self.parameters)


def by_product(products: HessianProducts, generator: torch.Generator) -> list[Tensor]:
    """``z (H z)`` with random signs z, whose mean is the Hessian's diagonal (Hutchinson 1990)."""
    like = products.parameters[0]
    signs = torch.randint(2, (products.size,), generator=generator).mul_(2).sub_(1).to(like)
    found = torch.split(signs * products(signs), [p.numel() for p in products.parameters])
    return [d.reshape(p.shape) for d, p in zip(found, products.parameters, strict=True)]


class Spectra:
    """Eigenvalues step by step: the smallest from the last one's vector, the largest from two.

    The gradient of a batch lies mostly in the leading eigenspace of its Hessian (Gur-Ari, Roberts,
    Dyer 2018); early in training it is closer to the leading eigenvector than that of the batch
    before is (their cosines are 0.6 and 0.3 on 3C3D), later the other way round (0.3 and 0.9). A
    run starts from the one that was closer in the last runs, with a little of the other for what
    the first has nothing of. Equal parts are closer to it by a little, but runs from them are less
    alike, and where their signs differ there is nothing left of it.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.vectors: dict[str, Tensor] = {}
        self.experience: dict[str, Experience] = {}

    def of(self, products: HessianProducts, need: Spectrum) -> tuple[float, float, float]:
        """The eigenvalue of largest magnitude; with both ends the largest and the smallest.

        The last number is how many products it took.
        """
        ends: tuple[End, ...] = ("largest", "smallest") if need.both else ("magnitude",)
        found = [self._end(products, end, need) for end in ends]
        taken = float(sum(each.products for each in found))
        return found[0].value, found[-1].value, taken

    def _end(self, products: HessianProducts, end: End, need: Spectrum) -> Ritz:
        held, experience = self.vectors.get(end), None
        like = products.parameters[0]
        if held is None or len(held) != products.size:
            held = torch.randn(products.size, generator=self.generator)
            self.experience.pop(end, None)
        wide = torch.promote_types(like.dtype, torch.float32)
        start = last = held.to(like.device, wide)
        gradient: Tensor | None = None
        if end != "smallest":
            gradient = products.start.to(wide)
            experience = self.experience.setdefault(end, Experience())
            parts = (last, gradient) if experience.turned else (gradient, last)
            start = _beside(*parts)
        found = extreme(products, start, end, need.products, need.tolerance, experience)
        if found.value != found.value:
            self.experience.pop(end, None)
            return found
        self.vectors[end] = found.vector
        if gradient is not None and experience is not None:
            experience.overlapped(*_cosines(found.vector, gradient, last))
        return found


def _beside(most: Tensor, little: Tensor) -> Tensor:
    """A vector, and a little of another for what the first has nothing of."""
    norms = [float(torch.linalg.vector_norm(each)) for each in (most, little)]
    if not all(isfinite(norm) and norm for norm in norms):
        return little if isfinite(norms[1]) and norms[1] else most
    return torch.add(most, little, alpha=LITTLE * norms[0] / norms[1])


def _cosines(vector: Tensor, *others: Tensor) -> list[float]:
    """The cosines of the angles between a vector and others; 0 where there is none."""
    norm = torch.linalg.vector_norm(vector)
    found = []
    for each in others:
        norms = norm * torch.linalg.vector_norm(each)
        found.append(float(torch.dot(vector, each) / norms) if norms else 0.0)
    return found
