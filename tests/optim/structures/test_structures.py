"""Every operation of every family on products of two random members, beside dense matrices."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tnconv import diagrams, tiered_compilation
from tnconv.diagrams import Sum, TensorNetwork, View
from tnconv.optim.structures import (
    STRUCTURES,
    BlockDiagonal,
    Dense,
    Hierarchical,
    RankTriangular,
    Structure,
    structure,
)


@dataclass(frozen=True)
class Checkerboard(Structure):
    """A user's own: entries (i, j) with i - j even, as two interleaved dense matrices."""

    def diagram(self):
        even, odd = (self.size + 1) // 2, self.size // 2
        terms, at = [], 0
        for start, rows in ((0, even), (1, odd)):
            if not rows:
                continue
            sizes = {"r": rows, "c": rows}
            read = diagrams.Axis(self.numbers, at, (("r", rows), ("c", 1)))
            axes = (diagrams.Axis(self.size, start, ((leg, 2),)) for leg in "rc")
            node = diagrams.Tensor("parameters", View((self.numbers,), (read,)))
            terms.append(TensorNetwork((node,), View((self.size,) * 2, tuple(axes)), sizes))
            at += rows * rows
        return Sum(tuple(terms))

    @property
    def numbers(self):
        return ((self.size + 1) // 2) ** 2 + (self.size // 2) ** 2


@dataclass(frozen=True)
class Generic(Structure):
    """Another family with nothing but its diagram."""

    other: Structure | None = None

    def diagram(self):
        return self.other.diagram()


FAMILIES = {
    **STRUCTURES,
    "block3": partial(BlockDiagonal, block=3),
    "block50": partial(BlockDiagonal, block=50),
    "hierarchical2_3": partial(Hierarchical, first=2, last=3),
    "hierarchical0_1": partial(Hierarchical, first=0, last=1),
    "rank3": partial(RankTriangular, rank=3),
    "rank2": partial(RankTriangular, rank=2, diagonal="bottom_right", upper=True),
    "checkerboard": Checkerboard,
}
SIZES = st.integers(1, 9) | st.integers(10, 40)


@pytest.fixture(autouse=True)
def first_programs():
    """Diagrams run once in most sizes."""
    with tiered_compilation(True):
        yield


every_family = pytest.mark.parametrize("name", FAMILIES)


def relative(found, expected):
    scale = expected.abs().max().clamp(min=1)
    return float((found - expected).abs().max() / scale)


def members(family, count, seed=0, groups=2, dtype=torch.float64):
    """Products of two random members: not symmetric."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, groups, family.count, generator=generator, dtype=torch.float64)
    found = [family.product(draw(), draw()) / family.size**0.5 for _ in range(count)]
    return [each.to(dtype) for each in found]


@every_family
@settings(max_examples=4)
@given(size=SIZES, seed=st.integers(0, 99), columns=st.integers(1, 5))
def test_operations_are_those_of_dense_matrices(name, size, seed, columns):
    family = structure(FAMILIES[name], size)
    s, t = members(family, 2, seed)
    dense = family.diagram().reference(parameters=s[0]), family.diagram().reference(parameters=s[1])
    dense_s, dense_t = torch.stack(dense), family.dense(t)
    assert relative(family.dense(s), dense_s) < 1e-12
    assert relative(family.dense(family.product(s, t)), dense_s @ dense_t) < 1e-12
    x, y = torch.randn(2, 2, size, columns, dtype=torch.float64)
    assert relative(family.matmat(s, x), dense_s @ x) < 1e-12
    assert relative(family.rmatmat(s, x), dense_s.mT @ x) < 1e-12
    assert relative(family.trace(s), dense_s.diagonal(dim1=1, dim2=2).sum(-1)) < 1e-12
    assert relative(family.squared_norm(s), dense_s.square().sum((1, 2))) < 1e-12
    inner = dense_s.mT @ x @ x.mT @ dense_s
    assert relative(family.inner(s, x), family.project(inner)) < 1e-12
    assert relative(family.inner(s), family.project(dense_s.mT @ dense_s)) < 1e-12
    basis = family.dense(torch.eye(family.count, dtype=torch.float64))
    pairs = torch.einsum("bij,eij->be", x @ y.mT, basis)
    assert relative(family.inner_products(x, y), pairs) < 1e-12
    if family.sufficient:
        found = family.congruence(s, torch.einsum("bij,eij->be", y @ y.mT, basis))
        assert relative(found, family.project(dense_s.mT @ y @ y.mT @ dense_s)) < 1e-12


@every_family
@settings(max_examples=3)
@given(size=SIZES, seed=st.integers(0, 99))
def test_projection_is_orthogonal(name, size, seed):
    """⟨sym(Π M), sym(E)⟩ = ⟨M, sym(E)⟩ for every member E, and Π(I) = I."""
    family = structure(FAMILIES[name], size)
    root = torch.randn(size, size, dtype=torch.float64)
    m = root @ root.mT
    projected = family.dense(family.project(m))
    basis = family.dense(torch.eye(family.count, dtype=torch.float64))
    symmetric = (basis + basis.mT) / 2
    found = ((projected + projected.mT) / 2 * symmetric).sum((1, 2))
    assert relative(found, (m * symmetric).sum((1, 2))) < 1e-12
    unit = torch.eye(size, dtype=torch.float64)
    for own in (family.project(unit), family.identity(unit)):
        assert relative(family.dense(own), unit) < 1e-14


@every_family
@pytest.mark.parametrize("size", [2, 7])
def test_what_is_faster_is_what_the_diagram_says(name, size):
    """A family's own methods and constants are those that `Structure` derives."""
    family = structure(FAMILIES[name], size)
    generic = Generic(size, family)
    assert generic.count == family.count
    s, t = members(family, 2)
    x, y = torch.randn(2, 2, size, 3, dtype=torch.float64)
    for own in ("weights", "multiplicities", "identity"):
        assert torch.equal(getattr(family, own)(s).expand(family.count), getattr(generic, own)(s))
    calls = {"matmat": (s, x), "rmatmat": (s, x), "product": (s, t), "inner": (s, x)}
    calls |= {"inner_products": (x, y), "trace": (s,), "squared_norm": (s,), "dense": (s,)}
    for own, arguments in calls.items():
        found = getattr(family, own)(*arguments)
        assert relative(found, getattr(generic, own)(*arguments)) < 1e-12, own
    assert relative(family.inner(s), generic.inner(s)) < 1e-12
    family.verify()


@pytest.mark.parametrize("name", STRUCTURES)
def test_which_entries_suffice(name):
    """Not Toeplitz matrices' own, nor where a strip meets more than the diagonal beside it."""
    lacking = "triangular_bottom_right", "upper_triangular_top_left"
    expected = "toeplitz" not in name and name not in lacking
    assert structure(name, 40).sufficient is expected
    if not expected:
        with pytest.raises(NotImplementedError, match="needs more of a matrix than its own"):
            structure(name, 40).congruence(torch.ones(1, 1), torch.ones(1, 1))


@every_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_rounds_once(name, dtype):
    """Half precision is computed in float32: results differ by one rounding of each member."""
    family = structure(FAMILIES[name], 13)
    s, t = members(family, 2, dtype=dtype)
    x = torch.randn(2, 13, 4).to(dtype)
    each = {"matmat": (s, x), "rmatmat": (s, x), "product": (s, t), "inner": (s,)}
    each |= {"inner_products": (x, x)}
    for own, arguments in each.items():
        found = getattr(family, own)(*arguments)
        assert found.dtype == dtype
        exact = getattr(family, own)(*(a.double() for a in arguments))
        assert relative(found.double(), exact) < max(1e-5, 2 * torch.finfo(dtype).eps), own


def test_blocks_of_all_rows_are_dense():
    s = torch.randn(1, 49, dtype=torch.float64)
    x = torch.randn(1, 7, 3, dtype=torch.float64)
    for own in ("matmat", "rmatmat", "inner"):
        found = [getattr(f, own)(s, x) for f in (BlockDiagonal(7, block=9), Dense(7))]
        assert torch.equal(*found)


@dataclass(frozen=True)
class Tridiagonal(Structure):
    """Its products are no members."""

    def diagram(self):
        terms = []
        for at, shift in enumerate((-1, 0, 1)):
            sizes = {"one": 1, "i": self.size}
            node = diagrams.Tensor("parameters", View((3,), (diagrams.Axis(3, at),)))
            axes = tuple(diagrams.Axis(self.size, a, (("i", 1),)) for a in (0, shift))
            terms.append(TensorNetwork((node,), View((self.size,) * 2, axes), sizes))
        return Sum(tuple(terms))


def test_what_is_no_family_is_said():
    with pytest.raises(ValueError, match="does not hold the product"):
        Tridiagonal(5).verify()
    with pytest.raises(ValueError, match=r"structure is 'dens'; expected one of dense, diagonal"):
        structure("dens", 3)
    with pytest.raises(TypeError, match=r"a structure is a int; expected a name"):
        structure(3, 3)
    with pytest.raises(TypeError, match="has size 3; expected one of size 4"):
        structure(Dense(3), 4)
    with pytest.raises(ValueError, match="block is 0; expected at least 1"):
        BlockDiagonal(3, block=0)
    with pytest.raises(ValueError, match="size is 0"):
        Dense(0)
    with pytest.raises(ValueError, match="diagonal is 'left'"):
        RankTriangular(3, diagonal="left")
