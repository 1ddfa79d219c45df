"""What the stateful parts of modules must follow, or refuse: a table, run over every part.

Parts are the memory-saving layers with their readers, and the draws of tensor dropout; events are a
switch of the mode, freezing, another dtype, a change in place, a second backward pass, a copy.
"""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tnconv
from tests.nn.memory_cases import D, close
from tnconv.nn import memory, revert, save_memory, tensor_dropout

KINDS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "leaky": lambda: nn.LeakyReLU(0.2),
    "softplus": nn.Softplus,
    "hardtanh": nn.Hardtanh,
    "dropout": lambda: nn.Dropout(0.5),
}
IN_PLACE: dict[str, Callable[[], nn.Module]] = {
    "nothing": nn.Identity,
    "relu": lambda: nn.ReLU(inplace=True),
    "leaky": lambda: nn.LeakyReLU(0.1, inplace=True),
    "hardtanh": lambda: nn.Hardtanh(-0.1, 0.3, inplace=True),
    "dropout": lambda: nn.Dropout(0.4, inplace=True),
}
EVENTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "none": lambda m: m,
    "evaluated": lambda m: m.eval(),
    "evaluated and back": lambda m: m.eval().train(),
    "frozen": lambda m: m.requires_grad_(False),
    "last frozen": lambda m: (m[-1].requires_grad_(False), m)[1],
    "frozen and back": lambda m: m.requires_grad_(False).requires_grad_(True),
    "copied": copy.deepcopy,
    "pickled": lambda m: pickle.loads(pickle.dumps(m)),
    "in single precision and back": lambda m: m.float().double(),
    "saved again": save_memory,
    "reverted and saved": lambda m: save_memory(revert(m)),
    "converted": tnconv.nn.convert,
}


def gradients(model: nn.Module, x: Tensor, twice: bool = False) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    y = model(x)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    v = torch.linspace(-1, 2, y.numel(), **D).view(y.shape)
    found = torch.autograd.grad(y, wanted, v, retain_graph=twice)
    if twice:
        close(torch.autograd.grad(y, wanted, v), found, 0)
    return y.detach(), *found


@given(
    chain=st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=3),
    evaluated=st.sets(st.integers(0, 3)),
    last=st.sampled_from(sorted(IN_PLACE)),
    event=st.sampled_from(sorted(EVENTS)),
    twice=st.booleans(),
    linear=st.booleans(),
)
def test_chains_follow_every_event(chain, evaluated, last, event, twice, linear) -> None:
    """Values and gradients are torch's after it, or torch refuses the same."""
    torch.manual_seed(0)
    first = [nn.Linear(5, 6)] if linear else [nn.LayerNorm(5), nn.Linear(5, 6)]
    layers = [*first, *(KINDS[kind]() for kind in chain), IN_PLACE[last](), nn.Linear(6, 3)]
    model = nn.Sequential(*layers).double()
    saving = save_memory(model)
    saving(torch.randn(4, 5, **D))  # what was planned before the event must not stay
    theirs, saving = copy.deepcopy(model), EVENTS[event](saving)
    theirs = theirs if event in ("saved again", "reverted and saved") else EVENTS[event](theirs)
    for each in (theirs, saving):
        for at in evaluated:
            each[len(first) + at % (len(chain) + 1)].eval()
    x = torch.randn(4, 5, **D)
    try:
        expected = gradients(theirs, x, twice)
    except RuntimeError as error:
        assert "inplace" in str(error)
        return
    close(gradients(saving, x, twice), expected, 1e-10)


def test_a_reader_behind_dropout_in_evaluation_mode_is_asked() -> None:
    """It gives back its input, which a layer in place behind it overwrites."""
    chain = nn.Sequential(
        nn.ELU(), nn.Dropout(0.3), nn.LeakyReLU(0.1, inplace=True), nn.Linear(4, 4)
    )
    chain.double()[1].eval()
    saving, x = save_memory(chain), torch.randn(3, 4, **D, requires_grad=True)
    assert isinstance(saving[1], memory.Dropout) and saving[0].plan == "torch"
    plain = nn.Sequential(nn.ELU(), nn.LeakyReLU(0.1), chain[3])
    expected = torch.autograd.grad(plain(x).sum(), x)
    close(torch.autograd.grad(saving(x).sum(), x), expected, 1e-12)
    assert save_memory(nn.Sequential(nn.ELU(), chain[1], chain[3]))[0].plan == "output"


KINKS: dict[str, tuple[Callable[..., nn.Module], Callable[..., list[float]]]] = {
    "ReLU": (lambda a, b: nn.ReLU(), lambda a, b: [0]),
    "ReLU6": (lambda a, b: nn.ReLU6(), lambda a, b: [0, 6]),
    "Hardtanh": (lambda a, b: nn.Hardtanh(-a, b), lambda a, b: [-a, b]),
    "Threshold": (lambda a, b: nn.Threshold(a, -b), lambda a, b: [a]),
    "Hardsigmoid": (lambda a, b: nn.Hardsigmoid(), lambda a, b: [-3, 3]),
    "Hardshrink": (lambda a, b: nn.Hardshrink(a), lambda a, b: [-a, a]),
    "Softshrink": (lambda a, b: nn.Softshrink(a), lambda a, b: [-a, a]),
    "LeakyReLU": (lambda a, b: nn.LeakyReLU(a), lambda a, b: [0]),
    "ELU": (lambda a, b: nn.ELU(a), lambda a, b: [0]),
    "CELU": (lambda a, b: nn.CELU(a), lambda a, b: [0]),
    "SELU": (lambda a, b: nn.SELU(), lambda a, b: [0]),
    "Softplus": (lambda a, b: nn.Softplus(a, 20 * b), lambda a, b: [20 * b / a]),
}


@given(
    name=st.sampled_from(sorted(KINKS)),
    a=st.sampled_from((0.25, 0.5, 1.0)),
    b=st.sampled_from((0.25, 1.0, 3.0)),
    reader=st.sampled_from((None, False, True)),
)
def test_gradients_at_kinks_are_those_of_torch(name, a, b, reader) -> None:
    """At a kink, just beside it, at zeros of both signs, and where numbers are not finite."""
    make, kinks = KINKS[name]
    at = torch.tensor([*kinks(a, b), 0.0, -0.0], **D)
    inf = torch.full_like(at, float("inf"))
    x = torch.cat([at, at.nextafter(inf), at.nextafter(-inf), inf[:1], -inf[:1]])
    saving = save_memory(make(a, b))
    assert type(saving) is getattr(memory, name)
    if reader is not None:
        saving.readers = [memory.Linear(2, 2).requires_grad_(reader)]
        saving.input_held = False
    found = []
    for module in (make(a, b), saving):
        given = x.clone().requires_grad_()
        y = module(given)
        found.append((y.detach(), *torch.autograd.grad(y, given, torch.ones_like(y))))
    tolerance = 1e-8 if name == "Softplus" else 1e-12  # y is x up to that at its threshold
    how = {"rtol": tolerance, "atol": tolerance, "equal_nan": True}
    torch.testing.assert_close(found[1], found[0], **how)


@pytest.mark.parametrize("make", [save_memory, lambda m: tensor_dropout(m, 0.5)])
def test_operands_changed_in_place_are_noticed(make) -> None:
    """What a call stored must not change before its backward pass: torch's own error."""
    layer = make(nn.Linear(4, 3).double())
    x = torch.randn(5, 4, **D)
    x2 = x.clone()
    y = layer(x2 * 1)
    y.sum().backward()  # nothing changed
    held = x2.clone()
    z = make(nn.Linear(4, 3).double())
    w = z(held.requires_grad_() * 1)
    with torch.no_grad():
        z.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        w.sum().backward()


@pytest.mark.parametrize("sampling", ["bernoulli", "fixed"])
@pytest.mark.parametrize("own", [False, True])
def test_draws_follow_calls_modes_and_recomputations(sampling: str, own: bool) -> None:
    generator = torch.Generator() if own else None
    model = tensor_dropout(nn.Sequential(nn.Linear(32, 8)), 0.5, sampling, generator).double()
    x = torch.randn(6, 32, **D)

    def seed(value: int) -> None:
        torch.manual_seed(value)
        if generator is not None:
            generator.manual_seed(value)

    def drawn(call: Callable[[Tensor], Tensor]) -> Tensor:
        (weight, _) = torch.autograd.grad(call(x.requires_grad_()).sum(), [*model.parameters()])
        return weight

    seed(0)
    first, second = drawn(model), drawn(model)
    assert not torch.equal(first, second)  # every call draws anew
    seed(0)
    close((drawn(model), drawn(model)), (first, second), 0)  # and seeds repeat it
    seed(0)
    again = drawn(lambda x: checkpoint(model, x, use_reentrant=False))
    close(again, first, 0)  # as recomputations do
    exact = nn.functional.linear
    weight, bias = (p.detach().clone().requires_grad_() for p in model.parameters())
    expected = torch.autograd.grad(exact(x, weight, bias).sum(), weight)[0]
    close(drawn(model.eval()), expected, 1e-12)
    assert not torch.equal(drawn(model.train()), expected)
    twin = copy.deepcopy(model)
    assert twin[0].keep == model[0].keep and type(twin[0]) is type(model[0])


def test_revert_undoes_every_swap() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Dropout(0.2), nn.Linear(16, 3),
    )  # fmt: skip
    for swap in (
        save_memory,
        tensor_dropout,
        tnconv.nn.convert,
        lambda m: tensor_dropout(save_memory(m)),
    ):
        swapped = swap(model)
        back = revert(swapped)
        assert [type(m) for m in back.modules()] == [type(m) for m in model.modules()]
        assert type(swapped[0]) is not nn.Conv2d  # the given one stays as it is
        for one, other in zip(back.parameters(), model.parameters(), strict=True):
            assert one is other
        for one, other in zip(back.modules(), model.modules(), strict=True):
            assert vars(one).keys() == vars(other).keys()
