"""Linear and affine maps of one parameter as a matrix."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tnconv.geometry.elementwise_maps import expect_names
from tnconv.geometry.layer_matrices import Rows
from tnconv.geometry.points import Point
from tnconv.geometry.reparametrization import Reparametrization


class KroneckerAffine(Reparametrization):
    """``ψ = Q W Pᵀ + B`` for one parameter as a matrix W ``(d, a)``, or one for each group.

    By default rows are its first dimension. With a model they are a layer's outgoing channels, and
    columns incoming channels and taps: also of grouped and transposed convolutions. KFAC's metric
    follows such maps.

    Args:
        name: the parameter's name.
        left: Q ``(d, d)``, or one for each group ``(g, d, d)``.
        right: P ``(a, a)``, likewise.
        shift: B, in the parameter's shape.
        model: whose layer says how the parameter is a matrix.

    >>> map = KroneckerAffine("weight", 2 * torch.eye(3), torch.eye(4))
    >>> map.log_abs_det({"weight": torch.rand(3, 4)})
    tensor(8.3178)

    Raises:
        ValueError: matrices that are not square.
    """

    linear = True

    def __init__(
        self,
        name: str,
        left: Tensor,
        right: Tensor,
        shift: Tensor | None = None,
        model: nn.Module | None = None,
    ) -> None:
        for word, matrix in (("left", left), ("right", right)):
            if matrix.dim() not in (2, 3) or matrix.shape[-2] != matrix.shape[-1]:
                given = tuple(matrix.shape)
                raise ValueError(f"{word} has shape {given}; expected a square, or one per group")
        self.name, self.left, self.right = name, left, right
        self.shift, self.model = shift, model

    def forward(self, theta: Point) -> Point:
        def apply(w: Tensor) -> Tensor:
            return self.left @ w @ self.right.mT

        return self._changed(theta, apply, lambda y: y if self.shift is None else y + self.shift)

    def inverse(self, psi: Point) -> Point:
        def apply(w: Tensor) -> Tensor:
            once = torch.linalg.solve(self.left, w)
            found: Tensor = torch.linalg.solve(self.right, once.mT).mT
            return found

        before = psi
        if self.shift is not None:
            expect_names(psi, [self.name])
            before = {**psi, self.name: psi[self.name] - self.shift}
        return self._changed(before, apply, lambda y: y)

    def log_abs_det(self, theta: Point) -> Tensor:
        groups, d, a = self._rows(theta).of(self.name, theta[self.name]).shape
        left, right = (
            torch.linalg.slogdet(m).logabsdet.expand(groups).sum() for m in (self.left, self.right)
        )
        found: Tensor = a * left + d * right
        return found

    def _rows(self, point: Point) -> Rows:
        return Rows({self.name: point[self.name]}, self.model)

    def _changed(
        self, point: Point, how: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor]
    ) -> dict[str, Tensor]:
        expect_names(point, [self.name])
        rows, part = self._rows(point), point[self.name]
        w = rows.of(self.name, part)
        new = after(rows.back(self.name, how(w)).reshape(part.shape))
        return {name: new if name == self.name else each for name, each in point.items()}
