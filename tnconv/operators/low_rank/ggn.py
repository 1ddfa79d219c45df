"""Gauss-Newton matrices of mini-batches by their low rank: a block for each group of parameters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from tnconv.given import instances
from tnconv.losses.reductions import batch_size, reduction_of
from tnconv.models.computing import Inputs
from tnconv.models.propagation import LossFunction
from tnconv.operators.low_rank.batch_parts import Batch
from tnconv.operators.low_rank.block import (
    Criterion,
    DirectionalDerivatives,
    Eigenpairs,
    Gradients,
    LowRankBlock,
    Named,
)
from tnconv.operators.low_rank.damping import Damping
from tnconv.operators.low_rank.orders import Orders, check_orders
from tnconv.operators.low_rank.parameter_groups import Groups, partition
from tnconv.operators.low_rank.row_products import Rows
from tnconv.operators.low_rank.sources import LossGradients, WithGradient
from tnconv.operators.low_rank.within_limit import Limit
from tnconv.operators.parameter_space import Space
from tnconv.quantities.second_order import Fisher, columns

if TYPE_CHECKING:
    import numpy as np

V = TypeVar("V", bound="Tensor | Mapping[str, Tensor] | np.ndarray[Any, Any]")


def low_rank_ggn(
    model: nn.Module,
    loss_fn: LossFunction,
    inputs: Inputs,
    targets: Any,
    *,
    fisher: Fisher = "type-2",
    samples: int = 1,
    generator: torch.Generator | None = None,
    curvature_samples: Sequence[int] | Tensor | None = None,
    gradient_samples: Sequence[int] | Tensor | None = None,
    groups: Groups = "network",
    memory_limit: int | None = None,
    order: Orders = "auto",
    batch_dim: int = 0,
) -> "LowRankGGN":
    """The Gauss-Newton matrix of ``loss_fn(model(inputs), targets)``, in factors.

    Args:
        model: Any model that `tnconv.compute` takes; its layers must keep samples apart.
        loss_fn: A loss whose Hessian's root is known: cross-entropy, squared errors, binary
            cross-entropy of logits, absolute errors.
        inputs: The model's input, or a sequence or mapping of its arguments, batch first.
        targets: The targets of the batch.
        fisher: ``"type-2"`` columns of the root, or ``"mc"``, which are sampled.
        samples: The number of sampled columns for each sample of the batch.
        generator: Where they are drawn; torch's default generator where it is None.
        curvature_samples: Positions in the batch that the curvature is made of; all by default.
            Estimates are scaled to be unbiased for the whole batch.
        gradient_samples: Positions in the batch whose gradients are used for slopes and steps.
        groups: ``"network"``, ``"layer"``, ``"parameter"``, or a mapping from names of blocks to
            names of parameters; the matrix is block-diagonal over them, and zero elsewhere.
        memory_limit: How many bytes vectors, products of one parameter and Gram matrices may hold
            beside what autograd does. Where vectors after all layers take more than half of it,
            they are not held, but go backwards again for every product: as many at a time as fit,
            in b blocks for a Gram matrix, each of which goes backwards b - 1 times. Eigenvectors
            and other results in the parameters' shapes are not counted.
        order: How Gram matrices are contracted: ``"auto"``, one of ``"parameter_space"``,
            ``"data_space"``, ``"mixed"``, ``"one_sided"`` and ``"pixel_gram"``, or a mapping from
            names of parameters to these; see `JacobianRows`.
        batch_dim: The dimension of the inputs that is the batch; targets have it in front.

    >>> model, loss_fn = nn.Linear(3, 4), nn.CrossEntropyLoss()
    >>> ggn = low_rank_ggn(model, loss_fn, torch.rand(8, 3), torch.randint(4, (8,)))
    >>> ggn.gram.shape, {name: tuple(s.shape) for name, s in ggn.newton_step(0.1).items()}
    (torch.Size([24, 24]), {'weight': (4, 3), 'bias': (4,)})

    Raises:
        NotImplementedError: a loss without a known root, a layer that mixes samples, or one that
            has no diagram.
        ValueError: positions outside the batch or repeated, an empty subset, repeated or foreign
            names in groups, an unknown order, or a memory limit below what is needed:
            `TooLittleMemory`, which has the ``least`` that would do.
    """
    instances(model=model, loss_fn=loss_fn)
    batch = Batch(model, loss_fn, inputs, targets, batch_size(inputs, batch_dim), batch_dim)
    curved = batch.positions("curvature_samples", curvature_samples)
    used = batch.positions("gradient_samples", gradient_samples)
    named = dict(model.named_parameters())
    learned = [name for name, p in named.items() if p.requires_grad]
    source, names = columns(fisher, samples, generator), partition(learned, groups)
    check_orders(order, named)
    limit = Limit(memory_limit, order, len(names))
    if used == curved:
        joined = WithGradient(source, fisher == "type-2")
        rows, scale, gradients = parted(limit.rows(batch.with_vectors(joined, curved)), joined)
    else:
        rows, other = limit.both(
            batch.with_vectors(source, curved), batch.with_vectors(LossGradients(), used)
        )
        scale = torch.ones(rows.vectors, rows.samples).to(rows.device, rows.dtype)
        gradients = Gradients(other, torch.ones(1).to(scale))
    averages = reduction_of(loss_fn) == "mean"
    scales = averages, batch.scale(curved), batch.scale(used)
    return blocked(names, rows, scale, gradients, *scales)


def parted(
    rows: Rows, source: WithGradient, chosen: Sequence[int] | None = None
) -> tuple[Rows, Tensor, Gradients]:
    """Of rows from a source, of chosen samples, the columns', their scale, and the gradients."""
    if (root := source.roots[-1]) is not None:
        scale = root.scale if chosen is None else root.scale[:, list(chosen)]
        return rows, scale, Gradients(rows, root.gradient_weights)
    weights = torch.zeros(rows.vectors).to(rows.device, rows.dtype)
    weights[-1:] = 1
    scale = weights.new_ones(max(0, rows.vectors - 1), rows.samples)
    return rows, scale, Gradients(rows, weights)


def blocked(
    names: Mapping[str, Sequence[str]],
    rows: Rows,
    scale: Tensor,
    gradients: Gradients,
    averages: bool,
    curvature_scale: float = 1.0,
    gradient_scale: float = 1.0,
) -> "LowRankGGN":
    """The matrix with a block for each list of names; the other arguments are the blocks'."""
    blocks = {}
    for name, own in names.items():
        part = rows.only(own)
        same = part if gradients.rows is rows else gradients.rows.only(own)
        both = part, scale, Gradients(same, gradients.weights)
        blocks[name] = LowRankBlock(*both, averages, curvature_scale, gradient_scale)
    return LowRankGGN(blocks, {name: rows.like[name] for own in names.values() for name in own})


@dataclass(frozen=True, eq=False, repr=False)
class LowRankGGN:
    """A Gauss-Newton matrix with blocks of low rank; see `low_rank_ggn`.

    Vectors are flat, in the order of ``names``, or mappings by parameter name. Where there is one
    block, its Gram matrix, eigenpairs and derivatives are methods here as well; where there are
    several, they are those of ``blocks[name]``.
    """

    blocks: Mapping[str, LowRankBlock]
    like: Mapping[str, Tensor]

    def __repr__(self) -> str:
        blocks = f"{len(self.blocks)} block{'s' * (len(self.blocks) != 1)}"
        return f"<LowRankGGN of shape {self.shape}: {len(self.like)} parameters in {blocks}>"

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters, in the order of flat vectors."""
        return tuple(self.like)

    @cached_property
    def space(self) -> Space:
        """Where its vectors live."""
        return Space(self.names, tuple(self.like.values()))

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns: entries of all parameters."""
        return self.space.size, self.space.size

    @property
    def dtype(self) -> "np.dtype[Any]":
        """The dtype of products with arrays, NumPy's."""
        return self.space.array_dtype

    @property
    def block(self) -> LowRankBlock:
        """The only block.

        Raises:
            ValueError: there are several.
        """
        if len(self.blocks) != 1:
            names = ", ".join(self.blocks)
            raise ValueError(
                f"there are {len(self.blocks)} blocks; expected one of blocks[{names}]"
            )
        return next(iter(self.blocks.values()))

    @property
    def gram(self) -> Tensor:
        """`LowRankBlock.gram` of the only block."""
        return self.block.gram

    def eigvalsh(self) -> Tensor:
        """The eigenvalues of all blocks' Gram matrices in descending order."""
        found = torch.cat([block.eigvalsh() for block in self.blocks.values()])
        return found.sort(descending=True).values

    def eigh(self, k: int | None = None, criterion: Criterion | None = None) -> Eigenpairs:
        """`LowRankBlock.eigh` of the only block."""
        return self.block.eigh(k, criterion)

    def directional_derivatives(
        self, directions: Eigenpairs | Named | None = None, k: int | None = None
    ) -> DirectionalDerivatives:
        """`LowRankBlock.directional_derivatives` of the only block."""
        return self.block.directional_derivatives(directions, k)

    def newton_step(
        self, damping: float | Tensor | Damping, k: int | None = None
    ) -> dict[str, Tensor]:
        """`LowRankBlock.newton_step` of every block: k directions in each."""
        return self._joined({n: b.newton_step(damping, k) for n, b in self.blocks.items()})

    def gradient(self) -> dict[str, Tensor]:
        """The loss's gradient by name, as a combination of rows that are there anyway.

        Where ``gradient_samples`` were chosen, it is their unbiased estimate.
        """
        return self._joined({name: block.gradient() for name, block in self.blocks.items()})

    def __matmul__(self, vector: V) -> V:
        """``G v``, in the form of v.

        Raises:
            ValueError: another shape or other names.
        """
        return self._map(vector, lambda block, own: block.product(own))

    def matvec(self, vector: V) -> V:
        """``G v``, as SciPy's linear operators have it."""
        return self @ vector

    rmatvec = matvec  # the matrix is symmetric

    def solve(self, vector: V, damping: float) -> V:
        """``(G + δ I)⁻¹ v``, exactly, in the form of v.

        Raises:
            ValueError: a damping that is not positive, another shape or other names.
        """
        return self._map(vector, lambda block, own: block.solve(own, damping))

    def logdet(self, damping: float) -> Tensor:
        """``log det(G + δ I)``.

        Raises:
            ValueError: a damping that is not positive.
        """
        return torch.stack([block.logdet(damping) for block in self.blocks.values()]).sum()

    def trace(self) -> Tensor:
        """``Σ_i G[i, i]``."""
        return torch.stack([block.trace() for block in self.blocks.values()]).sum()

    def frobenius_norm(self) -> Tensor:
        """``√(Σ_{i,j} G[i, j]²)``."""
        norms = torch.stack([block.frobenius_norm() for block in self.blocks.values()])
        return norms.square().sum().sqrt()

    def diagonal(self) -> dict[str, Tensor]:
        """``G[i, i]`` in the parameters' shapes, by name."""
        return self._joined({name: block.diagonal() for name, block in self.blocks.items()})

    def _map(self, vector: V, function: Any) -> V:
        if isinstance(vector, Mapping):
            return cast(V, self._mapped(vector, function))
        flat = vector if isinstance(vector, Tensor) else self.space.from_array(vector)
        given = dict(zip(self.names, self.space.split(flat), strict=True))
        found = self.space.join(tuple(self._mapped(given, function).values()))
        return cast(V, found if isinstance(vector, Tensor) else self.space.to_array(found))

    def _mapped(self, vector: Named, function: Any) -> dict[str, Tensor]:
        given = dict(zip(self.names, self.space.vector(vector), strict=True))
        return self._joined(
            {
                name: function(block, {own: given[own] for own in block.rows.like})
                for name, block in self.blocks.items()
            }
        )

    def _joined(self, found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        every = {name: value for each in found.values() for name, value in each.items()}
        return {name: every[name] for name in self.names}
