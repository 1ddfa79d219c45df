"""The empirical neural tangent kernel ``Θ[n, c, m, d] = Σ_θ ∂f[n, c]/∂θ ∂f'[m, d]/∂θ``.

Source: Jacot, Gabriel & Hongler 2018. Every layer's part is contracted in its own order
(`tnconv.operators.low_rank.rows`), the Jacobian itself is formed only where that is cheapest.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor, nn

from tnconv.given import instances
from tnconv.models.computing import Inputs
from tnconv.ntk.kernel_blocks import Reduce, check_reduce
from tnconv.ntk.parametrizations import Parametrization, scales_of
from tnconv.ntk.sample_chunks import Chunks, kernel
from tnconv.ntk.seeds import Outputs, Seeds
from tnconv.ntk.shards import share, whole_kernel
from tnconv.ntk.sides import Side, State, at_state, learning
from tnconv.operators.low_rank.orders import Orders

if TYPE_CHECKING:
    import torch.distributed as dist


@overload
def empirical_ntk(
    model: nn.Module,
    x1: Inputs,
    x2: Inputs | None = ...,
    *,
    outputs: Outputs = ...,
    reduce: Reduce = ...,
    parameters: Sequence[str] | None = ...,
    per_layer: Literal[False] = ...,
    other: State | None = ...,
    scales: Parametrization | Mapping[str, float] | None = ...,
    order: Orders = ...,
    memory_limit: int | None = ...,
    chunks: Chunks = ...,
    dtype: torch.dtype | None = ...,
    batch_dim: int = ...,
    group: "dist.ProcessGroup | None" = ...,
    gather: bool = ...,
) -> Tensor: ...


@overload
def empirical_ntk(
    model: nn.Module,
    x1: Inputs,
    x2: Inputs | None = ...,
    *,
    outputs: Outputs = ...,
    reduce: Reduce = ...,
    parameters: Sequence[str] | None = ...,
    per_layer: Literal[True],
    other: State | None = ...,
    scales: Parametrization | Mapping[str, float] | None = ...,
    order: Orders = ...,
    memory_limit: int | None = ...,
    chunks: Chunks = ...,
    dtype: torch.dtype | None = ...,
    batch_dim: int = ...,
    group: "dist.ProcessGroup | None" = ...,
    gather: bool = ...,
) -> dict[str, Tensor]: ...


def empirical_ntk(
    model: nn.Module,
    x1: Inputs,
    x2: Inputs | None = None,
    *,
    outputs: Outputs = "all",
    reduce: Reduce = "full",
    parameters: Sequence[str] | None = None,
    per_layer: bool = False,
    other: State | None = None,
    scales: Parametrization | Mapping[str, float] | None = None,
    order: Orders = "auto",
    memory_limit: int | None = None,
    chunks: Chunks = None,
    dtype: torch.dtype | None = None,
    batch_dim: int = 0,
    group: "dist.ProcessGroup | None" = None,
    gather: bool = True,
) -> Tensor | dict[str, Tensor]:
    """The tangent kernel of a model between two batches, of shape ``(n, c, m, d)``.

    Args:
        model: Any model that `tnconv.compute` takes and that gives a tensor; its layers must keep
            samples apart. c and d run over all entries of a sample's output, in its order.
        x1: The model's input, or a sequence or mapping of its arguments.
        x2: The batch of m and d; ``x1`` by default.
        outputs: ``"all"``, one entry of a sample's output or several, their ``"sum"``, or seeds of
            shape ``(c, *output)``, or ``(n, c, *output)`` where samples have their own.
        reduce: ``"full"``; ``"trace"``, ``(n, m)``, the sum over c = d; ``"class_diagonal"``,
            ``(n, c, m)``, c = d; or ``"sample_diagonal"``, ``(n, c, d)``, n = m.
        parameters: The names of those that count, by default all that learn.
        per_layer: A kernel for each parameter by name, instead of their sum.
        other: The model of the second side: another module with the same parameters, or values of
            some parameters and buffers by name, as of another checkpoint.
        scales: The factor of each parameter's kernel: by name, or a parametrisation's, see
            `parametrization_scales`.
        order: How layers are contracted, one order for all or by parameter name: ``"auto"``,
            ``"parameter_space"``, ``"data_space"``, ``"mixed"``, ``"one_sided"``, ``"pixel_gram"``
            (`tnconv.operators.low_rank.orders`); ``"auto"`` takes the one that is priced lowest.
        memory_limit: How many bytes the rows of both sides, and the products of one parameter, may
            hold, beside the kernel and what autograd holds of one chunk. Chunks of samples are
            chosen accordingly.
        chunks: How many samples of each side are worked on at a time: a number, or one for each.
        dtype: What inner products are summed in, for instance ``torch.float64`` for small
            eigenvalues of models in single precision; that of the parameters by default.
        batch_dim: The dimension of the inputs that samples have.
        group: The processes among which rows n are shared out; each is given all of both batches.
        gather: Whether every process gets the whole kernel, or its own rows alone.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    >>> x1, x2 = torch.rand(5, 3, 8, 8), torch.rand(2, 3, 8, 8)
    >>> empirical_ntk(model, x1, x2).shape
    torch.Size([5, 10, 2, 10])
    >>> empirical_ntk(model, x1, outputs="sum", reduce="trace").shape
    torch.Size([5, 5])

    Raises:
        NotImplementedError: a layer that mixes samples, or that has no diagram.
        RuntimeError: another process of the group that fails.
        TypeError: a model whose output is no tensor.
        ValueError: words, names, shapes or sizes that do not fit, or a memory limit below what is
            needed.
    """
    instances(model=model)
    check_reduce(reduce)
    names = learning(model, parameters)
    factors = scales_of(model, scales)
    first = Side(model, x1, Seeds(outputs), names, batch_dim, memory_limit, order)
    symmetric = x2 is None and other is None
    second = Side(
        at_state(model, other),
        x1 if x2 is None else x2,
        Seeds(outputs),
        names,
        batch_dim,
        memory_limit,
        order,
    )
    if reduce == "sample_diagonal" and first.samples != second.samples:
        raise ValueError(
            f"batches have {first.samples} and {second.samples} samples; expected as many in both "
            "for reduce='sample_diagonal'"
        )
    own = share(first.samples, group)
    found = kernel(first, second, own, symmetric, reduce, dtype, factors, per_layer, chunks)
    if gather:
        found = whole_kernel(found, first.samples, group)
    return found if per_layer else found[""]
