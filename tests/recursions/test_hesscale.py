"""`tnconv.hesscale` against the definition, with dense Jacobians, operation by operation."""

import copy
from functools import partial
from math import gcd

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tnconv
from tests.recursions.oracle import Network, Operation, explicit
from tests.strategies import assert_close

pytestmark = pytest.mark.usefixtures("float64")
METHODS = ("hesscale", "gn", "bl89")


class Function(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def check(network: Network, x: Tensor, loss_fn, targets, methods=METHODS) -> None:
    for method in methods:
        found = tnconv.hesscale(network, loss_fn, x, targets, method)
        expected = explicit(network, x, loss_fn, targets, method)
        names = {p: name for name, p in network.named_parameters()}
        assert found.keys() == {names[p] for p in expected}
        for p, value in expected.items():
            assert_close(found[names[p]], value, 1e-10)


ACTIVATIONS = {
    "relu": nn.ReLU(),
    "relu inplace": nn.ReLU(inplace=True),
    "relu6": nn.ReLU6(),
    "leaky": nn.LeakyReLU(0.2),
    "elu": nn.ELU(0.7),
    "elu inplace": nn.ELU(inplace=True),
    "selu": nn.SELU(),
    "celu": nn.CELU(0.7),
    "silu": nn.SiLU(),
    "silu inplace": nn.SiLU(inplace=True),
    "gelu": nn.GELU(),
    "gelu tanh": nn.GELU("tanh"),
    "softplus": nn.Softplus(2.0, 1.0),
    "tanh": nn.Tanh(),
    "sigmoid": nn.Sigmoid(),
    "logsigmoid": nn.LogSigmoid(),
    "hardtanh": nn.Hardtanh(-0.5, 0.5),
    "hardswish": nn.Hardswish(),
    "mish": nn.Mish(),
    "softsign": nn.Softsign(),
    "tanhshrink": nn.Tanhshrink(),
    "softshrink": nn.Softshrink(0.2),
    "hardshrink": nn.Hardshrink(0.2),
    "threshold": nn.Threshold(0.1, 0.3),
    "prelu": nn.PReLU(),
    "prelu channels": nn.PReLU(4),
    "exp": Function(torch.exp),
    "square": Function(torch.square),
    "cube": Function(lambda x: x**3),
    "sine": Function(torch.sin),
    "swish": Function(lambda x: x * torch.sigmoid(1.3 * x)),
    "product with itself": Function(lambda x: x * x),
    "doubled": Function(lambda x: x + x),
    "gelu by hand": Function(lambda x: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.04 * x**3)))),
    "quotient": Function(lambda x: x / (1 + x**2)),
    "residual": Function(lambda x: x - 0.3 * torch.relu(x)),
    "reciprocal": Function(lambda x: 1.5 / (2.0 + x.exp())),
    "where": Function(lambda x: torch.where(x > 0, x, 0.1 * x.sin())),
    "softmax": nn.Softmax(1),
    "softmax last": nn.Softmax(-1),
    "softmin": nn.Softmin(1),
    "logsoftmax": nn.LogSoftmax(1),
    "glu": nn.GLU(1),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str) -> None:
    """Also two in a row, and directly before the loss, where the published code drops f''."""
    act = copy.deepcopy(ACTIVATIONS[name]).double()
    torch.manual_seed(0)
    x, labels = torch.randn(3, 5), torch.randint(2, (3,))
    width = 2 if name == "glu" else 4
    layers = nn.Linear(5, 4), act, nn.Linear(width, 4), nn.Softplus(), act, nn.Linear(width, 4), act
    network = Network(*layers)
    check(network, x, nn.CrossEntropyLoss(), labels)
    check(network, x, nn.MSELoss(), torch.randn(3, width))


class Attention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


PAD = [(n, m) for n in (1, 2) for m in ("reflect", "replicate", "circular")]
IMAGES = {
    "conv": nn.Conv2d(4, 4, 3, stride=2, padding=1, dilation=1, groups=2),
    "conv dilated": nn.Conv2d(4, 3, (2, 3), dilation=(2, 1), padding=(1, 2), bias=False),
    "conv same": nn.Conv2d(4, 4, 3, padding="same"),
    "conv same even": nn.Conv2d(4, 4, 2, padding="same"),
    "conv transposed": nn.ConvTranspose2d(4, 4, 3, stride=2, output_padding=1, groups=2),
    "max pool": nn.MaxPool2d(3, 2),
    "max pool overlapping": nn.MaxPool2d(3, 1, padding=1),
    "average pool": nn.AvgPool2d(2),
    "average pool padded": nn.AvgPool2d(3, 2, padding=1),
    "average pool ceil": nn.AvgPool2d(2, 2, ceil_mode=True),
    "average pool padded ceil": nn.AvgPool2d((3, 2), (2, 3), padding=1, ceil_mode=True),
    "average pool uncounted": nn.AvgPool2d(3, 2, padding=1, count_include_pad=False),
    "average pool divisor": nn.AvgPool2d(2, divisor_override=3),
    "adaptive average": nn.AdaptiveAvgPool2d((2, 3)),
    "adaptive average to one": nn.AdaptiveAvgPool2d(1),
    "adaptive max": nn.AdaptiveMaxPool2d((2, 3)),
    "mean": Function(lambda x: x.mean((2, 3), keepdim=True)),
    "sum": Function(lambda x: x.sum(3)),
    "upsample nearest": nn.Upsample(scale_factor=2),
    "upsample bilinear": nn.Upsample(scale_factor=1.7, mode="bilinear"),
    "upsample bilinear aligned": nn.Upsample((7, 3), mode="bilinear", align_corners=True),
    "upsample bicubic": nn.Upsample((7, 3), mode="bicubic"),
    "pixel shuffle": nn.PixelShuffle(2),
    "reflection pad": nn.ReflectionPad2d(2),
    "replication pad": nn.ReplicationPad2d(2),
    "circular pad": nn.CircularPad2d((2, 1, 0, 3)),
    "zero pad": nn.ZeroPad2d(1),
    "unfold": nn.Unfold(2),
    "batch norm": nn.BatchNorm2d(4).eval(),
    "batch norm training": nn.BatchNorm2d(4, track_running_stats=False),
    "instance norm": nn.InstanceNorm2d(4, affine=True),
    "group norm": nn.GroupNorm(2, 4),
    "layer norm": nn.LayerNorm(5),
    "layer norm two": nn.LayerNorm((5, 5), bias=False),
    "layer norm plain": nn.LayerNorm(5, elementwise_affine=False),
    "flip": Function(lambda x: x.flip(2).roll(1, 1).transpose(2, 3)),
    "slices": Function(lambda x: torch.cat([x[:, 1:], x[:, :2], 2 * x[:, ::2]], 1)),
    "first chunk": Function(lambda x: x.chunk(2, 1)[0]),
    "unbound": Function(lambda x: x.unbind(1)[0]),
    "largest": Function(lambda x: torch.cat([x.topk(2, 1)[0], x.sort(2)[0], x.max(1, True)[0]], 1)),
    "chunks": Function(lambda x: torch.stack(x.chunk(2, 1), 1)),
    "repeat": Function(lambda x: x.repeat(1, 2, 1, 1)),
    "cumsum": Function(lambda x: x.cumsum(1)),
    "softmax of channels": nn.Softmax(1),
    "prelu": nn.PReLU(4),
} | {
    f"conv {mode} {n}": nn.Conv2d(4, 3, 2 * n + 1, padding=n, padding_mode=mode) for n, mode in PAD
}  # fmt: skip


@pytest.mark.parametrize("name", IMAGES)
def test_operations_on_images(name: str) -> None:
    module = copy.deepcopy(IMAGES[name]).double()
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -1, 1)
    if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
        module.running_mean.uniform_(-1, 1), module.running_var.uniform_(0.5, 2)
    x, labels = torch.randn(2, 2, 5, 5), torch.randint(3, (2,))
    features = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), module, nn.Flatten())(x)
    head = nn.Linear(features.shape[1], 3)
    layers = nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), module, nn.Tanh(), nn.Flatten(), head
    check(Network(*layers), x, nn.CrossEntropyLoss(), labels)


DIMENSIONS = {
    "conv": (nn.Conv1d(2, 3, 3, padding=1), nn.Conv3d(2, 3, 2, padding=1)),
    "conv transposed": (nn.ConvTranspose1d(2, 3, 3, 2), nn.ConvTranspose3d(2, 3, 2, 2)),
    "average pool": (nn.AvgPool1d(2), nn.AvgPool3d(2)),
    "adaptive average": (nn.AdaptiveAvgPool1d(2), nn.AdaptiveAvgPool3d(2)),
    "max pool": (nn.MaxPool1d(2), nn.MaxPool3d(2)),
    "adaptive max": (nn.AdaptiveMaxPool1d(2), nn.AdaptiveMaxPool3d(2)),
    "upsample": (nn.Upsample(scale_factor=2), nn.Upsample(scale_factor=2)),
    "linear upsample": (nn.Upsample(5, mode="linear"), nn.Upsample((4, 2, 5), mode="trilinear")),
    "replication pad": (nn.ReplicationPad1d(1), nn.ReplicationPad3d(1)),
    "circular conv": (
        nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"),
        nn.Conv3d(2, 3, 3, padding=1, padding_mode="circular"),
    ),
}


@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("name", DIMENSIONS)
def test_one_and_three_dimensions(name: str, dims: int) -> None:
    """Where the published code raises after an activation."""
    module = copy.deepcopy(DIMENSIONS[name][dims == 3]).double()
    torch.manual_seed(0)
    first = (nn.Conv1d if dims == 1 else nn.Conv3d)(1, 2, 1)
    x, labels = torch.randn(2, 1, *[3] * dims), torch.randint(3, (2,))
    head = nn.Linear(module(first(x)).flatten(1).shape[1], 3)
    layers = first, nn.Tanh(), module, nn.Sigmoid(), nn.Flatten(), head
    check(Network(*layers), x, nn.CrossEntropyLoss(), labels)


def test_dropout_squares_its_mask() -> None:
    torch.manual_seed(0)
    x, labels, loss_fn = torch.randn(4, 5), torch.randint(3, (4,)), nn.CrossEntropyLoss()
    layers = nn.Linear(5, 6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 3)
    torch.manual_seed(3)
    mask = F.dropout(torch.ones(4, 6))
    assert mask.unique().tolist() == [0, 2]
    network = Network(layers[0], Function(lambda x: x * mask), *layers[2:])
    expected = explicit(network, x, loss_fn, labels)
    model = nn.Sequential(*layers)
    torch.manual_seed(3)
    found = tnconv.hesscale(model, loss_fn, x, labels)
    for name, p in model.named_parameters():
        assert_close(found[name], expected[p], 1e-12)


def topologies() -> dict[str, Network]:
    shared, act = nn.Linear(4, 4), nn.Tanh()
    add, cat = Function(torch.add), Function(lambda *x: torch.cat(x, 1))
    return {
        "residual": Network(
            *(nn.Linear(5, 4), nn.Linear(4, 4), act),
            *(Operation(add, (1, 3)), nn.Tanh(), nn.Linear(4, 3)),
        ),
        "concatenation": Network(
            *(nn.Linear(5, 4), Operation(nn.Linear(5, 2), (0,)), Operation(cat, (1, 2, 1))),
            *(nn.Tanh(), nn.Linear(10, 3)),
        ),
        "shared": Network(nn.Linear(5, 4), shared, act, shared, act, shared, nn.Linear(4, 3)),
        "product": Network(
            *(nn.Linear(5, 4), Operation(nn.Linear(5, 4), (0,))),
            *(Operation(Function(torch.mul), (1, 2)), nn.Tanh(), nn.Linear(4, 3)),
        ),
        "quotient": Network(
            *(nn.Linear(5, 4), Operation(nn.Sequential(nn.Linear(5, 4)), (0,))),
            *(Operation(Function(lambda a, b: b), (1, 2)), Function(lambda b: 2 + b**2)),
            *(Operation(Function(torch.div), (1, 4)), nn.Linear(4, 3)),
        ),
        "difference": Network(
            *(nn.Linear(5, 4), Operation(nn.Linear(5, 1), (0,))),
            *(Operation(Function(lambda a, b: torch.sub(a, b, alpha=3)), (1, 2)), nn.Tanh()),
            nn.Linear(4, 3),
        ),
        "matrices": Network(
            *(nn.Linear(5, 6), Function(lambda x: x.reshape(-1, 2, 3)), nn.Tanh()),
            *(Operation(nn.Linear(5, 6), (0,)), Function(lambda x: x.reshape(-1, 3, 2))),
            *(Operation(Function(torch.matmul), (3, 5)), nn.Flatten(), nn.Linear(4, 3)),
        ),
        "no bias": Network(nn.Linear(5, 4, bias=False), act, nn.Linear(4, 3, bias=False)),
        "branches": Network(
            *(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), Operation(nn.Sigmoid(), (1,))),
            *(Operation(Function(lambda a, b: torch.stack([a, b], 1)), (3, 4)), nn.Flatten()),
            nn.Linear(8, 3),
        ),
    }


@pytest.mark.parametrize("name", topologies())
def test_topologies(name: str) -> None:
    torch.manual_seed(0)
    network, x, labels = topologies()[name], torch.randn(3, 5), torch.randint(3, (3,))
    check(network, x, nn.CrossEntropyLoss(), labels)
    check(network, x, nn.MSELoss(reduction="sum"), torch.randn(3, 3))


def test_sequences() -> None:
    """Linear layers over positions, embeddings, attention by torch's own function."""
    torch.manual_seed(0)
    tokens, labels = torch.randint(6, (2, 3)), torch.randint(2, (2,))

    def heads(x: Tensor) -> Tensor:
        return x.reshape(2, 3, 2, 2).transpose(1, 2)

    layers = (
        *(nn.Embedding(6, 4), nn.LayerNorm(4)),
        *(Operation(nn.Linear(4, 4), (2,)), Function(heads)),
        *(Operation(nn.Linear(4, 4, bias=False), (2,)), Function(heads)),
        *(Operation(nn.Linear(4, 4), (2,)), Function(heads)),
        Operation(Function(lambda q, k: 0.7 * q @ k.mT), (4, 6)),
        nn.Softmax(-1),
        Operation(Function(torch.matmul), (10, 8)),
        Function(lambda x: x.transpose(1, 2).reshape(2, 12)),
        nn.Linear(12, 2),
    )
    network = Network(*layers)
    check(network, tokens, nn.CrossEntropyLoss(), labels)


class Attends(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.head = (nn.Linear(4, n) for n in (4, 4, 4, 3))
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).reshape(2, 3, 2, 2).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.mT / 2**0.5).softmax(-1) @ v
        return self.head(y.transpose(1, 2).reshape(2, 3, 4).mean(1))


def test_fused_attention_is_taken_apart() -> None:
    torch.manual_seed(0)
    model, other = Attends(True), Attends(False)
    other.load_state_dict(model.state_dict())
    x, labels = torch.randn(2, 3, 4), torch.randint(3, (2,))
    found = tnconv.hesscale(model, nn.CrossEntropyLoss(), x, labels)
    expected = tnconv.hesscale(other, nn.CrossEntropyLoss(), x, labels)
    for name, value in found.items():
        assert_close(value, expected[name], 1e-12)


LOSSES = {
    "weights": (nn.CrossEntropyLoss(torch.tensor([0.5, 2.0, 1.0]).double()), "labels"),
    "sum": (nn.CrossEntropyLoss(reduction="sum"), "labels"),
    "ignored": (nn.CrossEntropyLoss(ignore_index=1), "labels"),
    "squares": (nn.MSELoss(), "values"),
    "binary": (nn.BCEWithLogitsLoss(), "probabilities"),
    "binary weights": (
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor([0.5, 2.0, 1.0]).double()),
        "probabilities",
    ),
    "absolute": (nn.L1Loss(), "values"),
    "function": (F.cross_entropy, "labels"),
    "partial": (partial(F.mse_loss, reduction="sum"), "values"),
    "smoothing": (nn.CrossEntropyLoss(label_smoothing=0.2), "labels"),
    "soft": (nn.CrossEntropyLoss(torch.tensor([0.5, 2.0, 1.0]).double()), "soft"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str) -> None:
    loss_fn, kind = LOSSES[name]
    torch.manual_seed(0)
    targets = {
        "labels": torch.tensor([0, 2, 1, 1]),
        "values": torch.randn(4, 3),
        "probabilities": torch.rand(4, 3),
        "soft": torch.rand(4, 3).softmax(1),
    }[kind]
    network = Network(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    plain = isinstance(loss_fn, nn.CrossEntropyLoss) and not loss_fn.label_smoothing
    methods = METHODS if plain or kind == "values" else ("hesscale", "gn")
    check(network, torch.randn(4, 5), loss_fn, targets, methods)


def test_spatial_cross_entropy() -> None:
    torch.manual_seed(0)
    network = Network(nn.Conv2d(2, 4, 3, padding=1), nn.GELU(), nn.Conv2d(4, 3, 2))
    labels = torch.randint(3, (2, 3, 3))
    loss_fn = nn.CrossEntropyLoss(torch.tensor([0.5, 2.0, 1.0]), ignore_index=1)
    check(network, torch.randn(2, 2, 4, 4), loss_fn, labels)


def test_gradients_in_the_same_pass() -> None:
    torch.manual_seed(0)
    network, x = topologies()["residual"], torch.randn(3, 5)
    labels, loss_fn = torch.randint(3, (3,)), nn.CrossEntropyLoss()
    expected = tnconv.hesscale(network, loss_fn, x, labels)
    assert all(p.grad is None for p in network.parameters())
    for times in (1, 2):
        found = tnconv.hesscale(network, loss_fn, x, labels, backward=True)
        grads = torch.autograd.grad(loss_fn(network(x), labels), list(network.parameters()))
        for p, gradient in zip(network.parameters(), grads, strict=True):
            assert_close(p.grad, times * gradient, 1e-12)
    for name, value in found.items():
        assert torch.equal(value, expected[name])


def test_frozen_and_chosen_parameters() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    x, labels, loss_fn = torch.randn(3, 5), torch.randint(3, (3,)), nn.CrossEntropyLoss()
    whole = tnconv.hesscale(model, loss_fn, x, labels)
    some = tnconv.hesscale(model, loss_fn, x, labels, parameters=["2.bias", "0.weight"])
    assert some.keys() == {"0.weight", "2.bias"}
    model[2].weight.requires_grad_(False)
    frozen = tnconv.hesscale(model, loss_fn, x, labels)
    assert frozen.keys() == whole.keys() - {"2.weight"}
    for name, value in (some | frozen).items():
        assert torch.equal(value, whole[name])


def test_log_probabilities_are_cross_entropy() -> None:
    """Also where the Gauss-Newton matrix in the log-probabilities would be zero."""
    torch.manual_seed(0)
    logits = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    x, labels, weight = torch.randn(6, 5), torch.tensor([0, 2, 1, 1, 2, 0]), torch.rand(3)
    for dim in (1, -1):
        model = nn.Sequential(logits, nn.LogSoftmax(dim))
        for how in ({}, {"reduction": "sum"}, {"ignore_index": 2}, {"weight": weight}):
            for method in (*METHODS, "hesscale+"):
                one = tnconv.hesscale(model, nn.NLLLoss(**how), x, labels, method)
                two = tnconv.hesscale(logits, nn.CrossEntropyLoss(**how), x, labels, method)
                for name, value in two.items():
                    assert_close(one[f"0.{name}"], value, 1e-12)
    with pytest.raises(NotImplementedError, match="ends in log_softmax over dimension 1"):
        tnconv.hesscale(logits, nn.NLLLoss(), x, labels)


def test_a_rule_of_the_users() -> None:
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, v: Tensor) -> Tensor:
            return 3 * ctx.saved_tensors[0] ** 2 * v

    x, labels, loss_fn = torch.randn(3, 5), torch.randint(3, (3,)), nn.CrossEntropyLoss()
    layers = nn.Linear(5, 4), nn.Linear(4, 3)
    model = nn.Sequential(layers[0], Function(Cube.apply), layers[1])
    with pytest.raises(NotImplementedError, match="Cube after layer '0'; expected an operation"):
        tnconv.hesscale(model, loss_fn, x, labels)

    @tnconv.recursions.register_rule("Cube", curved=True, diagonal=True)
    def cube(step: tnconv.recursions.Step) -> tnconv.recursions.Flows:
        (x,) = step.node.saved_tensors
        return step.entrywise(3 * x**2, 6 * x)

    found = tnconv.hesscale(model, loss_fn, x, labels)
    model[1] = Function(lambda x: x**3)
    for name, value in tnconv.hesscale(model, loss_fn, x, labels).items():
        assert_close(found[name], value, 1e-12)


def test_errors_come_before_work() -> None:
    model, loss_fn = nn.Sequential(nn.Linear(5, 3)), nn.CrossEntropyLoss()
    x, labels = torch.randn(2, 5), torch.randint(3, (2,))
    with pytest.raises(ValueError, match="method is 'ggn'; expected one of hesscale, gn"):
        tnconv.hesscale(model, loss_fn, x, labels, "ggn")
    with pytest.raises(ValueError, match="no parameters that learn are called head"):
        tnconv.hesscale(model, loss_fn, x, labels, parameters=["head"])
    with pytest.raises(NotImplementedError, match="of the loss HuberLoss"):
        tnconv.hesscale(model, nn.HuberLoss(), x, torch.randn(2, 3))
    with pytest.raises(ValueError, match="depends on no parameter"):
        tnconv.hesscale(nn.Linear(5, 3).requires_grad_(False), loss_fn, x, labels)
    recurrent = nn.Sequential(nn.Conv2d(1, 2, 3), Function(lambda x: x.flatten(1).var(1)[:, None]))
    with pytest.raises(NotImplementedError, match="through Var after layer '0'"):
        tnconv.hesscale(recurrent, nn.MSELoss(), torch.randn(2, 1, 4, 4), torch.randn(2, 1))
    around = nn.Sequential(
        nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 5, padding=2, padding_mode="circular"), nn.Flatten()
    )
    with pytest.raises(NotImplementedError, match=r"windows of \(5, 5\).*\(4, 4\) twice"):
        tnconv.hesscale(around, nn.MSELoss(), torch.randn(2, 1, 4, 4), torch.randn(2, 16))


def test_changes_in_place_that_are_no_copies_are_refused() -> None:
    def scaled(x: Tensor) -> Tensor:
        y = x.clone()
        y[:, 0].mul_(2)
        return y

    model = nn.Sequential(nn.Linear(5, 4), Function(scaled), nn.Linear(4, 3))
    x, labels = torch.randn(2, 5), torch.randint(3, (2,))
    with pytest.raises(NotImplementedError, match="'0': a tensor is changed in place"):
        tnconv.hesscale(model, nn.CrossEntropyLoss(), x, labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precisions(dtype: torch.dtype) -> None:
    """The diagonal is float32 at least, and near that of float64."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 3, 3), nn.GELU(), nn.AvgPool2d(2), nn.LeakyReLU(), nn.Conv2d(3, 3, 2)),
        *(nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)),
    )
    x, labels, loss_fn = torch.randn(4, 1, 8, 8), torch.randint(3, (4,)), nn.CrossEntropyLoss()
    exact = tnconv.hesscale(model, loss_fn, x, labels)
    found = tnconv.hesscale(model.to(dtype), loss_fn, x.to(dtype), labels)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    for name, value in found.items():
        assert value.dtype == torch.float32
        assert (value - exact[name]).abs().max() <= tolerance * exact[name].abs().max()


def test_autocast_and_compiled_models() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).float()
    x, labels, loss_fn = torch.randn(4, 5).float(), torch.randint(3, (4,)), nn.CrossEntropyLoss()
    exact = tnconv.hesscale(model, loss_fn, x, labels)
    with torch.autocast("cpu", torch.bfloat16):
        found = tnconv.hesscale(model, loss_fn, x, labels, backward=True)
    compiled = tnconv.hesscale(torch.compile(model), loss_fn, x, labels)
    for (name, p), value in zip(model.named_parameters(), exact.values(), strict=True):
        assert p.grad.dtype == torch.float32
        assert (found[name] - value).abs().max() <= 0.1 * value.abs().max()
        assert torch.equal(compiled[name], value)


SAME = ("gelu", "tanh", "relu", "softsign", "softmax", "group norm", "batch norm", "circular")
ANY = ("average", "max", "bilinear", "conv", "reflect", "transposed", "shuffle")


def part(name: str, channels: int) -> nn.Module:
    """An operation on images of 4 channels."""
    return {
        "gelu": nn.GELU(),
        "tanh": nn.Tanh(),
        "relu": nn.ReLU(),
        "softsign": nn.Softsign(),
        "softmax": nn.Softmax(1),
        "group norm": nn.GroupNorm(gcd(2, channels), channels),
        "batch norm": nn.BatchNorm2d(channels).eval(),
        "circular": nn.Conv2d(channels, channels, 3, padding=1, padding_mode="circular"),
        "average": nn.AvgPool2d(2, 2, ceil_mode=True, padding=1),
        "max": nn.MaxPool2d(2, 1),
        "bilinear": nn.Upsample(3, mode="bilinear"),
        "conv": nn.Conv2d(channels, 4, 2, padding="same"),
        "reflect": nn.Conv2d(channels, 4, 3, 2, padding=1, padding_mode="reflect"),
        "transposed": nn.ConvTranspose2d(channels, 4, 2),
        "shuffle": nn.PixelShuffle(2),
    }[name].double()


@settings(max_examples=15 if settings().max_examples < 100 else 300)
@given(st.data())
def test_random_networks(data: st.DataObject) -> None:
    """Operations in a chain, with sums and concatenations of any earlier values that fit."""
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    x = torch.randn(2, 1, 4, 4).double()
    operations = [Operation(nn.Conv2d(1, 4, 2).double(), (0,))]
    values = Network(*operations).values(x)
    for _ in range(data.draw(st.integers(1, 4))):
        shape = values[-1].shape
        joined = [at for at, v in enumerate(values[1:], 1) if v.shape[2:] == shape[2:]]
        same = [name for name in SAME if name != "circular" or min(shape[2:]) > 2]
        names = [*same, *(ANY if min(shape[2:]) > 1 and shape[1] == 4 else ()), "add", "cat"]
        name = data.draw(st.sampled_from(names))
        if name in ("add", "cat"):
            other = data.draw(st.sampled_from(joined))
            add = name == "add" and values[other].shape == shape
            join = torch.add if add else (lambda *v: torch.cat(v, 1))
            operations.append(Operation(Function(join), (other, len(operations))))
        else:
            operations.append(Operation(part(name, shape[1]), (len(operations),)))
        values = Network(*operations).values(x)
    head = nn.Linear(values[-1].flatten(1).shape[1], 3).double()
    network = Network(*operations, nn.Flatten(), head)
    check(network, x, nn.CrossEntropyLoss(), torch.randint(3, (2,)))


class Broadcast(nn.Module):
    """A sum and a selection of tensors that are repeated along others' dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.added, self.chosen = nn.Parameter(torch.randn(4, 1)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)[:, :, None] * torch.ones(5) + self.added.tanh()
        y = torch.where(y > 0, y, self.chosen.tanh()[:, None])
        return self.head(y.sum(2))


def test_what_is_broadcast() -> None:
    """Gradients and diagonals have the shapes of what they belong to."""
    torch.manual_seed(0)
    model, x, y = Broadcast(), torch.randn(6, 3), torch.randint(2, (6,))
    loss_fn = nn.CrossEntropyLoss()
    expected = torch.autograd.grad(loss_fn(model(x), y), list(model.parameters()))
    found = tnconv.hesscale(model, loss_fn, x, y, backward=True)
    for (name, p), g in zip(model.named_parameters(), expected, strict=True):
        assert found[name].shape == p.shape
        assert_close(p.grad, g, 1e-12)
