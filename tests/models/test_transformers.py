"""Models of Hugging Face's transformers, and torch's encoder: right, and without a word."""

import sys
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tnconv
from tests.strategies import assert_close
from tnconv.quantities import GGNDiagonal, PerSampleGradients, SquaredNorms

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture
def transformers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The library, without what it would import for images and does not need here.

    What it imports stays: torch registers some operations once for each process.
    """
    monkeypatch.setitem(sys.modules, "torchvision", None)
    return pytest.importorskip("transformers")


def gpt2(t: Any) -> nn.Module:
    config = t.GPT2Config(vocab_size=17, n_positions=12, n_embd=8, n_layer=2, n_head=2,
                          use_cache=False, bos_token_id=0, eos_token_id=0)  # fmt: skip
    model: nn.Module = t.GPT2LMHeadModel(config)
    return model


def vit(t: Any) -> nn.Module:
    layers = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = t.ViTConfig(**layers, intermediate_size=12, image_size=8, patch_size=4, num_labels=3)
    model: nn.Module = t.ViTForImageClassification(config)
    return model


def resnet(t: Any) -> nn.Module:
    config = t.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1],
                            layer_type="basic", num_labels=3)  # fmt: skip
    model: nn.Module = t.ResNetForImageClassification(config)
    return model


class Encoder(nn.Module):
    """torch's own, the samples in front or behind the steps."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head, self.batch_first = nn.Linear(8, 3), batch_first

    def forward(self, x: Tensor) -> Tensor:
        y = self.encoder(x if self.batch_first else x.transpose(0, 1))
        found: Tensor = self.head(y.mean(1 if self.batch_first else 0))
        return found


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Tensor:
        found: Tensor = self.model(**inputs).logits
        return found.mT if found.dim() == 3 else found


def assert_right(model: nn.Module, inputs: dict[str, Tensor], targets: Tensor) -> None:
    """First order in both forms, and the Gauss-Newton diagonal, each sample by itself."""
    loss, each = nn.CrossEntropyLoss(reduction="sum"), GGNDiagonal(per_sample=True)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        result = tnconv.compute(model, loss, inputs, targets, [PerSampleGradients(), each])
        with tnconv.observe(model, [SquaredNorms()]) as observation:
            loss(model(**inputs), targets).backward()
        norms = observation.result()[SquaredNorms]
    for n in range(len(targets)):
        output = model(**{name: x[n : n + 1] for name, x in inputs.items()})
        gradients = torch.autograd.grad(
            loss(output, targets[n : n + 1]), [*named.values()],
            retain_graph=True, materialize_grads=True,
        )  # fmt: skip
        for name, g in zip(named, gradients, strict=True):
            if name not in result[PerSampleGradients]:
                assert not g.any()
                continue
            assert_close(result[PerSampleGradients][name][n], g, 1e-9)
            assert_close(norms[name][n], g.square().sum(), 1e-9)
        if output.dim() == 2:
            root = tnconv.losses.roots.curvature(loss, output, targets[n : n + 1]).vectors()
            squares = {name: torch.zeros_like(p) for name, p in named.items()}
            for column in root:
                for name, g in zip(
                    named,
                    torch.autograd.grad(
                        output, [*named.values()], column, retain_graph=True, materialize_grads=True
                    ),
                    strict=True,
                ):
                    squares[name] += g.square()
            for name, value in result[each].items():
                assert_close(value[n], squares[name], 1e-9)


@pytest.mark.parametrize("steps", [4, 6])
def test_gpt2(transformers: Any, steps: int) -> None:
    """Tied embeddings, linear layers of its own, a table of positions; T as N, and not."""
    words = torch.randint(17, (4, steps))
    assert_right(Logits(gpt2(transformers)).eval(), {"input_ids": words}, words)


@pytest.mark.parametrize("make", [vit, resnet])
def test_images(transformers: Any, make: Any) -> None:
    """Class tokens and positions without a layer; normalisation by running statistics."""
    size = 8 if make is vit else 16
    model = Logits(make(transformers)).eval()
    assert_right(model, {"pixel_values": torch.randn(4, 3, size, size)}, torch.randint(3, (4,)))


@pytest.mark.parametrize("steps", [4, 5])
@pytest.mark.parametrize("batch_first", [True, False])
def test_torchs_encoder(batch_first: bool, steps: int) -> None:
    model = Encoder(batch_first)
    assert_right(model, {"x": torch.randn(5, steps, 8)}, torch.randint(3, (5,)))


def test_a_loss_inside_the_model(transformers: Any) -> None:
    """What a model gives beside its loss tells the samples apart."""
    model, words = gpt2(transformers).eval(), torch.randint(17, (4, 6))
    with tnconv.observe(model, [SquaredNorms()]) as observation:
        model(input_ids=words, labels=words).loss.backward()
    result = observation.result()[SquaredNorms]
    for n in range(4):
        logits = model(input_ids=words[n : n + 1]).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), words[n, 1:], reduction="sum") / 20
        table = model.transformer.wpe.weight
        (g,) = torch.autograd.grad(loss, [table])
        assert_close(result["transformer.wpe.weight"][n], g.square().sum(), 1e-6)  # theirs: float32
