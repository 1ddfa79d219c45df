"""First mistakes are refused in one line that names the argument, in every entry, before work."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import tnconv
import tnconv.geometry
import tnconv.monitor
import tnconv.ntk
from tnconv import optim, quantities

MODEL = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
LOSS = nn.CrossEntropyLoss()
X, Y = torch.full((5, 3), 0.12345), torch.tensor([0, 1, 0, 1, 1])
VARIANCE = quantities.Variance()
OF_MODEL: dict[str, Callable] = {
    "observe": lambda model: tnconv.observe(model, [VARIANCE]).__enter__(),
    "observe_low_rank": lambda model: tnconv.observe_low_rank(model).__enter__(),
    "empirical_ntk": lambda model: tnconv.ntk.empirical_ntk(model, X),
    "NTKOperator": lambda model: tnconv.ntk.NTKOperator(model, [X]),
    "linearize": tnconv.ntk.linearize,
    "KFAC": optim.KFAC,
    "SINGD": optim.SINGD,
    "RFShampoo": optim.RFShampoo,
    "convert": tnconv.nn.convert,
    "save_memory": tnconv.nn.save_memory,
    "tensor_dropout": tnconv.nn.tensor_dropout,
}
OF_LOSS: dict[str, Callable] = {
    "compute": lambda model, loss: tnconv.compute(model, loss, X, Y, [VARIANCE]),
    "compute gradient": lambda m, loss: tnconv.compute(m, loss, X, Y, [quantities.Gradient()]),
    "GGNOperator": lambda model, loss: tnconv.GGNOperator(model, loss, [(X, Y)]),
    "HessianOperator": lambda model, loss: tnconv.HessianOperator(model, loss, [(X, Y)]),
    "FisherOperator": lambda model, loss: tnconv.FisherOperator(model, loss, [(X, Y)]),
    "hessian_diagonal": lambda model, loss: tnconv.hessian_diagonal(model, loss, X, Y),
    "hesscale": lambda model, loss: tnconv.hesscale(model, loss, X, Y),
    "low_rank_ggn": lambda model, loss: tnconv.low_rank_ggn(model, loss, X, Y),
    "Monitor": lambda model, loss: tnconv.monitor.Monitor(model, loss),
    "AdaHesScale": optim.AdaHesScale,
    "LowRankNewton": optim.LowRankNewton,
    "StepSizeScaler": lambda model, loss: optim.StepSizeScaler(
        torch.optim.SGD(MODEL.parameters(), 0.1), model, loss, delta=0.1
    ),
    "sharpness": lambda model, loss: tnconv.geometry.sharpness(
        model, loss, [(X, Y)], tnconv.geometry.Euclidean(dict(MODEL.named_parameters()))
    ),
}


def refused(call: Callable, words: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    text = str(caught.value)
    assert words in text and "expected" in text, text
    assert text.count("\n") <= 1 and "0.123" not in text and "tensor(" not in text


@pytest.mark.parametrize("entry", [*OF_MODEL, *OF_LOSS])
def test_models_are_instances_of_modules(entry):
    call = OF_MODEL.get(entry) or (lambda model: OF_LOSS[entry](model, LOSS))
    refused(lambda: call(nn.Linear), "model is the class Linear; expected an instance")
    refused(lambda: call(X), "model is a Tensor of shape (5, 3)")


@pytest.mark.parametrize("entry", OF_LOSS)
def test_losses_are_instances_in_their_place(entry):
    call = OF_LOSS[entry]
    refused(lambda: call(MODEL, nn.CrossEntropyLoss), "loss_fn is the class CrossEntropyLoss")
    refused(lambda: call(MODEL, Y), "loss_fn is a Tensor of shape (5,)")


def test_a_loss_in_the_place_of_inputs():
    refused(lambda: tnconv.compute(MODEL, X, Y, LOSS, [VARIANCE]), "loss_fn is a Tensor")
    refused(lambda: tnconv.low_rank_ggn(MODEL, X, Y, LOSS), "loss_fn is a Tensor")


@pytest.mark.parametrize("entry", ["GGNOperator", "HessianOperator", "FisherOperator"])
def test_one_batch_is_a_pair_in_a_list(entry):
    operator = getattr(tnconv, entry)
    refused(lambda: operator(MODEL, LOSS, (X, Y)), "batches holds a Tensor")
    refused(lambda: operator(MODEL, LOSS, X), "batches is a Tensor")
    refused(lambda: operator(MODEL, LOSS, []), "batch")


def test_quantities_are_a_sequence_of_instances():
    for given in (VARIANCE, quantities.Variance, [quantities.Variance]):
        refused(lambda q=given: tnconv.compute(MODEL, LOSS, X, Y, q), "quantities is ")
        refused(lambda q=given: tnconv.observe(MODEL, q).__enter__(), "quantities is ")
    refused(lambda: tnconv.compute(MODEL, LOSS, X, Y, []), "quantities is empty")
    refused(lambda: tnconv.compute(MODEL, LOSS, X, Y, ["variance"]), "quantities holds a str")
    for one in (tnconv.monitor.Loss, tnconv.monitor.Loss(), [tnconv.monitor.Loss] * 2, "what"):
        refused(lambda q=one: tnconv.monitor.Monitor(MODEL, LOSS, q), "quantities")


def test_results_say_what_they_do_not_have():
    result = tnconv.compute(MODEL, LOSS, X, Y, [VARIANCE])
    for asked in (quantities.SquaredNorms, quantities.SquaredNorms(), "variance"):
        with pytest.raises(KeyError, match=r"Variance\(\)"):
            result[asked]


def test_networks_without_parameters_and_frozen_ones():
    frozen = nn.Linear(3, 2).requires_grad_(False)
    result = tnconv.compute(frozen, LOSS, X, Y, [VARIANCE])
    assert not result[VARIANCE] and "Variance" in repr(result)
    refused(lambda: tnconv.GGNOperator(frozen, LOSS, [(X, Y)]), "parameters are ()")
