"""The diagonal of a loss's Hessian in the model's outputs, where recursions over networks start."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tnconv.losses.roots import Bernoulli, Gaussian, Softmax, curvature, recognised

Method = Literal["hesscale", "gn", "bl89", "hesscale+"]
METHODS: tuple[Method, ...] = get_args(Method)
LossFunction = Callable[[Any, Any], Tensor]


class TwiceDifferentiable(Protocol):
    """A loss module that knows its second derivatives in single outputs."""

    def second_derivatives(self, output: Tensor, targets: Any) -> Tensor:
        """``∂²L / ∂y²`` of every output y, in the output's shape."""


def output_diagonal(
    loss_fn: LossFunction,
    output: Tensor,
    targets: Any,
    gradient: Tensor,
    method: Method = "hesscale",
) -> tuple[Tensor, Tensor | None]:
    """``s = diag ∂²L / ∂y²`` and, for "hesscale+", columns u with ``∂²L / ∂y² = diag(d) - u uᵀ``.

    Where there are columns, d takes the place of s. Losses are those of `tnconv.losses.curvature`
    and modules that are `TwiceDifferentiable`. ``method="bl89"`` takes cross-entropy for a function
    of single probabilities, as Becker & LeCun 1989 go backwards through softmax: with the targets'
    weights ``τ = a π - g``, where g is the loss's gradient and a its factor, it is ``τ (π - π²)``.

    Raises:
        NotImplementedError: another loss.
    """
    known = getattr(loss_fn, "second_derivatives", None)
    if known is not None:
        return known(output, targets), None
    if method in ("hesscale", "gn") and (labels := _plain(loss_fn, targets)) is not None:
        p, (count, mean) = output.softmax(1), labels
        s = torch.addcmul(p, p, p, value=-1)
        return s.mul_(count / count.sum() if mean else count), None
    found, columns = curvature(loss_fn, output, targets), None
    match found:
        case Softmax(y=y, factor=factor):
            p, a = y.softmax(1), factor.unsqueeze(1)
            if method == "bl89":
                s = (a * p - gradient.reshape(y.shape)) * (p - p * p)
            elif method == "hesscale+":
                s, columns = a * p, _columns(a.sqrt() * p, output.shape)
            else:
                s = a * (p - p * p)
        case Bernoulli(y=y, factor=factor):
            sigma = y.sigmoid()
            s = factor.unsqueeze(1) * (sigma - sigma * sigma)
        case Gaussian(factor=factor):
            s = factor.unsqueeze(1)
        case _:
            s = found.root().square().sum(2)
    return s.reshape(output.shape), columns


def is_nll(loss_fn: LossFunction) -> bool:
    """Whether a loss is the negative log-likelihood of log-probabilities."""
    inner = getattr(loss_fn, "func", loss_fn)
    own = isinstance(loss_fn, nn.NLLLoss) and type(loss_fn).forward is nn.NLLLoss.forward
    return own or inner is F.nll_loss


def cross_entropy_of(loss_fn: LossFunction) -> LossFunction:
    """The cross-entropy that, of logits, is this negative log-likelihood of ``log_softmax``."""
    if isinstance(loss_fn, nn.NLLLoss):
        ignored, reduction = loss_fn.ignore_index, loss_fn.reduction
        return nn.CrossEntropyLoss(loss_fn.weight, ignore_index=ignored, reduction=reduction)
    return partial(F.cross_entropy, **getattr(loss_fn, "keywords", {}))


def _plain(loss_fn: LossFunction, targets: Any) -> tuple[Tensor, bool] | None:
    """Of cross-entropy of labels with no weights: which of them count, and whether it is a mean."""
    function, settings = recognised(loss_fn)
    plain = function is F.cross_entropy and not targets.is_floating_point()
    if not plain or settings.get("weight") is not None or settings.get("label_smoothing"):
        return None
    count = targets.unsqueeze(1) != settings.get("ignore_index", -100)
    return count, settings.get("reduction", "mean") == "mean"


def _columns(u: Tensor, shape: torch.Size) -> Tensor:
    """``(n, c, p)`` as one column ``(*shape)`` for every position p, zero at the others."""
    apart = torch.diag_embed(u)  # (n, c, p, p)
    return apart.permute(3, 0, 1, 2).reshape(-1, *shape)
