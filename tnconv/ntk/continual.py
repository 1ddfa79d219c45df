"""Learning tasks one after the other: accuracies, what is forgotten, and how kernels overlap."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tnconv.models.computing import Inputs, arguments
from tnconv.ntk.empirical import empirical_ntk
from tnconv.ntk.kernel_blocks import matrix_of
from tnconv.ntk.seeds import Outputs


def accuracy(model: nn.Module, inputs: Inputs, labels: Tensor) -> float:
    """The share of samples whose largest output is their label's; the mode stays as it is."""
    args, kwargs = arguments(inputs)
    with torch.no_grad():
        return float((model(*args, **kwargs).argmax(1) == labels).double().mean())


def accuracy_matrix(
    model: nn.Module,
    train: Sequence[Callable[[], object]],
    tests: Sequence[tuple[Inputs, Tensor]],
    measure: Callable[[nn.Module, Inputs, Tensor], float] = accuracy,
) -> Tensor:
    """``a[t, i]``: the accuracy on task i after training on tasks up to t, ``(T + 1, T)``.

    Row 0 is before any training.

    Args:
        model: The model that is trained.
        train: What trains it on each task, in order.
        tests: Inputs and labels of each task.
        measure: Another score than the accuracy.

    Raises:
        ValueError: another number of tests than of tasks.
    """
    if len(train) != len(tests):
        raise ValueError(f"there are {len(train)} tasks and {len(tests)} tests; expected as many")
    rows = [[measure(model, *test) for test in tests]]
    for task in train:
        task()
        rows.append([measure(model, *test) for test in tests])
    return torch.tensor(rows, dtype=torch.float64)


def forgetting(accuracies: Tensor) -> float:
    """``mean_i (max_{t < T} a[t, i] - a[T, i])`` over all tasks but the last.

    Source: Chaudhry et al. 2018. t runs over the rows from which on the task was trained, so that a
    task's luck before does not count.

    >>> forgetting(torch.tensor([[0.25, 0.0], [1.0, 0.25], [0.5, 0.75]]))
    0.5

    Raises:
        ValueError: no matrix ``(T + 1, T)`` of at least two tasks.
    """
    rows, tasks = accuracies.shape if accuracies.dim() == 2 else (0, 0)
    if tasks < 2 or rows != tasks + 1:
        raise ValueError(
            f"accuracies have shape {tuple(accuracies.shape)}; expected (T + 1, T), T at least 2"
        )
    lost = [float(accuracies[i + 1 : -1, i].max() - accuracies[-1, i]) for i in range(tasks - 1)]
    return sum(lost) / len(lost)


def kernel_overlap(model: nn.Module, tasks: Sequence[Inputs], outputs: Outputs = "all") -> Tensor:
    """``‖Θ(X_i, X_j)‖_F² / (‖Θ(X_i, X_i)‖_F ‖Θ(X_j, X_j)‖_F)`` for all pairs of tasks.

    It is 1 for equal tasks and 0 where a gradient step on one task changes no output on another:
    it is the cosine between the matrices ``Jᵀ J`` of the tasks. Source: Doan et al. 2021, "A
    theoretical analysis of catastrophic forgetting through the NTK overlap matrix", for the blocks.

    Args:
        model: The model.
        tasks: Inputs of each task.
        outputs: Functions of the outputs, as in `empirical_ntk`.
    """
    found = torch.eye(len(tasks), dtype=torch.float64)
    norms = [_norm(empirical_ntk(model, x, outputs=outputs)) for x in tasks]
    for i, x in enumerate(tasks):
        for j, y in enumerate(tasks[:i]):
            square = _norm(empirical_ntk(model, x, y, outputs=outputs)) ** 2
            found[i, j] = found[j, i] = square / (norms[i] * norms[j])
    return found


def _norm(theta: Tensor) -> float:
    return float(matrix_of(theta).double().norm())
