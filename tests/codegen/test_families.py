"""Programs that serve several batches: the same numbers as the definition, for every one."""

import pickle
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tnconv
from tests.strategies import SUMS, ZOO, Case, assert_close, geometries, networks, operands_for
from tnconv import compile, functional, quantities, tiered_compilation
from tnconv.codegen import families, tiers
from tnconv.codegen.families import UP_TO, Kin, for_sizes, kin
from tnconv.codegen.programs.batches import at_size
from tnconv.codegen.programs.program import Program
from tnconv.codegen.programs.sizes import Affine, Share
from tnconv.diagrams import Expression, TensorNetwork, conv, ggn_diagonal, kfac_reduce

pytestmark = pytest.mark.usefixtures("double_precision")
ANY = {**ZOO, **SUMS}
OWN = {  # diagrams that are planned for every batch, and why
    "unfolded_kernel": "has no batch",
    "hessian_vjp": "has no batch",
    "hessian_vjp_reflect": "has no batch",
    "bias": "is read from no operand that has a batch",
}


@pytest.fixture(autouse=True)
def tiered() -> Iterator[None]:
    with tiered_compilation(True):
        tnconv.cache_clear()
        yield
        tnconv.cache_clear()


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The compilers that were used, in turn."""
    used: list[str] = []
    for name in ("baseline", "compile"):
        own = getattr(tiers, name)

        def make(*args: Any, own: Any = own, name: str = name, **kwargs: Any) -> Any:
            used.append(name)
            return own(*args, **kwargs)

        monkeypatch.setattr(tiers, name, make)
    return used


def general(network: Expression, powers: int | None = None) -> tuple[Program | None, Kin | None]:
    """The program for several batches, if there is one."""
    found = kin([network], True, "cpu", torch.float32)
    if found is None:
        return None, None
    each = tuple(_power(term) if powers is None else powers for term in network.terms)
    return for_sizes(compile(network), found, each), found


def _power(term: TensorNetwork) -> int:
    return 1 if term.scale.denominator % term.sizes["n"] == 0 else 0


@pytest.mark.parametrize("name", sorted({*ANY} - {*OWN}))
@settings(max_examples=max(1, settings.default.max_examples // 40))
@given(case=geometries(max_dims=2, empty=False), own=st.integers(2, 9))
def test_one_program_of_a_diagram_serves_every_batch(name: str, case: Case, own: int) -> None:
    network = ANY[name](replace(case, input_shape=(own, *case.input_shape[1:])))
    program, _ = general(network)
    if program is None:
        assert _is_special(network, own), f"{name} of {case} is not for several batches"
        return
    assert program.batches is not None and program.batches.sizes[0] <= own
    for size in {2, 3, own, 7, 2 * own + 1, UP_TO * own} & {*program.batches.sizes}:
        (other,) = program.batches.networks([network], size)
        operands = operands_for(other)
        assert_close(program(**operands), other.reference(**operands), 1e-10)


def _is_special(network: Expression, own: int) -> bool:
    """Whether a number of the plan fits one batch alone: matrices of whole blocks of rows."""
    return "//" in compile(network).source or own < 6


@settings(max_examples=max(1, settings.default.max_examples // 2))
@given(network=networks(selections=True, max_nodes=4), data=st.data())
def test_one_program_of_any_network(network: TensorNetwork, data: st.DataObject) -> None:
    legs = [leg for leg, size in network.sizes.items() if size > 1 and "'" not in leg]
    if not legs:
        return
    network = network.rename({data.draw(st.sampled_from(sorted(legs))): "n"})
    program, _ = general(network, powers=0)
    if program is not None:
        assert program.batches is not None
        for size in (2, 3, 5, 8):
            if size in program.batches.sizes:
                (other,) = program.batches.networks([network], size)
                operands = operands_for(other)
                assert_close(program(**operands), other.reference(**operands), 1e-10)


@settings(max_examples=max(1, settings.default.max_examples // 20))
@given(case=geometries(max_dims=2, empty=False), batches=st.permutations([1, 2, 3, 4, 6, 9, 70]))
def test_calls_of_every_batch_in_any_order(case: Case, batches: list[int]) -> None:
    tnconv.cache_clear()
    for name in ("conv", "kfac_reduce", "gradient_norms"):
        for size in (batches[0], *batches):
            network = ANY[name](replace(case, input_shape=(size, *case.input_shape[1:])))
            operands = operands_for(network)
            found = tnconv.contract(network, **operands)
            assert_close(found, network.reference(**operands), 1e-10)


def test_a_family_is_searched_for_once(searches: list[str]) -> None:
    weight = torch.randn(4, 3, 3)
    for batch in (8, 5, 13, 30, 3, 2, 32, 1):
        x = torch.randn(batch, 3, 9)
        torch.testing.assert_close(functional.conv(x, weight), torch.conv1d(x, weight))
        torch.testing.assert_close(functional.conv(x, weight), torch.conv1d(x, weight))
    assert searches == ["baseline", "compile"] * 2  # for 8, from which on to 32, and for 1


def test_other_images_layers_dtypes_and_scales_are_other_families(searches: list[str]) -> None:
    x, weight = torch.randn(4, 3, 9), torch.randn(4, 3, 3)
    for each, kernel in ((x, weight), (x[..., :8], weight), (x, weight[:2]), (x, weight[..., :2])):
        functional.conv(each, kernel)
        functional.conv(each, kernel)
    assert searches == ["baseline", "compile"] * 4
    functional.conv(x[:3], weight)
    assert len(searches) == 8
    functional.conv(x[:3], weight, stride=2)
    assert searches[8:] == ["baseline"]
    net = conv((5, 3, 9), (4, 3, 3)).scaled(7)
    assert_close(tnconv.contract(net, **(given := operands_for(net))), net.reference(**given))


def test_scales_that_divide_by_the_batch() -> None:
    program, found = general(kfac_reduce((8, 3, 12), 3))
    assert program is not None and found is not None and "/ n ** 0.5)" in program.source
    other = kin([kfac_reduce((6, 3, 12), 3)], True, "cpu", torch.float32)
    assert other is not None and other.family == found.family and found.powers(other) == (1,)


def test_a_size_at_which_others_win_is_planned_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with tiered_compilation(True):
        x, weight = torch.randn(8, 3, 9), torch.randn(4, 3, 3)
        functional.conv(x, weight)
        functional.conv(x, weight)
        (members,) = tiers._families._members.values()
        other = kin([conv((5, 3, 9), (4, 3, 3))], True, "cpu", torch.float32)
        assert other is not None and tiers._families.serving(other) is not None
        (served,) = members[0].general.values()
        assert served is not None and served.batches is not None
        dear = tuple(replace(price, least=price.seconds / 1.3) for price in served.batches.prices)
        own = replace(served, batches=replace(served.batches, prices=dear))
        monkeypatch.setitem(members[0].general, (0,), own)
        assert tiers._families.serving(other) is None


@pytest.mark.parametrize("size", [4, 5, 7, 16])
def test_programs_tell_the_price_of_the_size_that_they_serve(size: int) -> None:
    with tiered_compilation(True):
        for batch in (8, 8, 12):
            functional.conv(torch.randn(batch, 3, 9), torch.randn(4, 3, 3))
        other = kin([net := conv((size, 3, 9), (4, 3, 3))], True, "cpu", torch.float32)
        assert other is not None and (served := tiers._families.serving(other)) is not None
    searched = tnconv.compile(net)
    assert 0.8 * searched.seconds < served.seconds < 1.3 * searched.seconds
    for dtype in (torch.float32, torch.float64):
        least = searched.peak_memory(dtype)
        assert least <= served.peak_memory(dtype) < 1.2 * least
    x, weight = torch.randn(size, 3, 9), torch.randn(4, 3, 3)
    assert_close(served(x, weight), functional.conv(x, weight))


def test_memory_limits_and_orders_are_planned_for_each_batch(searches: list[str]) -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(48, 4)).double()
    norms = quantities.SquaredNorms()
    for batch in (5, 5, 7):
        x, y = torch.randn(batch, 1, 6, 6), torch.randint(4, (batch,))
        loss = nn.CrossEntropyLoss(reduction="sum")
        limited = tnconv.compute(model, loss, x, y, [norms], memory_limit=2**20)[norms]
        found = tnconv.compute(model, loss, x, y, [norms])[norms]
        for name, value in found.items():
            assert_close(limited[name], value, 1e-10)
    assert not any(m.program.chunks for some in tiers._families._members.values() for m in some)


def test_errors_of_a_program_for_several_batches() -> None:
    program, _ = general(conv((8, 3, 9), (4, 3, 3)))
    assert program is not None
    x, weight = torch.randn(5, 3, 9), torch.randn(4, 3, 3)
    assert program(x=x, weight=weight).shape == (5, 4, 7)
    with pytest.raises(ValueError, match=r"weight.*\(4, 3, 2\).*\(4, 3, 3\)"):
        program(x=x, weight=weight[..., :2])
    with pytest.raises(ValueError, match=r"x.*\(99, 3, 9\).*\(8, 3, 9\)"):
        program(x=torch.randn(99, 3, 9), weight=weight)
    with pytest.raises(TypeError):
        program(x=5, weight=weight)  # type: ignore[arg-type]


def test_operands_that_are_called_as_the_batch() -> None:
    network = kfac_reduce((8, 3, 12), 3).rename_operands({"x": "n"})
    program, _ = general(network)
    assert program is not None and "n_ = n.shape[0]" in program.source
    (other,) = program.batches.networks([network], 5)  # type: ignore[union-attr]
    assert_close(program(**(given := operands_for(other))), other.reference(**given), 1e-10)


def test_programs_for_several_batches_are_values() -> None:
    program, _ = general(ZOO["gradient_norms"](Case((6, 4, 9), (4, 2, 3), groups=2)))
    assert program is not None
    again = pickle.loads(pickle.dumps(program))
    assert again.source == program.source and "n = " in program.source
    assert again.batches.sizes == program.batches.sizes  # type: ignore[union-attr]
    x, v = torch.randn(3, 4, 9), torch.randn(3, 4, 7)
    assert_close(again(x=x, grad_output=v), program(x=x, grad_output=v), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.complex64])
def test_other_precisions(dtype: torch.dtype) -> None:
    weight = torch.ones(4, 2, 3, 3, dtype=dtype)
    for batch in (4, 4, 3, 6):
        x = torch.ones(batch, 2, 7, 6, dtype=dtype)
        found = functional.conv(x, weight)
        assert found.dtype is dtype
        torch.testing.assert_close(found, torch.full_like(found, 18))


def test_native_kernels_of_complex_numbers_are_replaced_once_for_each_batch() -> None:
    weight = torch.randn(8, 8, 3, 3, dtype=torch.complex128)
    for batch in (6, 6, 5, 5, 4):
        x = torch.randn(batch, 8, 12, 12, dtype=torch.complex128)
        torch.testing.assert_close(functional.conv(x, weight), torch.conv2d(x, weight))
    (members,) = tiers._families._members.values()
    (program,) = members[0].general.values()
    assert program is not None and {*program._complex_sizes} == {5, 4}


def test_derivatives_and_transforms() -> None:
    weight = torch.randn(4, 2, 3)
    for batch in (6, 6, 4, 3):
        x = torch.randn(batch, 2, 8, requires_grad=True)
        assert torch.autograd.gradcheck(lambda a, w: functional.conv(a, w), (x, weight))
        several = torch.randn(2, batch, 2, 8)
        found = torch.func.vmap(lambda a: functional.conv(a, weight))(several)
        assert_close(found[1], torch.conv1d(several[1], weight), 1e-12)


def test_expressions_of_a_size() -> None:
    n = Affine(3, -2, "n")
    assert [str(n), str(n + 2), str(2 * n), str(1 + n - n), str(5 - n)] == [
        *("3 * n - 2", "3 * n", "6 * n - 4", "1", "-3 * n + 7"),
    ]
    assert n.at(5) == 13 and n > 3 and not n > 4
    assert [str(Share(2.0, power, "n")) for power in (1.0, 0.5, -1.0)] == [
        *("(2.0 / n)", "(2.0 / n ** 0.5)", "(2.0 * n)"),
    ]


def test_choices_write_a_plan_again() -> None:
    for name in ("kfac_expand", "gradient_norms", "ggn_diagonal"):
        network = ANY[name](Case((6, 4, 9, 8), (4, 2, 3, 3), padding=1, groups=2))
        program = compile(network)
        (same,) = at_size([network], "n", 6, 6, (0,)) or ()
        again = families.again(program, [same], [2])
        assert again is not None and again.terms[0] == program.terms[0][:3]


@settings(max_examples=max(2, settings.default.max_examples // 25))
@given(own=st.integers(3, 9), channels=st.sampled_from([96, 128, 160]),
       size=st.integers(4, 7), vectors=st.integers(7, 9))  # fmt: skip
def test_loops_within_turns_serve_every_batch(
    own: int, channels: int, size: int, vectors: int
) -> None:
    """Squares that no cache holds are added by vector at other batches, too."""
    layer = conv((own, channels, size, size), (128, channels, 3, 3), padding=1)
    network = ggn_diagonal(layer, vectors=vectors)
    program, _ = general(network)
    assert program is not None and program.batches is not None
    assert program.terms[0][0].choices == compile(network).terms[0][0].choices
    x, v = torch.randn(2, channels, size, size), torch.randn(vectors, 2, 128, size, size)
    each = [
        torch.nn.grad.conv2d_weight(x[n, None], (128, channels, 3, 3), v[m, n, None], 1, 1)
        for m in range(vectors)
        for n in range(2)
    ]
    assert_close(program.run(x, v), torch.stack(each).square().sum(0), 1e-10)


@given(sizes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=2, max_size=6))
def test_two_batches_are_told_apart(sizes: list[tuple[int, int]]) -> None:
    """Kernels between two batches: their sizes may agree by chance, in any order of calls."""
    model = torch.nn.Linear(3, 2).double()
    tnconv.cache_clear()
    for n, m in [pair for pair in sizes for _ in range(2)]:
        x, y = torch.rand(n, 3).double(), torch.rand(m, 3).double()
        expected = torch.einsum("nm,cd->ncmd", x @ y.T + 1, torch.eye(2).double())
        assert_close(tnconv.ntk.empirical_ntk(model, x, y), expected, 1e-10)
