"""Calls of layers, and the passes through a model that they belong to."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils._pytree import tree_leaves

from tnconv.models.checkpoints import Held, changed_in_place
from tnconv.models.layers import Described
from tnconv.models.sample_maps import SampleMap


@dataclass(eq=False)
class Call:
    """One call of a module: what it read, and where the gradient after its output arrives.

    ``parameters`` are the module's own that learn, by their names in it; ``reached`` is whether a
    backward pass came to the output, ``recomputed`` whether a checkpoint runs the call again.
    ``map`` tells whose each row of the output is, where samples are told apart.
    """

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output_shape: tuple[int, ...]
    edge: GradientEdge | None
    described: bool
    parameters: tuple[tuple[str, nn.Parameter], ...] = ()
    versions: tuple[int, ...] = ()
    reached: bool = False
    recomputed: bool = False
    map: SampleMap | None = None
    held: tuple[Held, ...] = ()
    description: Described | None = None
    inputs: tuple[Tensor, ...] = field(init=False)

    def __post_init__(self) -> None:
        given = (*self.args, *self.kwargs.values())
        self.inputs = tuple(each for each in given if isinstance(each, Tensor))
        self.versions = tuple(tensor._version for tensor in self.inputs)

    @property
    def given(self) -> tuple[Tensor, ...]:
        """The tensors that the layer read, detached, in the order of its parameters.

        Raises:
            RuntimeError: it was changed in place after the layer had read it, or freed.
        """
        if self.held:
            return tuple(each.value(self.name) for each in self.held)
        self.expect_unchanged()
        return tuple(tensor.detach() for tensor in self.inputs)

    def expect_unchanged(self) -> None:
        """Check that the inputs are what the layer read.

        Raises:
            RuntimeError: one was changed in place since.
        """
        if tuple([tensor._version for tensor in self.inputs]) != self.versions:
            raise changed_in_place(self.name)

    @property
    def x(self) -> Tensor:
        """The first of the tensors that the layer read."""
        return self.given[0]

    def release(self) -> None:
        """Free what the call read: nothing needs it any more."""
        self.args, self.kwargs, self.inputs, self.description = (), {}, (), None

    def hold_as_the_graph_does(self) -> None:
        """Keep the inputs no longer than the autograd graph keeps its saved tensors.

        Under activation checkpointing they are freed, and recomputed with their segment.
        """
        self.held = tuple(Held(tensor) for tensor in self.inputs)
        self.release()

    def free(self) -> None:
        """A backward pass used what the call read: others may keep it."""
        for each in self.held:
            each.free()


class Alone(Call):
    """A parameter by itself, that no layer explains: its gradients come sample by sample."""


@dataclass(eq=False)
class Pass:
    """One call of the model: a micro-batch, with the calls of layers in it; ``at`` counts them.

    The batch is dimension ``batch_dim`` of the inputs that are ``batched``, of so many ``size``
    samples, or as many as the first of them has; ``maps`` tell whose rows outputs have.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    at: int = 0
    batch_dim: int = 0
    size: int | None = None
    maps: tuple[SampleMap, ...] = ()
    batched: tuple[bool, ...] = ()
    calls: list[Call] = field(default_factory=list)
    uses: Counter[nn.Parameter] = field(default_factory=Counter)
    outputs: tuple[Tensor, ...] = ()

    def add(self, call: Call) -> None:
        """Note a call, and that one more gradient is expected for its parameters."""
        self.calls.append(call)
        self.uses.update(parameter for _, parameter in call.parameters)

    def keep(self, call: Call, parameters: Collection[nn.Parameter]) -> None:
        """Forget a call, but for some of its parameters."""
        self.uses.subtract(p for _, p in call.parameters if p not in parameters)
        call.parameters = tuple((name, p) for name, p in call.parameters if p in parameters)
        if not call.parameters:
            self.calls.remove(call)

    @cached_property
    def leaves(self) -> list[Any]:
        """The model's arguments, one by one."""
        return list(tree_leaves((self.args, self.kwargs)))

    @property
    def sizes(self) -> list[int]:
        """What the batch size can be: the size of that dimension of each input tensor."""
        given = [each for each in self.leaves if isinstance(each, Tensor)]
        return list(
            dict.fromkeys(t.shape[self.batch_dim] for t in given if t.dim() > self.batch_dim)
        )

    @property
    def samples(self) -> int:
        """The batch size.

        Raises:
            ValueError: no input is a tensor with a batch dimension.
        """
        if self.size is None:
            if not self.sizes:
                raise ValueError(
                    "the model's inputs hold no tensor; expected one with a batch dimension"
                )
            self.size = self.sizes[0]
        return self.size
