"""Families of d x d matrices that are linear in few parameters: what a new one has to say.

A family is a diagram ``S[i, j] = Σ_e θ[e] E[e, i, j]`` from parameters θ to the dense matrix, where
every entry (i, j) has at most one parameter, which holds the identity and every product of two
members. All else follows from the diagram: products ``S X`` and ``Sᵀ X`` connect it to X, and the
projection Π of a symmetric matrix is given by one rule,

    sym(Π M) is the Frobenius-orthogonal projection of M onto sym(family),

that is ``(Π M)[e] = ⟨M, E[e]⟩ / w[e]`` with ``w[e] = ⟨sym E[e], sym Σ_f E[f]⟩``: entries below a
diagonal that have no partner above it count twice. Source: Lin et al. 2024, "Structured
inverse-free natural gradient", section 3.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod

import torch
from torch import Tensor

from tnconv import diagrams
from tnconv.codegen import Program
from tnconv.codegen.tiers import Build, device_of, looked_up
from tnconv.diagrams import Axis, Expression, Sum, TensorNetwork, View
from tnconv.diagrams.affine import Sizes

COLUMNS = 64
"""So many columns of a matrix are formed at a time where a family has no better way."""


@dataclass(frozen=True)
class Structure(ABC):
    """A family of ``size`` x ``size`` matrices; a member is the tensor ``(..., count)`` of its θ.

    Leading dimensions are several members, or groups. A new family is a frozen dataclass with a
    `diagram`; `verify` tells whether that is a family. Methods after it can be overridden where
    there is a faster way than the compiled diagram.

    >>> @dataclass(frozen=True)
    ... class Multiples(Structure):
    ...     def diagram(self):
    ...         sizes = {"one": 1, "i": self.size}
    ...         node = diagrams.Tensor("parameters", View.of(sizes, "one"))
    ...         return TensorNetwork((node,), View.of(sizes, "i", "i"), sizes)
    >>> Multiples(3).verify().project(torch.diag(torch.tensor([1.0, 2.0, 6.0])))
    tensor([3.])

    Args:
        size: the number of rows and columns, d.
    """

    size: int

    @property
    def sufficient(self) -> bool:
        """Whether ``Π(Sᵀ M S)`` needs no more of M than M's own ``⟨M, E[e]⟩``: see `congruence`."""
        return False

    def congruence(self, member: Tensor, entries: Tensor) -> Tensor:
        """``Π(Sᵀ M S)`` of a symmetric matrix M, from its inner products ``⟨M, E[e]⟩``.

        Raises:
            NotImplementedError: a family for which these are not `sufficient`.
        """
        name = f"{type(self).__name__}({self.size})"
        raise NotImplementedError(f"{name} needs more of a matrix than its own entries")

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size is {self.size}; expected at least 1")

    @abstractmethod
    def diagram(self) -> Expression:
        """From the operand ``parameters``, of shape (count,), to the matrix."""

    @cached_property
    def count(self) -> int:
        """The number of parameters."""
        return prod(self.diagram().operands["parameters"])

    def matmat(self, member: Tensor, x: Tensor) -> Tensor:
        """``S X`` for x of shape (..., size, columns)."""
        return self._multiplied(member, x, False)

    def rmatmat(self, member: Tensor, x: Tensor) -> Tensor:
        """``Sᵀ X`` for x of shape (..., size, columns)."""
        return self._multiplied(member, x, True)

    def outer(self, member: Tensor, x: Tensor) -> Tensor:
        """``S Sᵀ X`` for x of shape (..., size, columns)."""
        return self.matmat(member, self.rmatmat(member, x))

    def inner_products(self, y: Tensor, z: Tensor | None = None) -> Tensor:
        """``⟨Y Zᵀ, E[e]⟩`` for Y and Z of shape (..., size, columns), Z = Y by default."""
        return self._paired(y, y if z is None else z)

    def product(self, first: Tensor, second: Tensor) -> Tensor:
        """The member ``S T``."""
        total = torch.zeros_like(first)
        for unit in self._columns(first):
            column = self.matmat(first, self.matmat(second, unit))
            total = total + self.inner_products(column, unit)
        return total / self.multiplicities(first)

    def inner(self, member: Tensor, x: Tensor | None = None) -> Tensor:
        """``Π(Sᵀ X Xᵀ S)`` for x of shape (..., size, columns), or ``Π(Sᵀ S)``."""
        if x is not None:
            return self.inner_products(self.rmatmat(member, x)) / self.weights(member)
        rows = (self.rmatmat(member, unit) for unit in self._columns(member))
        return sum(map(self.inner_products, rows), torch.zeros_like(member)) / self.weights(member)

    def taken(self, matrix: Tensor) -> Tensor:
        """``⟨M, E[e]⟩`` of a matrix (..., size, size)."""
        unit = torch.eye(self.size, dtype=matrix.dtype, device=matrix.device).expand_as(matrix)
        return self.inner_products(matrix.contiguous(), unit)

    def project(self, matrix: Tensor) -> Tensor:
        """``Π M`` of a symmetric matrix (..., size, size)."""
        return self.taken(matrix) / self.weights(matrix)

    def dense(self, member: Tensor) -> Tensor:
        """The matrix itself, (..., size, size)."""
        unit = torch.eye(self.size, dtype=member.dtype, device=member.device)
        return self.matmat(member, unit.expand(*member.shape[:-1], -1, -1))

    def identity(self, like: Tensor) -> Tensor:
        """The identity's θ, of ``like``'s dtype and device."""
        return self._constant("identity", like)

    def weights(self, like: Tensor) -> Tensor:
        """``w[e]``, what Π divides by."""
        return self._constant("weights", like)

    def multiplicities(self, like: Tensor) -> Tensor:
        """``⟨E[e], E[e]⟩``, how many entries have the parameter."""
        return self._constant("multiplicities", like)

    def trace(self, member: Tensor) -> Tensor:
        """``tr S``, (...)."""
        return (member * (self.identity(member) * self.multiplicities(member))).sum(-1)

    def squared_norm(self, member: Tensor) -> Tensor:
        """``tr SᵀS``, (...)."""
        return (member.square() * self.multiplicities(member)).sum(-1)

    def verify(self) -> "Structure":
        """Check that this is a family, by dense matrices: for tests and small sizes.

        Raises:
            ValueError: two parameters at one entry, no identity, products that are no members, or
                a projection that is not orthogonal.
        """
        one, other = torch.randn(2, self.count, dtype=torch.float64).unbind()
        unit = torch.eye(self.size, dtype=torch.float64).expand(self.count, -1, -1)
        each = Structure.matmat(self, torch.eye(self.count, dtype=torch.float64), unit)
        name = type(self).__name__
        if ((each != 0).sum(0) > 1).any() or ((each != 0) & (each != 1)).any():
            raise ValueError(f"{name}({self.size}) has an entry that is not 0 or one parameter")
        if not torch.allclose(self.dense(self.identity(one)), unit[0]):
            raise ValueError(f"{name}({self.size}) does not hold the identity")
        first, second = self.dense(one), self.dense(other)
        if not torch.allclose(self.dense(self.product(one, other)), first @ second):
            raise ValueError(f"{name}({self.size}) does not hold the product of two members")
        symmetric = first + first.mT + second @ second.mT
        left = symmetric - self.dense(self.project(symmetric))
        if not torch.allclose(
            (left + left.mT).mul(each).sum((1, 2)) / self.size, each.new_zeros(1)
        ):
            raise ValueError(f"{name}({self.size}) has no orthogonal projection of this kind")
        return self

    def constants(self) -> dict[str, Tensor]:
        """By the rule, from the diagram alone: in float64, one number where all are equal."""
        ones = torch.ones(self.count, dtype=torch.float64)
        found = {name: torch.zeros_like(ones) for name in ("weights", "multiplicities", "trace")}
        for unit in self._columns(ones):
            column = Structure.matmat(self, ones, unit)
            same = self._paired(column, unit)
            found["multiplicities"] += same
            found["weights"] += (same + self._paired(unit, column)) / 2
            found["trace"] += self._paired(unit, unit)
        return found | {"identity": found["trace"] / found["multiplicities"]}

    def _constant(self, name: str, like: Tensor) -> Tensor:
        return _constant(self, name, like.dtype, like.device)

    def _columns(self, like: Tensor) -> Iterator[Tensor]:
        """The identity, some columns at a time: (..., size, columns)."""
        for start in range(0, self.size, COLUMNS):
            width = min(COLUMNS, self.size - start)
            unit = like.new_zeros(self.size, width)
            unit[start : start + width].fill_diagonal_(1)
            yield unit.expand(*like.shape[:-1], -1, -1)

    def _multiplied(self, member: Tensor, x: Tensor, transposed: bool) -> Tensor:
        lead = _lead(member.shape[:-1], x.shape[:-2])
        operands = {"parameters": (member, 1), "x": (x, 2)}
        return self._run(_product, operands, lead, x.shape[-1], transposed).to(member.dtype)

    def _paired(self, y: Tensor, z: Tensor) -> Tensor:
        lead = _lead(y.shape[:-2], z.shape[:-2])
        operands = {"y": (y, 2), "z": (z, 2)}
        return self._run(_inner_products, operands, lead, y.shape[-1]).to(y.dtype)

    def _run(
        self,
        make: Callable[..., Expression],
        operands: Mapping[str, tuple[Tensor, int]],  # with the number of their last dimensions
        lead: tuple[int, ...],
        columns: int,
        *settings: bool,
    ) -> Tensor:
        """A compiled diagram; half precision is computed in float32."""
        flat = {
            name: each.to(wide(each))
            .expand(*lead, *each.shape[-own:])
            .reshape(-1, *each.shape[-own:])
            for name, (each, own) in operands.items()
        }
        first = next(iter(flat.values()))
        what = make, self, len(first), columns, *settings
        program = looked_up(_program, device_of(first), *what)
        found: Tensor = program.run(*[flat[name] for name in program.operands])
        return found.reshape(*lead, *found.shape[1:])


@lru_cache(maxsize=512)
def _constant(structure: Structure, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Equal families share them."""
    return structure.constants()[name].to(dtype=dtype, device=device)


def _lead(first: torch.Size, second: torch.Size) -> tuple[int, ...]:
    """The leading dimensions of a result."""
    return tuple(torch.broadcast_shapes(first, second))  # type: ignore[no-untyped-call]


def wide(tensor: Tensor) -> torch.dtype:
    """The dtype that matrices are computed in."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _program(
    compiled: Build,
    device: str,
    make: Callable[..., Expression],
    structure: Structure,
    members: int,
    columns: int,
    *settings: bool,
) -> Program[Tensor]:
    return compiled(make(structure.diagram(), members, columns, *settings), device=device)


def _product(matrix: Expression, members: int, columns: int, transposed: bool) -> Expression:
    """``y[b, i, q] = Σ_j S[b, i, j] x[b, j, q]``, or with S transposed."""
    terms = []
    for term in matrix.terms:
        sizes = dict(term.sizes) | {"b": members, "q": columns}
        rows, own = _sides(term)
        rows, own = (own, rows) if transposed else (rows, own)
        nodes = [_with_members(node, sizes) for node in term.nodes]
        nodes.append(diagrams.Tensor("x", _framed(own, sizes)))
        terms.append(term.with_(nodes, _framed(rows, sizes), sizes))
    return Sum(tuple(terms))


def _inner_products(matrix: Expression, members: int, columns: int) -> Expression:
    """``m[b, e] = Σ_{i,j,q} E[e, i, j] y[b, i, q] z[b, j, q]``."""
    terms = []
    for term in matrix.terms:
        sizes = dict(term.sizes) | {"b": members, "q": columns}
        rows, own = _sides(term)
        nodes: list[diagrams.Node] = [n for n in term.nodes if not isinstance(n, diagrams.Tensor)]
        nodes += [
            diagrams.Tensor("y", _framed(rows, sizes)),
            diagrams.Tensor("z", _framed(own, sizes)),
        ]
        (view,) = (node.view for node in term.tensors)
        terms.append(term.with_(nodes, view.prepend(sizes, ("b",)), sizes))
    return Sum(tuple(terms))


def _sides(term: TensorNetwork) -> tuple[tuple[Axis, ...], tuple[Axis, ...]]:
    """The result's axes that are the rows, and those that are the columns."""
    axes, size = term.result.axes, term.shape[0]
    for at in range(len(axes) + 1):
        if prod(axis.size for axis in axes[:at]) == size:
            rest = axes[at:]
            if prod(axis.size for axis in rest) == size:
                return axes[:at], rest
    raise ValueError(f"a matrix of shape {term.shape} has axes that are rows and columns at once")


def _framed(axes: tuple[Axis, ...], sizes: Sizes) -> View:
    """Rows or columns, between members and columns of another matrix."""
    b, q = (Axis(sizes[leg], 0, ((leg, 1),)) for leg in "bq")
    shape = sizes["b"], prod(axis.size for axis in axes), sizes["q"]
    return View(shape, (b, *axes, q))


def _with_members(node: diagrams.Node, sizes: Sizes) -> diagrams.Node:
    if not isinstance(node, diagrams.Tensor):
        return node
    return node.read_through(node.view.prepend(sizes, ("b",)))
