"""Low-rank matrices in a loop of the user's own."""

from typing import Any

import pytest
import torch

import tnconv
from tests.operators.test_low_rank import case, close, flat

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("loss", ["cross-entropy", "summed", "squares"])
@pytest.mark.parametrize("network", ["strided", "tied"])
def test_a_loop_gives_what_one_call_gives(network: str, loss: str) -> None:
    model, loss_fn, x, targets = case(network, loss)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with tnconv.observe_low_rank(model) as observation:
        for size in (5, 4, 5):
            batch, wanted = x[:size], targets[:size]
            expected = tnconv.low_rank_ggn(model, loss_fn, batch, wanted)
            optimizer.zero_grad()
            output = model(batch)
            ggn = observation.ggn(loss_fn, output, wanted)
            assert all(p.grad is None for p in model.parameters())
            loss_fn(output, wanted).backward()
            close(ggn.gram, expected.gram)
            close(flat(ggn.newton_step(0.1)), flat(expected.newton_step(0.1)))
            grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            close(flat(ggn.gradient()), flat(grads))
            optimizer.step()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_settings_are_those_of_one_call() -> None:
    model, loss_fn, x, targets = case("strided")
    how = {"fisher": "mc", "samples": 2, "groups": "layer", "order": "mixed"}
    expected = tnconv.low_rank_ggn(
        model, loss_fn, x, targets, generator=torch.Generator().manual_seed(1), **how
    )
    generator = torch.Generator().manual_seed(1)
    with tnconv.observe_low_rank(model, generator=generator, **how) as observation:
        ggn = observation.ggn(loss_fn, model(x), targets)
    assert list(ggn.blocks) == list(expected.blocks)
    close(ggn.eigvalsh(), expected.eigvalsh())


def test_bad_input() -> None:
    model, loss_fn, x, targets = case("strided")
    with pytest.raises(ValueError, match="order is 'fast'; expected one of"):
        with tnconv.observe_low_rank(model, order="fast"):
            pass
    with pytest.raises(ValueError, match="groups is 'layers'"):
        with tnconv.observe_low_rank(model, groups="layers"):
            pass
    with tnconv.observe_low_rank(model) as observation:
        with pytest.raises(RuntimeError, match="the model was called 0 times since the last"):
            observation.ggn(loss_fn, model[0](x), targets)
        model(x)
        output = model(x)
        with pytest.raises(RuntimeError, match="the model was called 2 times since the last"):
            observation.ggn(loss_fn, output, targets)


SUBSETS = [([1, 3], [1, 3]), ([0, 1], None), ([4], [0, 2, 3]), (None, [2])]


NAMES = ("strided", "residual", "normalised", "tied", "words")
SHARED = [(name, "cross-entropy", SUBSETS[at % 4]) for at, name in enumerate(NAMES)]
SHARED += [("strided", loss, each) for loss in ("weighted", "summed") for each in SUBSETS]


@pytest.mark.parametrize(("network", "loss", "subsets"), SHARED, ids=str)
def test_subsets_share_the_batch(network: str, loss: str, subsets: tuple[Any, Any]) -> None:
    """Weighted means divide by the weights of the whole batch here, and of the part there."""
    model, loss_fn, x, targets = case(network, loss)
    which = dict(zip(("curvature_samples", "gradient_samples"), subsets, strict=True))
    expected = tnconv.low_rank_ggn(model, loss_fn, x, targets, **which)
    with tnconv.observe_low_rank(model) as observation:
        output = model(x)
        found = observation.ggn(loss_fn, output, targets, **which)
        loss_fn(output, targets).backward()
    close(found.gram, expected.gram)
    close(flat(found.newton_step(0.1, 2)), flat(expected.newton_step(0.1, 2)))
    close(flat(found.gradient()), flat(expected.gradient()))
    one, two = (each.directional_derivatives(k=2) for each in (found, expected))
    close(one.slopes, two.slopes)
    close(one.curvatures, two.curvatures)


def test_positions_of_subsets_are_checked() -> None:
    model, loss_fn, x, targets = case("strided")
    with tnconv.observe_low_rank(model) as observation:
        output = model(x)
        with pytest.raises(ValueError, match=r"curvature_samples are \(5,\); expected positions"):
            observation.ggn(loss_fn, output, targets, [5])
        with pytest.raises(ValueError, match=r"gradient_samples are \(\); expected positions"):
            observation.ggn(loss_fn, output, targets, [1], [])
        with pytest.raises(ValueError, match="gradient_samples have 1 repeated; expected"):
            observation.ggn(loss_fn, output, targets, [1], [1, 1])
