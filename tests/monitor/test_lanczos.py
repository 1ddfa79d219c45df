"""When a run of Lanczos may end, and where the next one starts."""

from math import sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnconv.monitor.lanczos import Basis, extreme
from tnconv.monitor.lanczos_experience import Experience, unchallenged

SIZES = st.lists(st.floats(-4, 4), min_size=6, max_size=9, unique_by=lambda x: round(x, 2))


def test_an_unconverged_neighbour_challenges() -> None:
    """Ritz values 2 and 1 of a start between their vectors have residuals of √½ beside each."""
    for beside, expected in ((sqrt(2) * 0.9, True), (sqrt(2) * 1.2, False)):
        assert unchallenged([1.5, 1.5], [0.5, beside], "largest", 0.01) is expected


def test_a_start_that_has_little_of_the_vector_asks_for_the_residual() -> None:
    """The Ritz vector of 2 is a tenth of the start; the other value, 0, is far below."""
    c, s = 0.1, sqrt(0.99)
    diagonal, off = [2 * c**2, 2 * s**2], 2 * c * s
    for residual, expected in ((0.01, True), (0.1, False)):
        beside = [off, residual / s]
        assert unchallenged(diagonal, beside, "largest", 0.01) is expected


@given(SIZES, st.integers(0, 99), st.integers(2, 5))
def test_what_challenges_is_there(values: list[float], seed: int, steps: int) -> None:
    """With nothing left to find, runs are unchallenged; with the bounds of every run true."""
    matrix = torch.diag(torch.tensor(values, dtype=torch.float64))
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(len(values), generator=generator, dtype=torch.float64)
    basis, diagonal, beside = Basis(start), list[float](), list[float]()
    for _ in range(steps):
        w, own, _, beta = basis.orthogonal(matrix @ basis.last)
        diagonal.append(own)
        beside.append(beta)
        basis.append(w, beta)
    inner = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    off = torch.tensor(beside[:-1], dtype=torch.float64)
    inner += torch.diag(off, 1) + torch.diag(off, -1)
    ritz, vectors = torch.linalg.eigh(inner)
    reach = [(float(t), beside[-1] * abs(float(v))) for t, v in zip(ritz, vectors[-1], strict=True)]
    for value, residual in reach:
        assert min(abs(value - each) for each in values) <= residual + 1e-9
    others = max(value + residual for value, residual in reach[:-1])
    if unchallenged(diagonal, beside, "largest", 0.01):
        assert others <= reach[-1][0] + 0.01 * abs(reach[-1][0]) + 1e-9


@pytest.mark.parametrize("end", ["largest", "smallest", "magnitude"])
def test_runs_give_their_vector(end: str) -> None:
    """Also short ones with experience: the next run may start from it."""
    matrix = torch.diag(torch.tensor([-6.0, 4.0, 2.0, 1.0]))
    experience = Experience()
    for _ in range(4):
        found = extreme(lambda v: matrix @ v, torch.ones(4), end, 12, 0.01, experience)  # type: ignore[arg-type]
        residual = matrix @ found.vector - found.value * found.vector
        assert residual.norm() < 0.2 * abs(found.value)


def test_runs_turn_to_what_is_closer() -> None:
    """And forget runs that were not alike; a draw turns nothing."""
    experience = Experience(diagonals=[[1.0]], besides=[[1.0]], errors={2: [0.1]}, runs=9)
    for _ in range(20):
        experience.overlapped(0.5, -0.5)
    assert not experience.turned and experience.runs == 9
    for _ in range(20):
        experience.overlapped(0.1, -0.9)
    assert experience.turned and experience.long
    assert not (experience.diagonals or experience.errors)
    assert Experience.of(experience.state()) == experience
