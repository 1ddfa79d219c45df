"""The diagonal of a network's Hessian, exactly, by diagrams.

``∂²L/∂θ_i² = Σ_m J[m, i]² + Σ_f Σ_e r[f, e] (∂u[f, e]/∂θ_i)²``: the Gauss-Newton diagonal, and for
every curved operation f on single entries u[e] their second derivatives times the gradient,
``r = f''(u) g``. Each sum is over columns that are sent backwards, from the output and from f's
input: as many as there are features there, unless f is piecewise linear, where r is zero.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from tnconv import diagrams
from tnconv.given import instances
from tnconv.losses.roots import Curvature, curvature
from tnconv.models.arrangement import is_arranged
from tnconv.models.bare import Bare, choose, noticing
from tnconv.models.calls import Call, Pass
from tnconv.models.capture import alone, watching
from tnconv.models.checkpoints import refusing_reentrant
from tnconv.models.collector import Collector
from tnconv.models.computing import Inputs, arguments
from tnconv.models.graph import sources, unexplained
from tnconv.models.modules import named_modules, refuse_complex, unwrapped
from tnconv.models.operation_graph import Graph
from tnconv.models.propagation import LossFunction
from tnconv.models.sample_maps import (
    Batch,
    Owned,
    Shared,
    Silent,
    along,
    is_fast,
    owners,
    places,
    resized,
    whole,
)
from tnconv.models.samples import Samples
from tnconv.operators.residuals import Residual, operation, residuals
from tnconv.quantities.base import Statistic, Vectors

AT_A_TIME = 32  # columns that are held
SOURCE = Vectors()
Columns = tuple[GradientEdge, int, Tensor]
"""Where columns ``(m, n, ...)`` start, and the sign of their squares."""
Bend = tuple[Residual, Tensor]
"""A curved node, and the places ``(n, features)`` of samples' entries in its flat input."""


def hessian_diagonal(
    model: nn.Module,
    loss_fn: LossFunction,
    inputs: Inputs,
    targets: Any,
    parameters: Iterable[str] | None = None,
    *,
    per_sample: bool = False,
    most_features: int = 4096,
    batch_dim: int = 0,
) -> dict[str, Tensor]:
    """``∂²L / ∂θ_i²`` of the loss that was given, in each parameter's shape, by name.

    A curved activation costs as many backward passes as a sample has features there, unless no
    parameter that counts is before it. As in `tnconv.compute`, samples may be anywhere inside the
    model.

    Args:
        model: one whose layers have diagrams and keep samples apart.
        loss_fn: a loss whose Hessian's root is known.
        inputs: a tensor, or a sequence or mapping of the model's arguments.
        targets: the loss's.
        parameters: names of those that count, by default all that learn; those that no gradient
            reaches are left out.
        per_sample: whether to give each sample's part, of shape ``(n, *parameter)``.
        most_features: activations of more features are refused.
        batch_dim: the dimension of the inputs that is the batch.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(64, 5))
    >>> x, labels = torch.rand(8, 3, 6, 6), torch.randint(5, (8,))
    >>> hessian_diagonal(model, nn.CrossEntropyLoss(), x, labels)["0.weight"].shape
    torch.Size([4, 3, 3, 3])

    Raises:
        NotImplementedError: a layer without a diagram or one that mixes samples, an operation whose
            second derivative couples entries, more features, or a loss that is not known.
        ValueError: parameters that the model does not have.
    """
    instances(model=model, loss_fn=loss_fn)
    chosen = chosen_parameters(unwrapped(model), parameters)
    wanted = set(chosen.values())
    arrived: dict[Call, list[Tensor]] = defaultdict(list)

    def receive(here: Pass, call: Call, grad_output: Tensor) -> None:
        if not samples.passes.take(call, grad_output):
            arrived[call].append(grad_output)

    watched = watching(model, lambda here: None, receive, True, batch_dim)
    with (
        watched as watch,
        noticing(watch),
        alone(watch.model, watch),
        refusing_reentrant(named_modules(watch.model)),
        torch.enable_grad(),
    ):
        samples = Samples(watch)
        watch.wanted = lambda module, parameter: parameter in wanted
        args, kwargs = arguments(inputs)
        output = watch.model(*args, **kwargs)
        here = watch.passes[-1]
        own = _owners(samples, here, output)
        choose(here, (output,))
        _refuse_functional(here, output, chosen)
        loss = curvature(loss_fn, output, targets, own)
        bends = _residuals(here, samples, loss_fn, output, targets, chosen.values(), most_features)
        totals = dict[nn.Parameter, Tensor]()
        diagonal = Statistic(
            diagrams.ggn_diagonal, (per_sample,), 0 if per_sample else None, vectors=SOURCE
        )
        for edge, sign, columns in _columns(get_gradient_edge(output), loss, bends):
            arrived.clear()
            for column in columns:
                _backward(edge, here, column)
            for parameter, value in _squares(diagonal, here, arrived).items():
                before = totals.get(parameter)
                totals[parameter] = sign * value if before is None else before + sign * value
    return {name: totals[p] for name, p in chosen.items() if p in totals}


def _owners(samples: Samples, here: Pass, output: Tensor) -> Tensor | None:
    """Find whose the rows of all layers are: of the output, where its number is not its row's.

    Calls that have no diagram by that are left undescribed.

    Raises:
        NotImplementedError: samples that see each other, or an output that tells none apart.
    """
    if not output.requires_grad:
        return None
    samples.explain(here, Graph([get_gradient_edge(y).node for y in here.outputs]), lambda: [])
    for call in here.calls:
        if isinstance(call.module, Bare):
            call.described = call.map is not None and is_fast(call.map)
        elif not isinstance(call.map, Silent):
            shared = isinstance(call.map, Shared)
            call.described = call.described and not shared and is_arranged(call, here.samples)
    (known,) = here.maps
    if not isinstance(known, Owned):
        raise NotImplementedError(
            f"samples of an output of shape {tuple(output.shape)} cannot be told apart, which the "
            "loss's curvature needs"
        )
    if is_fast(known):
        return None
    own = owners(known, tuple(output.shape), here.samples, output.device)
    return along(own, known, tuple(output.shape)).expand(output.shape)


def chosen_parameters(model: nn.Module, names: Iterable[str] | None) -> dict[str, nn.Parameter]:
    """The parameters of some names, by default all that learn.

    Raises:
        NotImplementedError: a complex parameter that learns.
        ValueError: names that the model does not have, or of parameters that do not learn.
    """
    refuse_complex(model.named_parameters())
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    chosen = set(learned if names is None else names)
    if chosen - learned.keys():
        unknown = ", ".join(sorted(chosen - learned.keys()))
        raise ValueError(f"no parameters that learn are called {unknown}; expected the model's own")
    return {name: p for name, p in learned.items() if name in chosen}


def _residuals(
    here: Pass,
    samples: Samples,
    loss_fn: LossFunction,
    output: Tensor,
    targets: Any,
    parameters: Collection[nn.Parameter],
    most_features: int,
) -> list[Bend]:
    """The curved nodes before the output, with the places of their samples' entries.

    Raises:
        NotImplementedError: more features than are wanted, or entries that belong to no sample.
    """
    calls = {call.edge.node: call.name for call in here.calls if call.edge is not None}
    end = output.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_fn(end, targets), end)
    found = residuals(output, gradient, parameters, lambda node: _name(node, calls))
    nodes = list(dict.fromkeys(each.node for each in found))
    maps = samples.coded(here, here.maps, nodes)[1] if nodes and here.samples > 1 else {}
    bends = []
    for each in found:
        name, shape = _name(each.node, calls), tuple(each.values.shape)
        known = maps[each.node][0] if each.node in maps else whole(shape, here.samples)
        known = Batch(0) if isinstance(known, Silent) else known
        sized = resized(known, shape, here.samples)
        if not isinstance(sized, Owned):
            raise NotImplementedError(
                f"{name} reads shape {shape}, none of whose dimensions belongs to the "
                f"{here.samples} samples"
            )
        own = places(sized, shape, here.samples, each.values.device)
        if own.shape[1] > most_features:
            raise NotImplementedError(
                f"{name} has {own.shape[1]} features, each of which takes a backward pass; "
                f"expected at most most_features={most_features}, or parameters behind it"
            )
        bends.append((each, own))
    return bends


def _name(node: Node, calls: Mapping[Node, str]) -> str:
    """An operation by the layer before it."""
    waiting, seen = [node], set[Node]()
    while waiting:
        at = waiting.pop(0)
        if at in calls:
            return f"{operation(node)} {'of' if at is node else 'after'} layer {calls[at]!r}"
        new = [below for below, _ in at.next_functions if below is not None and below not in seen]
        seen.update(new)
        waiting += new
    return operation(node)


def _columns(output: GradientEdge, loss: Curvature, bends: Iterable[Bend]) -> Iterator[Columns]:
    """All columns, a few at a time; at least one, to see what it reaches."""
    if not loss.columns:
        yield output, 1, loss.y.new_zeros(1, *loss.shape)
    for at in range(0, loss.columns, AT_A_TIME):
        yield output, 1, loss.vectors(at, min(at + AT_A_TIME, loss.columns))
    for each, own in bends:
        for sign in (1, -1):
            for columns in roots(sign * each.values.flatten()[own]):
                placed = columns.new_empty(len(columns), each.values.numel())
                placed[:, own.flatten()] = columns.flatten(1)
                yield each.edge, sign, placed.reshape(-1, *each.values.shape)


def roots(values: Tensor) -> Iterator[Tensor]:
    """Columns ``S[m, n, *shape]`` with ``Σ_m S[m, n] S[m, n]ᵀ = diag(max(values[n], 0))``.

    Every sample has one entry per column, in an order of its own: the positive ones first.
    """
    flat = values.flatten(1).clamp(min=0)
    count = int((flat > 0).sum(1).max()) if len(flat) else 0
    top = flat.topk(count, 1)
    for at in range(0, count, AT_A_TIME):
        part, where = (each[:, at : at + AT_A_TIME].T.unsqueeze(2) for each in top)
        columns = flat.new_zeros(len(part), *flat.shape).scatter_(2, where, part.sqrt())
        yield columns.reshape(len(part), *values.shape)


def _backward(start: GradientEdge, here: Pass, column: Tensor) -> None:
    """Send a column through the hooks of all calls on its way."""
    torch.autograd.grad(start, sources(here.calls), column, retain_graph=True, allow_unused=True)


def _squares(
    diagonal: Statistic, here: Pass, arrived: Mapping[Call, Sequence[Tensor]]
) -> dict[nn.Parameter, Tensor]:
    """``Σ_m J[m, n, θ]²`` of every parameter that columns reached."""
    collector = Collector([diagonal], kept=True)
    for call, found in arrived.items():
        collector.receive(here, call, torch.stack(list(found)), SOURCE, len(found))
    collector.finish()
    return {p: collector.totals(p)[diagonal] for p in collector.found}


def _refuse_functional(here: Pass, output: Tensor, chosen: Mapping[str, nn.Parameter]) -> None:
    """Refuse parameters whose use no diagram describes.

    Raises:
        NotImplementedError: there is one.
    """
    names = {parameter: name for name, parameter in chosen.items()}
    lost = unexplained((output,), here.calls, names)
    lost += [p for call in here.calls if not call.described for _, p in call.parameters]
    if lost:
        raise NotImplementedError(
            f"no diagram describes what parameter {names[lost[0]]!r} does; expected a known layer"
        )
