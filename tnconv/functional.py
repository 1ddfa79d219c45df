"""One call per operation: tensors in, tensors out, with torch's argument names and defaults.

Programs are compiled on the first call for given shapes and hyper-parameters and looked up later.
Every function can be differentiated (also twice), transformed by ``torch.func``, and used under
``torch.compile(fullgraph=True)``, also where nothing has been compiled before.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from tnconv import diagrams
from tnconv.codegen import Program, compile
from tnconv.diagrams import Expression
from tnconv.diagrams.geometry import IntOrTuple, Padding

Setting = int | str | tuple["Setting", ...]


def conv(
    x: Tensor,  # (n, g·c, *i) or (g·c, *i)
    weight: Tensor,  # (g·d, c, *k)
    bias: Tensor | None = None,  # (g·d,)
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
) -> Tensor:
    """``y[n, gd, o] = Σ_{c,k,i} x[n, gc, i] Π[k, o, i] w[gd, c, k] + b[gd]``, in any dimension.

    >>> conv(torch.rand(8, 3, 32, 32), torch.rand(16, 3, 3, 3), padding="same").shape
    torch.Size([8, 16, 32, 32])

    Raises:
        ValueError: shapes or hyper-parameters that do not fit together or give no output.
    """
    settings = (x.shape, weight.shape, stride, padding, dilation, groups)
    if bias is None:
        return _run("conv", settings, x, weight)
    return _run("conv_bias", settings, x, weight, bias)


def conv_transpose(
    x: Tensor,  # (n, g·c, *i) or (g·c, *i)
    weight: Tensor,  # (g·c, d, *k)
    bias: Tensor | None = None,  # (g·d,)
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    output_padding: IntOrTuple = 0,
    groups: int = 1,
    dilation: IntOrTuple = 1,
) -> Tensor:
    """``y[n, gd, o] = Σ_{c,k,i} x[n, gc, i] Π[k, i, o] w[gc, d, k] + b[gd]``, in any dimension.

    >>> conv_transpose(torch.rand(8, 3, 16, 16), torch.rand(3, 4, 2, 2), stride=2).shape
    torch.Size([8, 4, 32, 32])

    Raises:
        ValueError: shapes or hyper-parameters that do not fit together or give no output.
    """
    settings = (x.shape, weight.shape, stride, padding, output_padding, groups, dilation)
    if bias is None:
        return _run("conv_transpose", settings, x, weight)
    return _run("conv_transpose_bias", settings, x, weight, bias)


def linear(
    x: Tensor,  # (n, *o, c) or (c,)
    weight: Tensor,  # (d, c)
    bias: Tensor | None = None,  # (d,)
) -> Tensor:
    """``y[n, o, d] = Σ_c x[n, o, c] w[d, c] + b[d]``.

    >>> linear(torch.rand(8, 3), torch.rand(4, 3), torch.rand(4)).shape
    torch.Size([8, 4])

    Raises:
        ValueError: shapes that do not fit together.
    """
    if bias is None:
        return _run("linear", (x.shape, weight.shape), x, weight)
    return _run("linear_bias", (x.shape, weight.shape), x, weight, bias)


def unfold(
    x: Tensor,  # (n, c, *i) or (c, *i)
    kernel_size: IntOrTuple,
    dilation: IntOrTuple = 1,
    padding: Padding = 0,
    stride: IntOrTuple = 1,
) -> Tensor:
    """The unfolded input ``U[n, ck, o] = Σ_i x[n, c, i] Π[k, o, i]`` (im2col), in any dimension.

    >>> unfold(torch.rand(8, 3, 32, 32), 5).shape
    torch.Size([8, 75, 784])

    Raises:
        ValueError: shapes or hyper-parameters that do not fit together or give no output.
    """
    return _run("unfold", (x.shape, kernel_size, dilation, padding, stride), x)


def fold(
    x: Tensor,  # (n, c·K, O) or (c·K, O)
    output_size: Sequence[int],
    kernel_size: IntOrTuple,
    dilation: IntOrTuple = 1,
    padding: Padding = 0,
    stride: IntOrTuple = 1,
) -> Tensor:
    """The folded input ``y[n, c, i] = Σ_{k,o} x[n, ck, o] Π[k, o, i]`` (col2im), in any dimension.

    >>> fold(torch.rand(8, 75, 784), (32, 32), 5).shape
    torch.Size([8, 3, 32, 32])

    Raises:
        ValueError: shapes or hyper-parameters that do not fit together.
    """
    return _run("fold", (x.shape, output_size, kernel_size, dilation, padding, stride), x)


def avg_pool(
    x: Tensor,  # (n, c, *i) or (c, *i)
    kernel_size: IntOrTuple,
    stride: IntOrTuple | None = None,
    padding: Padding = 0,
    divisor: int | None = None,
) -> Tensor:
    """``y[n, c, o] = 1/K Σ_{k,i} x[n, c, i] Π[k, o, i]``, in any dimension; padding counts.

    >>> avg_pool(torch.rand(8, 3, 32, 32), 2).shape
    torch.Size([8, 3, 16, 16])

    Raises:
        ValueError: shapes or hyper-parameters that do not fit together or give no output.
    """
    return _run("avg_pool", (x.shape, kernel_size, stride, padding, divisor), x)


def weight_vjp(
    x: Tensor,  # (n, g·c, *i)
    weight_shape: Sequence[int],  # (g·d, c, *k)
    grad_output: Tensor,  # (n, g·d, *o)
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
) -> Tensor:
    """``dw[gd, c, k] = Σ_{n,o,i} x[n, gc, i] Π[k, o, i] v[n, gd, o]``.

    >>> weight_vjp(torch.rand(8, 3, 32, 32), (4, 3, 3, 3), torch.rand(8, 4, 30, 30)).shape
    torch.Size([4, 3, 3, 3])

    Raises:
        ValueError: shapes or hyper-parameters that do not fit together or give no output.
    """
    settings = (x.shape, weight_shape, stride, padding, dilation, groups)
    return _run("weight_vjp", settings, x, grad_output)


def per_sample_weight_grad(
    x: Tensor,  # (n, g·c, *i)
    weight_shape: Sequence[int],  # (g·d, c, *k)
    grad_output: Tensor,  # (n, g·d, *o)
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
) -> Tensor:
    """``dw[n, gd, c, k] = Σ_{o,i} x[n, gc, i] Π[k, o, i] v[n, gd, o]``.

    >>> per_sample_weight_grad(torch.rand(8, 3, 9), (4, 3, 3), torch.rand(8, 4, 7)).shape
    torch.Size([8, 4, 3, 3])

    Raises:
        ValueError: shapes or hyper-parameters that do not fit together or give no output.
    """
    settings = (x.shape, weight_shape, stride, padding, dilation, groups)
    return _run("per_sample_weight_grad", settings, x, grad_output)


def input_vjp(
    input_shape: Sequence[int],  # (n, g·c, *i)
    weight: Tensor,  # (g·d, c, *k)
    grad_output: Tensor,  # (n, g·d, *o)
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
) -> Tensor:
    """``dx[n, gc, i] = Σ_{d,k,o} w[gd, c, k] Π[k, o, i] v[n, gd, o]``.

    >>> input_vjp((8, 3, 32, 32), torch.rand(4, 3, 3, 3), torch.rand(8, 4, 30, 30)).shape
    torch.Size([8, 3, 32, 32])

    Raises:
        ValueError: shapes or hyper-parameters that do not fit together or give no output.
    """
    settings = (input_shape, weight.shape, stride, padding, dilation, groups)
    return _run("input_vjp", settings, grad_output, weight)


def kfac_expand(
    x: Tensor,  # (n, g·c, *i)
    kernel_size: IntOrTuple,
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
) -> Tensor:
    """The input-based KFAC-expand factor ``A[g, ck, c'k'] = 1/N Σ_{n,o} U U'``.

    With ``kernel_size=()`` and ``x`` of shape (n, c): the factor of a linear layer.

    >>> kfac_expand(torch.rand(8, 4, 32, 32), 3, groups=2).shape
    torch.Size([2, 18, 18])

    Raises:
        ValueError: shapes or hyper-parameters that do not fit together or give no output.
    """
    settings = (x.shape, kernel_size, stride, padding, dilation, groups)
    return _run("kfac_expand", settings, x)


def kfac_reduce(
    x: Tensor,  # (n, g·c, *i)
    kernel_size: IntOrTuple,
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
) -> Tensor:
    """The input-based KFAC-reduce factor ``A[g, ck, c'k'] = 1/(N O²) Σ_n (Σ_o U)(Σ_o' U')``.

    >>> kfac_reduce(torch.rand(8, 4, 32, 32), 3, groups=2).shape
    torch.Size([2, 18, 18])

    Raises:
        ValueError: shapes or hyper-parameters that do not fit together or give no output.
    """
    settings = (x.shape, kernel_size, stride, padding, dilation, groups)
    return _run("kfac_reduce", settings, x)


_DIAGRAMS: dict[str, Callable[..., Expression]] = {
    "conv": diagrams.conv,
    "conv_bias": lambda *settings: diagrams.with_bias(diagrams.conv(*settings)),
    "conv_transpose": diagrams.conv_transpose,
    "conv_transpose_bias": lambda *s: diagrams.with_bias(diagrams.conv_transpose(*s)),
    "fold": diagrams.fold,
    "avg_pool": diagrams.avg_pool,
    "linear": diagrams.linear,
    "linear_bias": lambda *settings: diagrams.with_bias(diagrams.linear(*settings)),
    "unfold": diagrams.unfold,
    "weight_vjp": lambda *settings: diagrams.conv(*settings).vjp("weight"),
    "per_sample_weight_grad": lambda *s: diagrams.conv(*s).vjp("weight", per_sample=True),
    "input_vjp": lambda *settings: diagrams.conv(*settings).vjp("x"),
    "kfac_expand": diagrams.kfac_expand,
    "kfac_reduce": diagrams.kfac_reduce,
}


@lru_cache(maxsize=4096)
def _program(name: str, *settings: Setting) -> Program:
    return compile(_DIAGRAMS[name](*settings))


def _run(name: str, settings: tuple[object, ...], *operands: Tensor) -> Tensor:
    """The diagram ``name``, compiled, on its operands in the order in which it holds them."""
    try:
        program = _program(name, *settings)
    except TypeError:  # sizes can be symbols or in lists, which do not hash
        program = _program(name, *map(_hashable, settings))
    return program.run(*operands)


# For torch.compile `_run` is one call: it runs our compiler, but never traces it.
torch.compiler.allow_in_graph(_run)  # type: ignore[no-untyped-call]


def _hashable(setting: object) -> Setting:
    """Sizes as ints (under ``torch.compile`` they can be symbols) and sequences as tuples."""
    if isinstance(setting, str):
        return setting
    if isinstance(setting, Sequence):
        return tuple(map(_hashable, setting))
    return int(setting) if isinstance(setting, torch.SymInt) else setting  # type: ignore[return-value]
