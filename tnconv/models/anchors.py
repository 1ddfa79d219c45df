"""Where the samples of a model's output come from: evidence that starts at the model's inputs.

A described layer, or a product with a parameter, that reads a view or a copy of an input is an
anchor: whose each of its rows is can be told from strides, or from the values. Where there is none,
the model runs again with another sample in one's place.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten

from tnconv.models.calls import Call, Pass
from tnconv.models.coded import random_weights
from tnconv.models.layers import own_dimensions
from tnconv.models.modules import tensors
from tnconv.models.sample_maps import Batch, Owned, SampleMap, candidates, front, owners
from tnconv.recursions.step import node_name

Anchor = tuple[Call | Node, Owned, int]
"""What reads an input, the map of the gradient after it, and the input's number."""
PROBES = 4096  # entries of an input whose samples are compared


def anchors(here: Pass, nodes: Iterable[Node] = ()) -> Iterator[Anchor]:
    """Calls, and products among some operations, that read a batched input.

    Views are found before copies, which take a look at all values: those of inputs that no view
    was found of.
    """
    given = [(at, each) for at, each in enumerate(here.leaves) if is_batched(here, each)]
    reading = [(call, read) for call in here.calls if (read := _read(call)) is not None]
    viewed = set[int]()
    for call, read in reading:
        for at, source in given:
            if _share(read, source):
                known = _map_of_view(read, source, here)
                if known is not None and keeps(call, known):
                    viewed.add(at)
                    yield call, known, at
                break
    given = [each for each in given if each[0] not in viewed]
    others: list[tuple[Call | Node, Tensor]] = [*reading[:1], *_factors(nodes)] if given else []
    for place, read in others:
        for at, source in given:
            known = _map_of_copy(read, source, here)
            if known is not None and (not isinstance(place, Call) or keeps(place, known)):
                yield place, known, at
                break


def _read(call: Call) -> Tensor | None:
    if isinstance(call.module, nn.EmbeddingBag):
        return call.inputs[1] if len(call.inputs) > 1 else call.inputs[0]
    return call.inputs[0] if call.described and call.inputs else None


def _factors(nodes: Iterable[Node]) -> Iterator[tuple[Node, Tensor]]:
    """What products with parameters read that needs no gradient: rows, of which results have as
    many.
    """
    saved = {"MmBackward0": (0, "_saved_self"), "AddmmBackward0": (1, "_saved_mat1")}
    for node in nodes:
        at, name = saved.get(node_name(node), (0, ""))
        if name and node.next_functions[at][0] is None:
            matrix = getattr(node, name, None)
            if isinstance(matrix, Tensor):
                yield node, matrix


def is_batched(here: Pass, value: Any) -> bool:
    """Whether an argument has as many rows as there are samples, where they should be."""
    dim = here.batch_dim
    return isinstance(value, Tensor) and value.dim() > dim and value.shape[dim] == here.samples


def keeps(call: Call, known: Owned) -> bool:
    """Whether a layer hands on the samples of its input's dimension, as far as its type says."""
    if known == Batch(0):
        return True
    own = own_dimensions(call.module)
    if own is not None:
        return known.dim < len(call.output_shape) - own
    return known.dim == 0


def _share(one: Tensor, other: Tensor) -> bool:
    return (
        one.device == other.device
        and one.device.type != "meta"
        and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
        and one.dtype == other.dtype
    )


def _map_of_view(view: Tensor, source: Tensor, here: Pass) -> Owned | None:
    """The map of a view of a batched tensor, from the places in memory of some of its entries."""
    if not view.numel() or not source.numel():
        return None
    if view is source and 0 not in source.stride():
        return Batch(here.batch_dim)
    generator = torch.Generator("cpu").manual_seed(view.numel())
    at = [torch.randint(size, (PROBES,), generator=generator, device="cpu") for size in view.shape]
    place = torch.full((PROBES,), int(view.storage_offset() - source.storage_offset()))
    for index, stride in zip(at, view.stride(), strict=True):
        place = place + index * stride
    sample = torch.full_like(place, -1)
    strides = source.stride()
    order = sorted(range(source.dim()), key=lambda dim: (-strides[dim], source.shape[dim]))
    for dim in order:
        size, stride = source.shape[dim], strides[dim]
        if size == 1:
            continue
        if not stride:
            return None
        index, place = place // stride, place % stride
        if bool(((index < 0) | (index >= size)).any()):
            return None
        if dim == here.batch_dim:
            sample = index
    for known in candidates(tuple(view.shape), here.samples):
        own = owners(known, tuple(view.shape), here.samples)
        if bool((own[at[known.dim]] == sample).all()):
            return known
    return None


def _map_of_copy(copy: Tensor, source: Tensor, here: Pass) -> Owned | None:
    """The only map by which a tensor has a batched tensor's entries, in their order.

    None where samples are equal, which hides their order.
    """
    if copy.numel() != source.numel() or copy.dtype != source.dtype or not copy.numel():
        return None
    if copy.device != source.device or copy.device.type == "meta":
        return None
    one, other = copy.detach(), source.detach()
    if one.flatten()[0] != other.flatten()[0]:  # no map moves the first entry
        return None
    n = here.samples
    rows = other.movedim(here.batch_dim, 0).reshape(n, -1)
    possible = candidates(tuple(copy.shape), n)
    fits = [m for m in possible if torch.equal(front(one, m, n).reshape(n, -1), rows)]
    if len(fits) != 1:
        return None
    sums = rows.double() @ random_weights(rows.shape[1], rows.device, torch.float64)
    return fits[0] if bool(sums.sort().values.diff().all()) else None


@dataclass(frozen=True)
class Replaced:
    """What became of an output where samples were replaced: the maps left, and if it changed.

    It is ``reordered`` if every replaced sample changed as many rows as one sample has, and no two
    changed the same row.
    """

    left: tuple[Owned, ...]
    changed: bool
    reordered: bool = False

    @property
    def known(self) -> Owned | None:
        """The only map that explains what changed."""
        return self.left[0] if self.changed and len(self.left) == 1 else None


class Unrunnable(Exception):
    """The model does not run again with other inputs."""


def replaced(
    model: nn.Module,
    here: Pass,
    possible: Sequence[Sequence[Owned]],
    noise: float = 0.0,
) -> tuple[list[Replaced], tuple[bool, ...]]:
    """What happens to each output where samples are replaced, and which inputs have the samples.

    Rows of its own change with a sample, and no others. An input of as many rows as samples that
    changes all of an output belongs to all samples, if the model runs on fewer samples with it
    whole, and not with all inputs cut. ``noise`` is added to the parameters.

    Raises:
        Unrunnable: the model raised something.
    """
    batched = tuple(is_batched(here, each) for each in here.leaves)
    with untouched(model), torch.no_grad():
        values = _noisy(model, noise) if noise else {}
        state = torch.random.get_rng_state()

        def run(change: Change) -> list[Tensor]:
            torch.random.set_rng_state(state)
            try:
                return outputs_of(model, here, change, values)
            except Exception as error:
                raise Unrunnable(str(error)) from error

        plain = run(lambda at, x: x)
        found = _after_all(run, plain, possible, batched, here)
        if any(each.known is not None for each in found) or sum(batched) < 2:
            return found, batched
        each_alone = [tuple(i == at for i in range(len(batched))) for at in range(len(batched))]
        alone = tuple(
            own and any(r.known for r in _after_all(run, plain, possible, each_alone[at], here))
            for at, own in enumerate(batched)
        )
        if not any(alone) or alone == batched:
            return found, batched
        if _runs_on_fewer(run, batched, here) or not _runs_on_fewer(run, alone, here):
            return found, batched
        return _after_all(run, plain, possible, alone, here), alone


Change = Callable[[int, Tensor], Tensor]
"""From an input's number and the input to what the model reads in its place."""
Run = Callable[[Change], list[Tensor]]


def _noisy(model: nn.Module, noise: float) -> dict[str, Tensor]:
    generator = torch.Generator("cpu").manual_seed(0)
    return {
        name: p + noise * torch.randn(p.shape, generator=generator, device="cpu").to(p)
        for name, p in model.named_parameters()
        if p.is_floating_point()
    }


def outputs_of(
    model: nn.Module, here: Pass, change: Change, values: Mapping[str, Tensor]
) -> list[Tensor]:
    """What the model gives for inputs some of which are changed, and other parameters' values."""
    flat, spec = tree_flatten((here.args, here.kwargs))
    new = [change(at, x) if isinstance(x, Tensor) else x for at, x in enumerate(flat)]
    args, kwargs = tree_unflatten(new, spec)
    if values:
        return list(tensors(functional_call(model, dict(values), args, kwargs)))
    return list(tensors(model(*args, **kwargs)))


def _after_all(
    run: Run,
    plain: Sequence[Tensor],
    possible: Sequence[Sequence[Owned]],
    batched: Sequence[bool],
    here: Pass,
) -> list[Replaced]:
    """What is left of every output's maps after a few samples of some inputs were replaced."""
    found = [Replaced(tuple(each), False) for each in possible]
    changes: list[list[Tensor]] = [[] for _ in possible]
    for sample in sorted({0, here.samples - 1}):
        new = run(partial(_with_another, batched, sample, here))
        pairs = zip(plain, new, strict=False)
        for at, changed in enumerate([_change(*pair) for pair in pairs][: len(found)]):
            if changed is None:
                found[at] = Replaced((), True)
                continue
            changes[at].append(changed)
            left = [m for m in found[at].left if _within(changed, m, sample, here)]
            found[at] = Replaced(tuple(left), found[at].changed or bool(changed.any()))
    return [
        replace(each, reordered=not each.left and _are_apart(own, here.samples))
        for each, own in zip(found, changes, strict=True)
    ]


def _are_apart(changes: Sequence[Tensor], samples: int) -> bool:
    """Whether each of two samples changed its share of the rows of one dimension."""
    if len(changes) < 2:
        return False
    for dim, size in enumerate(changes[0].shape):
        rows = torch.stack([changed.movedim(dim, 0).flatten(1).any(1) for changed in changes])
        if bool((rows.sum(1) * samples == size).all()) and not rows.all(0).any():
            return size > 0
    return False


def _change(before: Tensor, after: Tensor) -> Tensor | None:
    """Where two outputs differ by more than rounding; None if they do in shape."""
    if before.shape != after.shape:
        return None
    eps = torch.finfo(before.dtype).eps
    limit = (100 if eps < 1e-6 else 1) * eps * before.abs().nan_to_num().max()
    return ~((after - before).abs() <= limit) & ~(after.isnan() & before.isnan())


def _within(changed: Tensor, known: Owned, sample: int, here: Pass) -> bool:
    """Whether all that changed is a sample's own."""
    own = owners(known, tuple(changed.shape), here.samples, changed.device)
    rows = changed.movedim(known.dim, 0).flatten(1).any(1)
    return not bool((rows & (own != sample)).any())


def _with_another(batched: Sequence[bool], sample: int, here: Pass, at: int, x: Tensor) -> Tensor:
    """An input with another sample in one's place, or something of itself where all are equal."""
    if not batched[at]:
        return x
    new = x.detach().clone()
    own, *others = new.roll(-sample, here.batch_dim).unbind(here.batch_dim)
    other = next((each for each in others if not torch.equal(each, own)), None)
    if other is None:
        first = own.flatten()[:1].reshape([1] * own.dim())
        other = own / 2 if x.is_floating_point() else first.expand_as(own)
    new.select(here.batch_dim, sample).copy_(other)
    return new


def keeps_apart(model: nn.Module, here: Pass, maps: Sequence[SampleMap]) -> bool:
    """Whether half of the samples, drawn at random, give their rows of the outputs by themselves.

    They do if no sample sees another. The answer is no as well if the model is random, or if it
    cannot run on fewer samples: then this tells nothing.
    """
    batched = tuple(is_batched(here, each) for each in here.leaves)
    generator = torch.Generator("cpu").manual_seed(here.samples)
    order = torch.randperm(here.samples, generator=generator, device="cpu")
    some = order[: here.samples // 2].sort().values

    def chosen(at: int, x: Tensor) -> Tensor:
        return x.index_select(here.batch_dim, some.to(x.device)) if batched[at] else x

    with untouched(model), torch.no_grad():
        try:
            new = outputs_of(model, here, chosen, {})
        except Exception:
            return False
    for m, whole, part in zip(maps, here.outputs, new, strict=False):
        if isinstance(m, Owned):
            own = owners(m, tuple(whole.shape), here.samples)
            rows = torch.isin(own, some).nonzero()[:, 0].to(whole.device)
            changed = _change(whole.detach().index_select(m.dim, rows), part)
            if changed is None or changed.any():
                return False
    return True


def _runs_on_fewer(run: Run, batched: Sequence[bool], here: Pass) -> bool:
    few = 2 if here.samples != 2 else 1
    try:
        run(lambda at, x: x.narrow(here.batch_dim, 0, few) if batched[at] else x)
    except Unrunnable:  # sizes that do not fit
        return False
    return True


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Random numbers, buffers and modules' own attributes stay as they were.

    Buffers are copies meanwhile: writing values back would change what a live graph has saved.
    """
    held = [(module, dict(module.__dict__), dict(module._buffers)) for module in model.modules()]
    for module, _, buffers in held:
        copies = {k: None if b is None else b.clone() for k, b in buffers.items()}
        module._buffers.update(copies)
    with torch.random.fork_rng():
        try:
            yield
        finally:
            for module, attributes, buffers in held:
                for name in module.__dict__.keys() - attributes.keys():
                    del module.__dict__[name]
                module.__dict__.update(attributes)
                module._buffers.clear()
                module._buffers.update(buffers)
