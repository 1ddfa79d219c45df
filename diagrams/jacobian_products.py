"""Products with all per-sample gradients of a layer at once, ``J[m, n, θ]`` as a matrix.

Rows are pairs of a vector m and a sample n, columns the entries of an operand θ of the layer. With
the rows as a root of the Gauss-Newton matrix, ``G = Jᵀ J``, these two products are everything that
low-rank methods need beside the Gram matrix ``J Jᵀ`` (`tnconv.diagrams.gradient_dots`): combining
rows turns eigenvectors of the Gram matrix into eigenvectors of G, projecting onto them gives slopes
and curvatures (Dangel, Tatzel & Hennig 2022, ViViT). J itself is never formed where another order
of contraction is cheaper.
"""

from tnconv.diagrams.affine import Tensor, View
from tnconv.diagrams.expression import Expression
from tnconv.diagrams.gradients import per_sample_gradients
from tnconv.diagrams.network import TensorNetwork


def combined_gradients(
    layer: Expression, operand: str = "weight", vectors: int | None = None, combinations: int = 1
) -> TensorNetwork:
    """``r[f, θ] = Σ_{m,n} c[f, m, n] J[m, n, θ]``, of shape ``(f, *operand)``.

    Args:
        layer: A layer with batch; its operands are read, with ``grad_output`` as the cotangent.
        operand: The operand θ.
        vectors: The number of vectors m in ``grad_output`` ``(m, n, *o)``; None for ``(n, *o)``.
        combinations: The number of combinations f in the operand ``coefficients`` ``(f, m, n)``, or
            ``(f, n)`` where ``vectors`` is None.

    >>> from tnconv.diagrams import linear
    >>> combined_gradients(linear((8, 3), (4, 3)), vectors=2, combinations=5).shape
    (5, 4, 3)

    Raises:
        ValueError: a layer without batch, or without the operand.
    """
    j, rows = _rows(layer, operand, vectors, combinations)
    coefficients = Tensor("coefficients", View.of(j.sizes, "f", *rows))
    axes = j.result.axes[len(rows) :]
    result = View(j.result.shape[len(rows) :], axes).prepend(j.sizes, ("f",))
    return j.with_((*j.nodes, coefficients), result)


def gradient_projections(
    layer: Expression, operand: str = "weight", vectors: int | None = None, directions: int = 1
) -> TensorNetwork:
    """``p[f, m, n] = Σ_θ J[m, n, θ] u[f, θ]``, of shape ``(f, m, n)``; ``(f, n)`` without vectors.

    Args:
        layer: A layer with batch; its operands are read, with ``grad_output`` as the cotangent.
        operand: The operand θ.
        vectors: The number of vectors m in ``grad_output`` ``(m, n, *o)``; None for ``(n, *o)``.
        directions: The number of directions k in the operand ``directions`` ``(f, *operand)``.

    >>> from tnconv.diagrams import linear
    >>> gradient_projections(linear((8, 3), (4, 3)), vectors=2, directions=5).shape
    (5, 2, 8)

    Raises:
        ValueError: a layer without batch, or without the operand.
    """
    j, rows = _rows(layer, operand, vectors, directions)
    theta = View(j.result.shape[len(rows) :], j.result.axes[len(rows) :])
    given = Tensor("directions", theta.prepend(j.sizes, ("f",)))
    return j.with_((*j.nodes, given), View.of(j.sizes, "f", *rows))


def _rows(
    layer: Expression, operand: str, vectors: int | None, count: int
) -> tuple[TensorNetwork, tuple[str, ...]]:
    """J with another leg f of a size, and the legs of its rows."""
    j = per_sample_gradients(layer, operand, vectors)
    rows = ("n",) if vectors is None else ("m", "n")
    return j.with_(sizes={**j.sizes, "f": count}), rows
