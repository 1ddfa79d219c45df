"""Curvature of a whole network as linear operators: products, and never the matrix.

Every product is two sweeps through a batch's graph (`tnconv.operators.linearization`): any model
that autograd differentiates twice will do. Operators have the interface of SciPy's
``LinearOperator`` without needing SciPy: its solvers take them as they are.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from math import nan
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_leaves

from tnconv.given import instances
from tnconv.losses.reductions import Reduction, divisor, reduction_of
from tnconv.models.capture import alone
from tnconv.models.computing import Inputs, arguments
from tnconv.models.modules import refuse_complex, unwrapped
from tnconv.models.propagation import LossFunction
from tnconv.nn.tensor_dropout import TensorDropout
from tnconv.operators.linearization import Graph
from tnconv.operators.parameter_space import Space, Vector
from tnconv.operators.symmetric import SymmetricOperator

PLAIN = str | bool | int | float | None
Product = Callable[[Vector], Vector]
V = TypeVar("V")  # a tensor or an array, tensors in the parameters' shapes, or these by name


class CurvatureOperator(SymmetricOperator):
    """A symmetric matrix over all entries of some parameters, seen through its products.

    It belongs to ``loss_fn(model(inputs), targets)`` of all pairs in ``batches`` taken as one
    batch: with a mean, every batch has the share of what it divides by, exactly for the losses that
    `tnconv` knows, by the number of samples for others. Where several batches' loss says nothing of
    its ``reduction``, that is an argument. Samples are counted along dimension ``batch_dim`` of the
    inputs.

    ``parameters`` names those that count, by default all that learn. A vector is a flat tensor or
    array of all of them, a tuple of tensors in their shapes, or a mapping by name; a product has
    the form of its vector, and a matrix's columns are vectors.

    The model stays as it is, its buffers, its mode, its gradients. Where ``retain_graph`` is true
    (the default for one batch), graphs stay until a parameter changes, so that no product runs the
    model again; otherwise every product does, and one batch's graph is held at a time.

    Args:
        model: the network; it stays as it is.
        loss_fn: the loss, a sum or a mean over samples.
        batches: pairs of inputs and targets, which together count as one batch; an iterable that
            can be read once is kept as a list.
        parameters: names of those that count, by default all that learn.
        reduction: "mean" or "sum", where several batches' loss does not say it.
        retain_graph: whether graphs stay until a parameter changes; by default for one batch.
        batch_dim: the dimension of the inputs that samples are in.

    Raises:
        NotImplementedError: a layer that drops entries at random.
        ValueError: no batch, unknown parameters, or an unknown reduction of several batches.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        batches: Iterable[tuple[Inputs, Any]],
        parameters: Iterable[str] | None = None,
        *,
        reduction: Reduction | None = None,
        retain_graph: bool | None = None,
        batch_dim: int = 0,
    ) -> None:
        instances(model=model, loss_fn=loss_fn)
        self.model, self.loss_fn = unwrapped(model), loss_fn
        self.batches = _pairs(batches)
        self.space = _space(self.model, parameters)
        refuse_dropout(self.model)
        self.reduction = reduction or reduction_of(loss_fn)
        self.batch_dim = batch_dim
        self._settings: object = _settings_of(loss_fn)
        self.shares = _shares(loss_fn, self.batches, self.reduction, batch_dim)
        few = isinstance(self.batches, Sized) and len(self.batches) == 1
        self.retain_graph = few if retain_graph is None else retain_graph
        self._held: tuple[object, list[Product]] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters, in the order of flat vectors."""
        return self.space.names

    @property
    def size(self) -> int:
        """As many rows and columns as the parameters have entries."""
        return self.space.size

    @property
    def precision(self) -> torch.dtype:
        """What holds all the parameters' dtypes."""
        return self.space.dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.space.device

    def __matmul__(self, other: V) -> V:
        """The product with a vector, or with a matrix whose columns are vectors.

        Raises:
            TypeError: an array of complex numbers.
            ValueError: other shapes or names.
        """
        if isinstance(other, Mapping):
            found = self._vector_product(self.space.vector(other))
            return cast(V, dict(zip(self.names, found, strict=True)))
        if isinstance(other, tuple | list):
            return cast(V, self._vector_product(self.space.vector(other)))
        return super().__matmul__(other)

    def check_deterministic(self) -> None:
        """Compare two products with one vector, each from graphs of its own.

        Raises:
            RuntimeError: they differ, so the model or the batches are not the same every time.
        """
        generator = torch.Generator("cpu").manual_seed(0)
        draw = torch.randn(self.space.size, generator=generator, device="cpu")
        vector = self.space.split(draw.to(self.space.device))
        first, second = (self.space.join(self._sum(self._products(), [vector])[0]) for _ in "ab")
        if not torch.allclose(first, second, rtol=1e-4, atol=1e-5 * float(first.abs().max())):
            raise RuntimeError(
                "two products with one vector differ; expected a fixed model and data"
            )

    @abstractmethod
    def _product(self, graph: Graph, share: float, batch: int, inputs: Inputs) -> Product:
        """The product that one batch, by its number, adds; ``share`` is its loss's factor."""

    def _times(self, columns: Tensor) -> Tensor:
        found = self._all([self.space.split(column) for column in columns.unbind(1)])
        if not found:
            return torch.zeros_like(columns)
        return torch.stack([self.space.join(each) for each in found], 1)

    def _vector_product(self, vector: Vector) -> Vector:
        return self._all([vector])[0]

    def _all(self, vectors: Sequence[Vector]) -> list[Vector]:
        """The products.

        Raises:
            NotImplementedError: the model drops entries at random by now.
            RuntimeError: the loss is no more what the operator was made for.
        """
        refuse_dropout(self.model)
        settings = _settings_of(self.loss_fn)
        if self._settings is None:  # a copy
            self._settings = settings
        if settings != self._settings:
            raise RuntimeError(
                "loss_fn was changed after the operator was made, which put batches together by "
                "its reduction and weights; expected a new operator"
            )
        with alone(self.model):
            return self._products_with(vectors)

    def _products_with(self, vectors: Sequence[Vector]) -> list[Vector]:
        if not self.retain_graph:
            return self._sum(self._products(), vectors)
        state = state_of(self.model, self.batches)
        if self._held is None or self._held[0] != state:
            self._held = state, list(self._products())
        return self._sum(self._held[1], vectors)

    def _sum(self, products: Iterable[Product], vectors: Sequence[Vector]) -> list[Vector]:
        totals = [tuple(torch.zeros_like(each) for each in vector) for vector in vectors]
        for product in products:
            for total, vector in zip(totals, vectors, strict=True):
                for held, found in zip(total, product(vector), strict=True):
                    held += found
            del product  # and its graph, before the next one
        return totals

    def _products(self) -> Iterator[Product]:
        """One product per batch, with its graph; a batch that counts for nothing has none."""
        given = zip(self.batches, self.shares, strict=True)
        for at, ((inputs, targets), share) in enumerate(given):
            if share:
                yield self._product(self._graph(inputs, targets), share, at, inputs)

    def _graph(self, inputs: Inputs, targets: Any) -> Graph:
        return Graph.of(self.model, self.names, self.loss_fn, arguments(inputs), targets)

    def __getstate__(self) -> dict[str, Any]:
        """All but the graphs, which neither copies nor pickles carry, and places in memory."""
        return self.__dict__ | {"_held": None, "_settings": None}


class HessianOperator(CurvatureOperator):
    """``H[i, j] = ∂²L / ∂θ_i ∂θ_j``.

    >>> model, batch = nn.Linear(3, 4), (torch.rand(8, 3), torch.randint(4, (8,)))
    >>> hessian = HessianOperator(model, nn.CrossEntropyLoss(), [batch])
    >>> hessian.shape, (hessian @ torch.rand(16)).shape
    ((16, 16), torch.Size([16]))

    Args:
        model: the network; it stays as it is.
        loss_fn: the loss, a sum or a mean over samples.
        batches: pairs of inputs and targets, which together count as one batch; an iterable that
            can be read once is kept as a list.
        parameters: names of those that count, by default all that learn.
        reduction: "mean" or "sum", where several batches' loss does not say it.
        retain_graph: whether graphs stay until a parameter changes; by default for one batch.
        batch_dim: the dimension of the inputs that samples are in.
    """

    def _product(self, graph: Graph, share: float, batch: int, inputs: Inputs) -> Product:
        return lambda vector: _scaled(graph.hessian(vector), share)


class GGNOperator(CurvatureOperator):
    """``G[i, j] = Σ_{y,y'} ∂y/∂θ_i ∂²L/∂y∂y' ∂y'/∂θ_j``, y all entries of the model's outputs.

    >>> model, batch = nn.Linear(3, 4), (torch.rand(8, 3), torch.rand(8, 4))
    >>> found = GGNOperator(model, nn.MSELoss(), [batch]) @ dict(model.named_parameters())
    >>> found["weight"].shape
    torch.Size([4, 3])

    Args:
        model: the network; it stays as it is.
        loss_fn: the loss, a sum or a mean over samples.
        batches: pairs of inputs and targets, which together count as one batch; an iterable that
            can be read once is kept as a list.
        parameters: names of those that count, by default all that learn.
        reduction: "mean" or "sum", where several batches' loss does not say it.
        retain_graph: whether graphs stay until a parameter changes; by default for one batch.
        batch_dim: the dimension of the inputs that samples are in.
    """

    def _product(self, graph: Graph, share: float, batch: int, inputs: Inputs) -> Product:
        def product(vector: Vector) -> Vector:
            middle = graph.loss_hessian(graph.push(vector))
            return graph.pull(_scaled(middle, share))

        return product


def _pairs(batches: Iterable[tuple[Inputs, Any]]) -> Iterable[tuple[Inputs, Any]]:
    """Batches, in a list if they can be read once only.

    Raises:
        TypeError: one batch instead of several, or what is no pair.
    """
    if isinstance(batches, Tensor | Mapping):
        raise TypeError(f"batches is a {type(batches).__name__}; expected [(inputs, targets), ...]")
    found = list(batches) if iter(batches) is batches else batches
    for each in found if isinstance(found, Sequence) else ():
        if not isinstance(each, tuple | list) or len(each) != 2:
            kind = type(each).__name__
            raise TypeError(
                f"batches holds a {kind}; expected pairs, [(inputs, targets), ...], also for one"
            )
    return found


def _space(model: nn.Module, parameters: Iterable[str] | None) -> Space:
    named = dict(model.named_parameters())
    learned = [name for name, parameter in named.items() if parameter.requires_grad]
    names = tuple(learned if parameters is None else parameters)
    unknown = ", ".join(repr(name) for name in names if name not in named)
    if unknown or not names or len(set(names)) < len(names):
        wrong = f"the model has no parameters {unknown}" if unknown else f"parameters are {names}"
        raise ValueError(f"{wrong}; expected one or more of its own names, each once")
    refuse_complex((name, named[name]) for name in names)
    return Space(names, tuple(named[name].detach() for name in names))


def refuse_dropout(model: nn.Module) -> None:
    """Check that a model computes the same every time.

    Raises:
        NotImplementedError: a layer that drops entries at random.
    """
    for name, module in model.named_modules():
        if isinstance(module, _DropoutNd) and module.training and module.p > 0:
            raise NotImplementedError(
                f"layer {name!r} is in training mode: dropout makes the matrix stochastic; "
                "expected model.eval()"
            )
        if isinstance(module, TensorDropout) and module.samples:
            raise NotImplementedError(
                f"layer {name!r} samples its weight gradient, which makes no one matrix; expected "
                "evaluation mode"
            )


def _shares(
    loss_fn: LossFunction,
    batches: Iterable[tuple[Inputs, Any]],
    kind: Reduction | None,
    batch_dim: int,
) -> list[float]:
    """The factor of each batch's loss in that of all: its part of what a mean divides by."""
    if isinstance(batches, Sized) and len(batches) == 1:
        return [1.0]
    parts = [
        divisor(loss_fn, inputs, targets, batch_dim) if kind == "mean" else 1.0
        for inputs, targets in batches
    ]
    if not parts:
        raise ValueError("there are no batches; expected pairs of inputs and targets")
    if len(parts) > 1 and kind is None:
        raise ValueError(
            "the loss does not say how several batches make one; expected reduction='mean' or 'sum'"
        )
    total = sum(parts) if kind == "mean" else 1.0
    return [part / total if total else nan for part in parts]


def state_of(model: nn.Module, batches: object = ()) -> object:
    """What changes when the model's values or mode do, or tensors in batches that are at hand."""
    held = [*model.parameters(), *model.buffers()]
    if isinstance(batches, Sequence):
        held += [each for each in tree_leaves(batches) if isinstance(each, Tensor)]
    modes = tuple(module.training for module in model.modules())
    return [_stamp(each) for each in held], modes


def _settings_of(loss_fn: LossFunction) -> object:
    """What changes when the settings of a loss do."""
    modules = loss_fn.modules() if isinstance(loss_fn, nn.Module) else ()
    found = []
    for module in modules:
        given = vars(module) | module._buffers | module._parameters
        found += [
            (name, _stamp(value))
            for name, value in given.items()
            if isinstance(value, PLAIN | Tensor) and name != "training"
        ]
    return found


def _stamp(value: object) -> object:
    return (value.data_ptr(), value._version) if isinstance(value, Tensor) else value


def _scaled(vector: Vector, factor: float) -> Vector:
    return vector if factor == 1 else tuple(each * factor for each in vector)
