from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.functional.rows import ROWS, Layer
from tests.strategies import Case, assert_close, geometries
from tnconv import cache_clear, functional
from tnconv import functional as T

CASE = Case((3, 4, 7, 6), (6, 2, 3, 2), (2, 1), ((1, 0), (2, 1)), (1, 2), 2)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and a cotangent of the output."""
    x, weight = random(*case.input_shape), random(*case.weight_shape, seed=1)
    return x, weight, random(*case.conv(x, weight).shape, seed=2)


def factor(case: Case, x: Tensor, reduce: bool) -> Tensor:
    """The Kronecker factor from explicit patches."""
    patches = case.patches(x).flatten(2, 2 + case.dims).flatten(3)
    patches = patches.mean(-1, keepdim=True) if reduce else patches
    return torch.einsum("ngao,ngbo->gab", patches, patches) / (len(x) * patches.shape[-1])


@given(case=geometries(empty=False))
def test_operations_equal_torch(case: Case) -> None:
    x, weight, v = inputs(case)
    bias = random(weight.shape[0], seed=3)
    assert_close(T.conv(x, weight, **case.kwargs), case.conv(x, weight), 1e-10)
    assert_close(T.conv(x, weight, bias, **case.kwargs), case.conv(x, weight, bias), 1e-10)
    _, pull = torch.func.vjp(case.conv, x, weight)
    dx, dw = pull(v)
    assert_close(T.input_vjp(x.shape, weight, v, **case.kwargs), dx, 1e-10)
    assert_close(T.weight_vjp(x, weight.shape, v, **case.kwargs), dw, 1e-10)
    each = torch.stack(
        [
            torch.func.vjp(lambda w, n=n: case.conv(x[n : n + 1], w), weight)[1](v[n : n + 1])[0]
            for n in range(len(x))
        ]
    )
    assert_close(T.per_sample_weight_grad(x, weight.shape, v, **case.kwargs), each, 1e-10)
    for reduce, function in ((False, T.kfac_expand), (True, T.kfac_reduce)):
        assert_close(function(x, case.kernel_size, **case.kwargs), factor(case, x, reduce), 1e-10)
    patches = case.patches(x).flatten(1, 3 + case.dims - 1).flatten(2)
    assert_close(T.unfold(x, case.kernel_size, **case.unfold_kwargs), patches, 1e-10)


def test_linear_equals_torch() -> None:
    x, weight, bias = random(3, 5, 4), random(6, 4), random(6)
    assert_close(T.linear(x, weight, bias), F.linear(x, weight, bias), 1e-12)
    assert_close(T.linear(x[0, 0], weight), F.linear(x[0, 0], weight), 1e-12)


X, W, V = inputs(CASE)
SMALL = Case((2, 4, 4, 3), (4, 2, 3, 2), (2, 1), ((1, 0), (2, 1)), (1, 2), 2)


# Every row for its first kind of layer, and every function for all kinds.
FUNCTIONS = {
    f"{name}, {kind}": (name, kind)
    for name, row in ROWS.items()
    for kind in (row.kinds if name in functional.__all__ else row.kinds[:1])
}


# Every row for one of these, in turns: what compilers see depends on the function alone.
IN_TURNS = sorted(
    f"{name}, {kinds[at % len(kinds)]}"
    for at, (name, row) in enumerate(ROWS.items())
    if (kinds := row.kinds if name in functional.__all__ else row.kinds[:1])
)


@pytest.fixture(params=sorted(FUNCTIONS))
def case(request: Any) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    name, kind = FUNCTIONS[request.param]
    ours, _, operands = ROWS[name](Layer(SMALL, kind))
    return ours, operands


def test_differentiable_twice(case: Any) -> None:
    function, arguments = case
    tracked = [a.detach().clone().requires_grad_() for a in arguments]
    assert torch.autograd.gradcheck(function, tracked, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tracked, fast_mode=True)


def test_constant_results_have_zero_gradients() -> None:
    """An empty batch, and windows that only see padding."""
    for shape, options in (((0, 3, 5), {}), ((2, 3, 1), {"padding": 3, "stride": 4})):
        x = random(*shape).requires_grad_()
        weight = random(4, 3, 2, seed=1).requires_grad_()
        T.conv(x, weight, **options).sum().backward()
        assert x.grad is not None and not x.grad.any()
        assert weight.grad is not None and not weight.grad.any()


def test_vmap_over_any_argument(case: Any) -> None:
    function, arguments = case
    for at in range(len(arguments)):
        stacked = torch.stack([arguments[at], 2 * arguments[at] + 1, -arguments[at]])
        given = (*arguments[:at], stacked, *arguments[at + 1 :])
        dims = tuple(0 if position == at else None for position in range(len(arguments)))
        mapped = torch.func.vmap(function, in_dims=dims)(*given)
        looped = torch.stack(
            [function(*arguments[:at], one, *arguments[at + 1 :]) for one in stacked]
        )
        assert_close(mapped, looped, 1e-10)


def test_forward_and_reverse_jacobians_agree(case: Any) -> None:
    function, arguments = case
    reverse = torch.func.jacrev(function)(*arguments)
    forward = torch.func.jacfwd(function)(*arguments)
    assert_close(forward, reverse, 1e-10)


@pytest.mark.parametrize("case", IN_TURNS, indirect=True)
def test_torch_compile_in_one_graph_with_nothing_compiled_before(case: Any) -> None:
    function, arguments = case
    cache_clear()
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    tracked = [a.detach().clone().requires_grad_() for a in arguments]
    value = compiled(*tracked)
    assert_close(value.detach(), function(*arguments), 1e-10)
    grads = torch.autograd.grad(value.square().sum(), tracked)
    expected = torch.autograd.grad(function(*tracked).square().sum(), tracked)
    for grad, other in zip(grads, expected, strict=True):
        assert_close(grad, other, 1e-10)


def test_torch_compile_with_another_batch_size() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, w: T.conv(x, w, **CASE.kwargs), fullgraph=True, backend="aot_eager"
    )
    for batch in (2, 3, 5):
        x = random(batch, *X.shape[1:])
        assert_close(compiled(x, W), CASE.conv(x, W), 1e-10)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)]
)
def test_other_dtypes(case: Any, dtype: torch.dtype, tolerance: float) -> None:
    """Tolerances are a few roundings of a sum, relative to the largest entry."""
    function, arguments = case
    value = function(*(a.to(dtype) for a in arguments))
    expected = function(*arguments)
    assert value.dtype == dtype
    error = (value.double() - expected).abs().max() / expected.abs().max()
    assert error < tolerance


def test_float16_scale_neither_underflows_nor_overflows() -> None:
    """1/(N·O²) is below float16's least number and N·O² above its largest."""
    x = torch.ones(4, 2, 64, 64, dtype=torch.float16)
    value = T.kfac_reduce(x, 1)
    torch.testing.assert_close(value, torch.ones_like(value), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ["kfac_expand", "kfac_reduce"])
@given(
    batch=st.sampled_from((1, 3, 64)),
    size=st.integers(4, 64),
)
@settings(max_examples=settings.default.max_examples // 4)
def test_float16_factors_are_means(name: str, batch: int, size: int) -> None:
    """They fit, however many terms they have; the sums of these do not."""
    x = torch.ones((batch, 2, size, size), dtype=torch.float16)
    value = getattr(T, name)(x, 1)
    torch.testing.assert_close(value, torch.ones_like(value), rtol=1e-2, atol=0)


def test_meta_device(case: Any) -> None:
    function, arguments = case
    value = function(*(a.to("meta") for a in arguments))
    assert value.device.type == "meta"
    assert value.shape == function(*arguments).shape


def test_autocast() -> None:
    x, weight, v = (t.float() for t in inputs(CASE))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert T.conv(x, weight, **CASE.kwargs).dtype == torch.bfloat16
        mixed = T.weight_vjp(x, W.shape, v.bfloat16(), **CASE.kwargs)
        assert mixed.dtype == torch.bfloat16
    expected = T.weight_vjp(x, W.shape, v, **CASE.kwargs)
    assert (mixed.float() - expected).abs().max() < 3e-2 * expected.abs().max()


def test_autocast_leaves_float64_alone_as_torch_does() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, expected = T.conv(X, W, **CASE.kwargs), CASE.conv(X, W)
        assert value.dtype == expected.dtype == torch.float64
        assert_close(value, expected, 1e-10)
        with pytest.raises(ValueError, match="expected one dtype"):
            T.conv(X, W.float(), **CASE.kwargs)


def test_autocast_leaves_complex_tensors_alone_as_torch_does() -> None:
    x, weight = X + 1j * X.flip(0), W - 2j * W
    expected = T.conv(x, weight, **CASE.kwargs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close_complex(T.conv(x, weight, **CASE.kwargs), expected)


def test_one_entry_is_for_all_dimensions_as_in_torch() -> None:
    settings = {"stride": (2,), "padding": [1], "dilation": (1,)}
    expected = F.conv2d(X[:, :2], W, stride=(2,), padding=(1,))
    assert_close(T.conv(X[:, :2], W, **settings), expected, 1e-10)


def test_memory_formats_and_strides(case: Any) -> None:
    function, arguments = case
    expected = function(*arguments)
    last = [
        a.contiguous(memory_format=torch.channels_last) if a.ndim == 4 else a for a in arguments
    ]
    spread = [torch.stack([a, a], -1)[..., 0] for a in arguments]
    for other in (last, spread):
        assert_close(function(*other), expected, 1e-10)


def test_complex() -> None:
    """Torch has no complex kernels for gradients and dilation; other routes do without."""
    x, weight = X + 1j * X.flip(0), W - 2j * W
    y = CASE.conv(X, W), CASE.conv(X.flip(0), W)
    expected = torch.complex(y[0] + 2 * y[1], y[1] - 2 * y[0])
    assert_close_complex(T.conv(x, weight, **CASE.kwargs), expected)
    dw = T.weight_vjp(x, W.shape, V.to(x.dtype), **CASE.kwargs)
    real = T.weight_vjp(X, W.shape, V, **CASE.kwargs)
    imaginary = T.weight_vjp(X.flip(0), W.shape, V, **CASE.kwargs)
    assert_close_complex(dw, torch.complex(real, imaginary))
    means = [T.avg_pool(part, 3, 2, 1) for part in (X, X.flip(0))]
    pooled = T.avg_pool(x, 3, 2, 1)
    assert_close_complex(pooled, torch.complex(*means))
    assert torch.autograd.gradcheck(lambda x: T.avg_pool(x, 3, 2, 1), x[:1, :1].requires_grad_())


def assert_close_complex(actual: Tensor, expected: Tensor) -> None:
    assert_close(torch.view_as_real(actual), torch.view_as_real(expected), 1e-10)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: T.conv(X, random(6, 3, 3, 2), groups=2), "2 channels in dimension 1"),
        (lambda: T.conv(X, W, groups=3), "groups=3 does not divide"),
        (lambda: T.conv(X, random(6, 4, 9, 9)), "a kernel of span 9"),
        (lambda: T.weight_vjp(X, W.shape, V[:, :, :1], **CASE.kwargs), "'grad_output' has shape"),
        (lambda: T.conv(X, random(6, 4, 3, 2), padding="full"), "expected 'same', 'valid'"),
        (lambda: T.conv(X, W.float(), **CASE.kwargs), "expected one dtype"),
        (lambda: T.kfac_reduce(X[0, 0], (3, 2, 1)), "expected \\(batch, channels\\)"),
    ],
)
def test_errors_come_before_any_work(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert len(str(caught.value).splitlines()) <= 2 and "tensor(" not in str(caught.value)


def test_scales_are_numbers_or_names() -> None:
    with pytest.raises(TypeError, match="scale is None; expected 'ggn', 'kfc' or a number"):
        T.kfac_expand(X, (3, 2), scale=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scale is 'mean'; expected 'ggn', 'kfc' or a number"):
        T.grad_reduce(V, scale="mean")  # type: ignore[arg-type]


def test_linear_layers_have_no_hyper_parameters_of_convolutions() -> None:
    x, v = random(3, 5, 4), random(3, 5, 6)
    with pytest.raises(ValueError, match="stride is 2 for a linear layer; expected 1"):
        T.weight_vjp(x, (6, 4), v, stride=2)
    with pytest.raises(ValueError, match="groups is 2 for a linear layer; expected 1"):
        T.kfac_reduce(x, (), groups=2)
