"""Every wrong argument is refused at once, in one or two lines that show no tensor's contents."""

import pytest
import torch

from tnconv.diagrams import conv, kfac_expand, kfac_reduce, linear, unfold, with_bias

X = (2, 4, 8, 8)
W = (6, 4, 3, 3)
SECRET = 1234.5


def layer(**hyper):
    return lambda: conv(X, W, **hyper)


def call(**changes):
    """Evaluate a small layer with some operands changed (None removes one)."""
    network = conv((2, 3, 5), (4, 3, 2))
    operands = {"x": torch.full((2, 3, 5), SECRET), "weight": torch.full((4, 3, 2), SECRET)}
    operands |= changes
    return lambda: network.reference(**{n: x for n, x in operands.items() if x is not None})


HYPER = {  # hyper-parameters that are refused wherever they appear
    "stride=0": (ValueError, "stride is 0; expected an int or 2 ints, at least 1"),
    "stride=-1": (ValueError, "stride is -1; expected an int or 2 ints, at least 1"),
    "stride=(1, 2, 3)": (ValueError, r"stride is \(1, 2, 3\); expected an int or 2 ints"),
    "stride=(1, 0)": (ValueError, r"stride is \(1, 0\); expected"),
    "stride=1.5": (TypeError, r"stride is 1\.5; expected an int or 2 ints"),
    "stride=(1, 1.5)": (TypeError, r"stride is \(1, 1\.5\); expected"),
    "stride='same'": (TypeError, "stride is 'same'; expected an int or 2 ints"),
    "stride=None": (TypeError, "stride is None; expected"),
    "dilation=0": (ValueError, "dilation is 0; expected an int or 2 ints, at least 1"),
    "dilation=2.0": (TypeError, r"dilation is 2\.0; expected"),
    "dilation=(1, 1, 1)": (ValueError, r"dilation is \(1, 1, 1\); expected an int or 2 ints"),
    "padding=-1": (ValueError, "padding is -1; expected an int or 2 ints, at least 0"),
    "padding=(1, -1)": (ValueError, r"padding is \(1, -1\); expected"),
    "padding=1.0": (TypeError, r"padding is 1\.0; expected"),
    "padding=None": (TypeError, "padding is None; expected"),
    "padding=(1, 1, 1)": (ValueError, r"padding is \(1, 1, 1\); expected an int or 2 ints"),
    "padding=((1, 2),)": (ValueError, r"padding is \(\(1, 2\),\); expected 2 \(left, right\)"),
    "padding=((1, 2), (1, -2))": (ValueError, r"padding is \(1, -2\); expected"),
    "padding=((1, 2), (1, 2, 3))": (ValueError, r"padding is \(1, 2, 3\); expected"),
    "padding=((1, 2), (1, 0.5))": (TypeError, r"padding is \(1, 0\.5\); expected"),
    "padding=(1, (1, 2))": (TypeError, r"padding is \(1, \(1, 2\)\); expected"),
    "padding='full'": (ValueError, "padding is 'full'; expected 'same', 'valid', ints or pairs"),
    "padding='SAME'": (ValueError, "padding is 'SAME'; expected"),
    "padding='same', stride=2": (ValueError, r"stride \(2, 2\); expected stride 1"),
    "padding='same', stride=(1, 2)": (ValueError, r"stride \(1, 2\); expected stride 1"),
}
TAKERS = {
    "conv": lambda **hyper: conv(X, W, **hyper),
    "unfold": lambda **hyper: unfold(X, 3, **hyper),
    "kfac_expand": lambda **hyper: kfac_expand(X, 3, **hyper),
    "kfac_reduce": lambda **hyper: kfac_reduce(X, (3, 3), **hyper),
}
OTHERS = {
    "groups do not divide": (layer(groups=3), ValueError, "groups=3 does not divide the 4 input"),
    "groups zero": (layer(groups=0), ValueError, "groups=0 does not divide the 4 input"),
    "groups negative": (layer(groups=-2), ValueError, "groups=-2 does not divide"),
    "groups float": (layer(groups=1.0), TypeError, r"groups is 1\.0; expected an int"),
    "groups of weight": (
        lambda: conv(X, (5, 2, 3, 3), groups=2),
        ValueError,
        "groups=2 does not divide the 5 output channels",
    ),
    "kernel too large": (
        lambda: conv((2, 4, 2, 8), W),
        ValueError,
        r"dimension 1 has input size 2, padding \(0, 0\) and a kernel of span 3",
    ),
    "dilated kernel too large": (
        layer(dilation=(1, 4)),
        ValueError,
        r"dimension 2 has input size 8, padding \(0, 0\) and a kernel of span 9",
    ),
    "kernel zero": (lambda: conv(X, (6, 4, 0, 3)), ValueError, r"kernel_size is \(0, 3\); exp"),
    "kernel negative": (lambda: unfold(X, -1), ValueError, "kernel_size is -1; expected"),
    "kernel float": (lambda: unfold(X, 3.0), TypeError, r"kernel_size is 3\.0; expected"),
    "kernel None": (lambda: unfold(X, None), TypeError, "kernel_size is None; expected"),
    "channels": (
        lambda: conv(X, (6, 3, 3, 3)),
        ValueError,
        r"weight has shape \(6, 3, 3, 3\); expected 4 channels in dimension 1",
    ),
    "input dimensions": (
        lambda: conv((2, 4, 8, 8, 8), W),
        ValueError,
        r"input has shape \(2, 4, 8, 8, 8\); expected",
    ),
    "input empty": (lambda: kfac_reduce((), 3), ValueError, r"input has shape \(\); expected"),
    "input negative": (lambda: conv((2, 4, -8, 8), W), ValueError, "-8"),
    "batch negative": (lambda: conv((-2, 4, 8, 8), W), ValueError, "-2"),
    "input float": (lambda: conv((2, 4, 8.0, 8), W), TypeError, "input .* float"),
    "weight float": (lambda: conv(X, (6.0, 4, 3, 3)), TypeError, "weight .* float"),
    "input int": (lambda: conv(5, W), TypeError, "input .* int"),
    "weight dimensions": (lambda: conv(X, (6,)), ValueError, r"weight has shape \(6,\); exp"),
    "input tensor": (lambda: conv(torch.full(X, SECRET), W), TypeError, "input .* Tensor"),
    "weight tensor": (lambda: conv(X, torch.full(W, SECRET)), TypeError, "weight .* Tensor"),
    "unfold tensor": (lambda: unfold(torch.full(X, SECRET), 3), TypeError, "input .* Tensor"),
    "linear tensor": (
        lambda: linear(torch.full((2, 3), SECRET), (4, 3)),
        TypeError,
        "input .* Tensor",
    ),
    "linear weight": (
        lambda: linear((2, 3), (4, 3, 1)),
        ValueError,
        r"weight has shape \(4, 3, 1\); expected \(out_features, in_features\)",
    ),
    "linear features": (
        lambda: linear((2, 3), (4, 2)),
        ValueError,
        r"input has shape \(2, 3\); expected 2 in its last dimension",
    ),
    "linear scalar": (lambda: linear((), (4, 2)), ValueError, r"input has shape \(\); expected 2"),
    "bias": (lambda: with_bias(unfold(X, 3)), ValueError, "no out-channel leg 'd' among"),
    "missing operand": (
        call(weight=None),
        ValueError,
        r"got operands \['x'\]; expected \['weight', 'x'\]",
    ),
    "unknown operand": (
        call(bias=torch.full((4,), SECRET)),
        ValueError,
        r"got operands \['bias', 'weight', 'x'\]; expected \['weight', 'x'\]",
    ),
    "operand shape": (
        call(x=torch.full((2, 5, 3), SECRET)),
        ValueError,
        r"operand 'x' has shape \(2, 5, 3\); expected \(2, 3, 5\)",
    ),
    "operand type": (call(x=[SECRET]), TypeError, "operand 'x' is a list; expected a tensor"),
}


def check(build, error, match):
    with pytest.raises(error, match=match) as raised:
        build()
    message = str(raised.value)
    assert message.count("\n") <= 1
    assert len(message) < 300
    assert "1234" not in message and "tensor(" not in message


@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize("hyper", HYPER)
def test_hyper_parameters(taker, hyper):
    keywords = eval(f"dict({hyper})")
    check(lambda: TAKERS[taker](**keywords), *HYPER[hyper])


@pytest.mark.parametrize("name", OTHERS)
def test_shapes_and_operands(name):
    check(*OTHERS[name])


def test_operands_of_a_sum():
    """Checked for all terms together, before any of them is evaluated."""
    total = with_bias(conv((2, 3, 5), (4, 3, 2)))
    x, weight = torch.zeros(2, 3, 5), torch.zeros(4, 3, 2)
    check(
        lambda: total.reference(x=x, weight=weight),
        ValueError,
        r"got operands \['weight', 'x'\]; expected \['bias', 'weight', 'x'\]",
    )
