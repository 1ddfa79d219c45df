"""Roots of the loss Hessian against torch's own Hessian."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.strategies import assert_close
from tnconv.losses.roots import curvature


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


LABELS = torch.tensor([2, 0, 3, 1])
POSITIONS = torch.tensor([[0, 1, 2], [2, 2, -100], [1, 0, 0]])
WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.25], dtype=torch.float64)
HALF = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64)

CASES: dict[str, tuple[Callable[..., Tensor], Tensor, Tensor]] = {
    "cross entropy": (nn.CrossEntropyLoss(), random(4, 4), LABELS),
    "cross entropy, sum": (nn.CrossEntropyLoss(reduction="sum"), random(4, 4), LABELS),
    "cross entropy, weights": (nn.CrossEntropyLoss(weight=WEIGHT), random(4, 4), LABELS),
    "cross entropy, smoothing": (
        nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.2),
        random(4, 4),
        LABELS,
    ),
    "cross entropy, positions": (nn.CrossEntropyLoss(), random(3, 3, 3), POSITIONS),
    "cross entropy, ignored": (
        nn.CrossEntropyLoss(weight=WEIGHT[:3], ignore_index=1, label_smoothing=0.1),
        random(3, 3, 3),
        POSITIONS.clamp(min=0),
    ),
    "cross entropy, probabilities": (
        nn.CrossEntropyLoss(weight=WEIGHT[:3], label_smoothing=0.1),
        random(2, 3, 2),
        random(2, 3, 2, seed=1).softmax(1),
    ),
    "cross entropy, function": (partial(F.cross_entropy, reduction="sum"), random(4, 4), LABELS),
    "cross entropy, one class": (F.cross_entropy, random(2, 1), LABELS[1:2].expand(2)),
    "mse": (nn.MSELoss(), random(3, 2), random(3, 2, seed=1)),
    "mse, sum": (nn.MSELoss(reduction="sum"), random(3, 2, 2), random(3, 2, 2, seed=1)),
    "mse, one number": (F.mse_loss, random(3), random(3, seed=1)),
    "bce": (nn.BCEWithLogitsLoss(), random(4), HALF),
    "bce, weights": (
        nn.BCEWithLogitsLoss(weight=WEIGHT, pos_weight=WEIGHT.flip(0), reduction="sum"),
        random(3, 4),
        random(3, 4, seed=1).sigmoid(),
    ),
    "l1": (nn.L1Loss(), random(3, 2), random(3, 2, seed=1)),
}


@pytest.fixture(params=sorted(CASES))
def case(request: pytest.FixtureRequest) -> tuple[Callable[..., Tensor], Tensor, Tensor]:
    return CASES[request.param]


def hessian(loss: Callable[..., Tensor], y: Tensor, targets: Tensor) -> Tensor:
    """``∂²L / ∂y ∂y'`` as a matrix."""
    found: Tensor = torch.func.hessian(lambda y: loss(y, targets))(y)
    return found.reshape(y.numel(), y.numel())


def gram(vectors: Tensor) -> Tensor:
    """The block-diagonal matrix ``Σ_m S[m, n] S[m, n]ᵀ``, one block per sample."""
    flat = vectors.flatten(2) if vectors.dim() > 2 else vectors.unsqueeze(2)
    return torch.block_diag(*torch.einsum("mna,mnb->nab", flat, flat))


def test_all_vectors_make_the_hessian(case: tuple[Callable[..., Tensor], Tensor, Tensor]) -> None:
    loss, y, targets = case
    found = curvature(loss, y, targets)
    vectors = found.vectors()
    assert vectors.shape == (found.columns, *y.shape)
    assert_close(gram(vectors), hessian(loss, y, targets), 1e-12)


def test_vectors_in_parts(case: tuple[Callable[..., Tensor], Tensor, Tensor]) -> None:
    found = curvature(*case)
    parts = [found.vectors(at, min(at + 2, found.columns)) for at in range(0, found.columns, 2)]
    assert_close(torch.cat([found.vectors(0, 0), *parts]), found.vectors(), 0)


def test_samples_have_the_hessian_as_their_mean(
    case: tuple[Callable[..., Tensor], Tensor, Tensor],
) -> None:
    """Every entry within five standard errors, over all pairs of outputs of a sample."""
    loss, y, targets = case
    draws = 4000
    found = curvature(loss, y, targets).samples(draws, torch.Generator().manual_seed(0))
    flat = found.reshape(draws, len(y), -1) * draws**0.5
    products = torch.einsum("mna,mnb->mnab", flat, flat)
    error = torch.block_diag(*products.mean(0)) - hessian(loss, y, targets)
    spread = torch.block_diag(*products.std(0)) / draws**0.5
    assert (error.abs() <= 5 * spread + 1e-12).all()


def test_draws_are_reproducible(case: tuple[Callable[..., Tensor], Tensor, Tensor]) -> None:
    one, other = (curvature(*case).samples(3, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one, other)


def test_low_precision_and_large_logits() -> None:
    y = torch.tensor([[90.0, -90.0, 0.0], [0.0, 0.0, 90.0]], dtype=torch.bfloat16)
    vectors = curvature(nn.CrossEntropyLoss(), y, torch.tensor([0, 1])).vectors()
    assert vectors.dtype == torch.bfloat16
    assert vectors.isfinite().all()


@pytest.mark.parametrize(
    ("loss", "y", "targets", "error", "message"),
    [
        (nn.HuberLoss(), random(2, 3), random(2, 3), NotImplementedError, "the loss HuberLoss"),
        (lambda y, t: (y - t).sum(), random(2), random(2), NotImplementedError, "CrossEntropyLoss"),
        (nn.MSELoss(reduction="none"), random(2), random(2), ValueError, "reduction 'none'"),
        (nn.CrossEntropyLoss(), random(3), torch.tensor(1), ValueError, "a batch dimension"),
        (nn.MSELoss(), random(2, 1), random(2), ValueError, r"targets have shape \(2,\)"),
    ],
)
def test_errors(
    loss: Callable[..., Tensor],
    y: Tensor,
    targets: Tensor,
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        curvature(loss, y, targets)
