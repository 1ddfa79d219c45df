"""Second derivatives of losses of policies and Gaussians against autograd's whole Hessian."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import hessian

import tnconv
from tests.recursions.oracle import Network, explicit
from tests.strategies import assert_close
from tnconv.losses import A2CLoss, Actions, GaussianNLLLoss, PPOLoss

pytestmark = pytest.mark.usefixtures("float64")
DISTRIBUTIONS = ("gaussian mean", "gaussian variance", "softmax")
REDUCTIONS = ("mean", "sum")


def case(distribution: str, samples: int = 6) -> tuple[Tensor, Actions]:
    """An output, and actions of an older policy; some ratios are clipped, on either side."""
    output = torch.rand(samples, 3).double() + 0.5
    gaussian = distribution != "softmax"
    action = torch.randn(samples, 3).double() if gaussian else torch.randint(3, (samples,))
    other = torch.rand(samples, 3).double() + 0.5 if gaussian else None
    advantage = torch.randn(samples).double()
    targets = Actions(action, advantage, None, other)
    old = A2CLoss(distribution).log_probability(output, targets)
    return output, targets._replace(old_log_probability=old + 0.4 * torch.randn(samples).double())


def check(loss_fn: nn.Module, output: Tensor, targets) -> Tensor:
    expected = hessian(lambda y: loss_fn(y, targets))(output).reshape(2 * [output.numel()])
    found = loss_fn.second_derivatives(output, targets)
    assert_close(found, expected.diagonal().reshape(output.shape), 1e-11)
    return found


@given(st.sampled_from(DISTRIBUTIONS), st.sampled_from(REDUCTIONS), st.integers(0, 10**6))
def test_actors(distribution: str, reduction: str, seed: int) -> None:
    torch.manual_seed(seed)
    output, targets = case(distribution)
    check(A2CLoss(distribution, reduction), output, targets)
    check(A2CLoss(distribution, reduction), output, targets._replace(advantage=None))
    check(PPOLoss(distribution, 0.2, reduction), output, targets)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_clipped_ratios_are_flat(distribution: str) -> None:
    output, targets = case(distribution, 200)
    found = check(PPOLoss(distribution, 0.2), output, targets)
    flat = (found == 0).all(1)
    assert 20 < flat.sum() < 180


@given(st.sampled_from(["mean", "variance"]), st.sampled_from(REDUCTIONS), st.booleans())
def test_gaussian_likelihoods(of: str, reduction: str, full: bool) -> None:
    torch.manual_seed(0)
    output, other = torch.rand(4, 3).double() + 0.3, torch.rand(4, 3).double() + 0.3
    loss_fn = GaussianNLLLoss(of, full=full, reduction=reduction)
    check(loss_fn, output, (torch.randn(4, 3).double(), other))


@pytest.mark.parametrize("loss", ["a2c", "ppo", "nll"])
def test_recursions_start_from_them(loss: str) -> None:
    """Policies of two hidden layers; variances are exponentials of what a network gives."""
    made = {"a2c": A2CLoss, "ppo": PPOLoss}
    for distribution in DISTRIBUTIONS if loss != "nll" else ("gaussian variance",):
        torch.manual_seed(0)
        x, (_, targets) = torch.randn(6, 4), case(distribution)
        last = [Exponential()] if distribution == "gaussian variance" else []
        layers = nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3), *last
        network = Network(*layers)
        loss_fn = GaussianNLLLoss("variance") if loss == "nll" else made[loss](distribution)
        targets = (targets.action, targets.other) if loss == "nll" else targets
        expected = explicit(network, x, loss_fn, targets)
        found = tnconv.hesscale(network, loss_fn, x, targets)
        for name, p in network.named_parameters():
            assert_close(found[name], expected[p], 1e-10)


class Exponential(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.exp()


def test_errors() -> None:
    output, targets = case("softmax")
    with pytest.raises(ValueError, match="distribution is 'beta'; expected one of"):
        PPOLoss("beta")
    with pytest.raises(ValueError, match="clip is 0"):
        PPOLoss("softmax", 0)
    with pytest.raises(ValueError, match="an advantage and an old_log_probability"):
        PPOLoss("softmax")(output, Actions(targets.action))
    with pytest.raises(ValueError, match="no other parameter"):
        A2CLoss("gaussian mean")(output, Actions(output))
    with pytest.raises(ValueError, match="of is 'scale'"):
        GaussianNLLLoss("scale")
