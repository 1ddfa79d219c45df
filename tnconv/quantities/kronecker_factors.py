"""Kronecker-factored blocks of the Gauss-Newton or Fisher matrix ``Σ_{m,n} J[m, n] J[m, n]ᵀ``.

A layer's per-sample gradients are ``J[m, n, g, d, a] = Σ_o v[m, n, g, d, o] U[n, g, a, o]``, with
the patches U that its weight meets at output positions o, in groups g. One group's block of the
matrix is approximated by ``B ⊗ A``; the table in `tnconv.diagrams.kronecker` states both factors
and their scales, for every flavour, Fisher and reduction of the loss. Sources: Martens & Grosse
2015; Grosse & Martens 2016; Eschenhagen et al. 2023.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from tnconv import diagrams
from tnconv.diagrams import Expression, TensorNetwork
from tnconv.diagrams.kronecker import Convention, Flavour
from tnconv.diagrams.roles import sample_count
from tnconv.displays import shown_tuple
from tnconv.quantities.base import LOSS_GRADIENT, Quantity, Statistic, Vectors
from tnconv.quantities.columns import ExactColumns, NoColumns, SampledColumns

Fisher = Literal["type-2", "mc", "empirical", "forward-only"]
Reduction = Literal["mean", "sum"]


class KroneckerFactors(NamedTuple):
    """One parameter's blocks ``B[g] ⊗ A[g]``: ``input`` is A ``(g, a, a)``, ``grad_output`` B.

    Rows of B ``(g, d, d)`` are a group's output channels; those of A its input channels, then
    kernel positions, each in the parameter's own order.
    """

    input: Tensor
    grad_output: Tensor

    def __repr__(self) -> str:
        return shown_tuple(self)

    @property
    def blocks(self) -> Tensor:
        """``B ⊗ A``, of shape ``(g, d·a, d·a)``.

        >>> KroneckerFactors(torch.ones(2, 3, 3), torch.ones(2, 4, 4)).blocks.shape
        torch.Size([2, 12, 12])
        """
        groups, entries = len(self.input), self.input.shape[1] * self.grad_output.shape[1]
        product = torch.einsum("gde,gab->gdaeb", self.grad_output, self.input)
        return product.reshape(groups, entries, entries)


@dataclass(frozen=True)
class KFAC(Quantity[KroneckerFactors]):
    """The factors of each parameter's block of the matrix of the loss that was given.

    ``fisher`` says which vectors v are: all columns of a root of the loss's Hessian ("type-2"), so
    many ``samples`` of them from ``generator`` ("mc"), the gradients of each sample's own loss
    ("empirical"), or none, with B the identity ("forward-only"). Only "empirical" needs to know the
    loss's ``reduction``, and only it is possible in a loop of the user's own. A mean
    ``L = 1/D Σ_n l_n`` has ``1/D Σ_n ∂l_n ∂l_nᵀ``, as in `tnconv.FisherOperator`: D counts entries
    for squared errors, or whatever a known loss divides by; in a loop, where the loss is not known,
    samples.

    ``joint`` ends the patches of weights with an entry 1: the factors of weight and bias as one
    block. ``per_group=False`` takes the mean over groups, as other libraries do (inexact).
    ``scale`` is "ggn", or "kfc" for the papers' factors, whose product differs for "hybrid" alone.

    >>> import tnconv
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3, groups=2), torch.nn.Flatten())
    >>> kfac, x, y = KFAC("reduce", "mc", samples=2), torch.rand(8, 4, 5, 5), torch.rand(8, 54)
    >>> factors = tnconv.compute(model, torch.nn.MSELoss(), x, y, [kfac])[kfac]["0.weight"]
    >>> factors.input.shape, factors.grad_output.shape
    (torch.Size([2, 18, 18]), torch.Size([2, 3, 3]))

    Args:
        flavour: "expand", "reduce" or "hybrid": how positions count.
        fisher: "type-2", "mc", "empirical" or "forward-only".
        samples: vectors per sample for "mc".
        generator: where "mc" draws from.
        joint: whether weight and bias are one block.
        per_group: whether groups have factors of their own.
        reduction: that of the loss, for "empirical" in a loop of the user's own.
        scale: "ggn" or "kfc".

    Raises:
        ValueError: a flavour, Fisher or reduction that there is not, or fewer than one sample.
    """

    flavour: Flavour = "expand"
    fisher: Fisher = "mc"
    samples: int = 1
    generator: torch.Generator | None = None
    joint: bool = False
    per_group: bool = True
    reduction: Reduction = "mean"
    scale: Convention = "ggn"

    counts: ClassVar[Literal["samples", "divisor"]] = "divisor"

    def __post_init__(self) -> None:
        kinds = {"flavour": Flavour, "fisher": Fisher, "reduction": Reduction}
        kinds["scale"] = Convention
        for name, kind in kinds.items():
            if getattr(self, name) not in get_args(kind):
                words = ", ".join(map(repr, get_args(kind)))
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {words}")
        if self.samples < 1:
            raise ValueError(f"samples is {self.samples}; expected at least 1")

    @property
    def vectors(self) -> Vectors:
        """Where the vectors v come from."""
        if self.fisher == "mc":
            return SampledColumns(self.samples, self.generator)
        every = {"type-2": ExactColumns(), "empirical": LOSS_GRADIENT}
        return every.get(self.fisher, NoColumns())

    def statistics(self) -> Mapping[str, Statistic]:
        v, a = self.vectors, (self.flavour, self.joint, self.per_group, self.scale)
        b = (self.flavour, self.per_group, self.scale)
        return {
            "count": Statistic(sample_count, parts="same", vectors=v),
            "input": Statistic(_input_factor, a, factored=True, parts="same", vectors=v),
            "grad_output": Statistic(_output_factor, b, factored=True, parts="sum", vectors=v),
        }

    def result(self, found: Mapping[str, Tensor], samples: float) -> KroneckerFactors:
        b = found["grad_output"]
        count, a = (found[name].to(b) for name in ("count", "input"))
        if self.fisher == "forward-only":
            b = b + torch.eye(b.shape[-1], dtype=b.dtype, device=b.device)
        elif self.fisher == "empirical" and self.reduction == "mean":
            b = samples * b
        return KroneckerFactors(a / count.clamp(min=1), b)


@dataclass(frozen=True)
class KFLR(KFAC):
    """`KFAC` from all columns of a root of the loss's Hessian, by default as BackPACK has it.

    Source: Botev et al. 2017.

    >>> KFLR().fisher, KFLR().flavour, KFLR().scale
    ('type-2', 'hybrid', 'kfc')

    Args:
        flavour: "expand", "reduce" or "hybrid": how positions count.
        joint: whether weight and bias are one block.
        per_group: whether groups have factors of their own.
        scale: "ggn" or "kfc".
    """

    flavour: Flavour = "hybrid"
    fisher: Fisher = field(default="type-2", init=False)
    samples: int = field(default=1, init=False)
    generator: torch.Generator | None = field(default=None, init=False)
    reduction: Reduction = field(default="mean", init=False)
    scale: Convention = "kfc"


def factor_statistic(output: bool, flavour: Flavour, joint: bool) -> Statistic:
    """One of both factors, as a statistic by itself, with the scales of "ggn" per group."""
    if output:
        return Statistic(_output_factor, (flavour, True, "ggn"), factored=True)
    return Statistic(_input_factor, (flavour, joint, True, "ggn"), factored=True)


def _input_factor(
    layer: TensorNetwork, operand: str, vectors: int | None, *settings: Any
) -> Expression:
    return diagrams.input_factor(factored(layer, operand), operand, *settings)


def _output_factor(
    layer: TensorNetwork, operand: str, vectors: int | None, *settings: Any
) -> Expression:
    return diagrams.output_factor(factored(layer, operand), operand, vectors, *settings)


def factored(layer: TensorNetwork, operand: str) -> TensorNetwork:
    """The layer itself, if it shows inputs and output gradients apart.

    Raises:
        NotImplementedError: a layer of which nothing but per-sample gradients is known.
    """
    if operand == "parameter":
        raise NotImplementedError(
            f"a parameter of shape {layer.operands[operand]} is used by no layer with a diagram, "
            "or by layers of several kinds; Kronecker factors need one"
        )
    return layer
