"""Who reads an activation's output, and who else holds its input: found in the traced model."""

import copy
import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, Node, Tracer

from tnconv.nn.memory import saving_layers as layers
from tnconv.nn.memory.activations import Pointwise

IN_PLACE: tuple[object, ...] = (operator.iadd, operator.isub, "add_", "sub_")
VIEWS = (nn.Identity, nn.Flatten, nn.Unflatten)
ALIASES: tuple[object, ...] = (
    *(torch.flatten, torch.reshape, torch.transpose, torch.permute, torch.squeeze),
    *(torch.unsqueeze, torch.chunk, torch.split, operator.getitem),
    *("flatten", "reshape", "view", "transpose", "permute", "squeeze", "unsqueeze", "chunk"),
    *("split", "contiguous", *IN_PLACE),
)
"""Functions and methods whose result can share its storage with the first argument."""

STORELESS: tuple[object, ...] = (
    *(torch.add, torch.sub, torch.cat, torch.concat, torch.stack, torch.mean, torch.sum),
    *(operator.add, operator.sub, F.pad, "add", "sub", "mean", "sum", "size", "dim"),
)
"""Functions and methods that store no tensor argument for backward, and whose result is new."""

NEW_OUTPUT = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d),
    *(nn.ConvTranspose3d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    *(nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    *(layers.Conv1d, layers.Conv2d, layers.Conv3d, layers.ConvTranspose1d),
    *(layers.ConvTranspose2d, layers.ConvTranspose3d, layers.Linear, layers.BatchNorm1d),
    *(layers.BatchNorm2d, layers.BatchNorm3d, layers.LayerNorm, layers.GroupNorm),
    *(layers.InstanceNorm1d, layers.InstanceNorm2d, layers.InstanceNorm3d),
)
"""Modules, by exact type, that make a new output, which they do not store."""


class _Leaves(Tracer):
    """Traces through modules that hold modules; others' code can be anything."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return next(m.children(), None) is None or super().is_leaf_module(m, module_qualified_name)


def attach_readers(model: nn.Module, given: nn.Module) -> None:
    """Tell the activations of a model who reads them, as seen in the given one's traced code."""
    flow = _Flow(graph, model) if (graph := _traced(given)) is not None else None
    pointwise = [module for module in model.modules() if isinstance(module, Pointwise)]
    for module in pointwise:
        module.readers = None if flow is None else flow.readers(module)
        module.input_held = flow is None or flow.input_held(module)
    for module in pointwise:
        if module in _followers(module):  # it would ask itself
            module.readers = None


def _followers(module: Pointwise) -> set[nn.Module]:
    """All that it may ask, and those that they may ask."""
    found: set[nn.Module] = set()
    front: list[nn.Module] = [module]
    while front:
        reader = front.pop()
        new = set(reader.readers or ()) - found if isinstance(reader, Pointwise) else set()
        found |= new
        front += new
    return found


def _traced(model: nn.Module) -> Graph | None:
    """The graph of a copy without hooks; None where ``torch.fx`` cannot follow the code."""
    try:
        tensors = [*model.parameters(), *model.buffers()]
        twin = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
        for module in twin.modules():
            for name, registry in vars(module).items():
                if "hooks" in name and isinstance(registry, dict):
                    registry.clear()
        return _Leaves().trace(twin)
    except Exception:  # whatever the model's own code raises when it meets symbols
        return None


@dataclass(frozen=True)
class _Flow:
    """A graph of calls, and the model whose modules it names."""

    graph: Graph
    model: nn.Module

    def readers(self, module: nn.Module) -> list[nn.Module] | None:
        """The modules that read what this one gives; None if anything else may store it."""
        found = [user for node in self._calls(module) for user in self._users(node)]
        readers = [user for user in found if user is not None]
        return readers if found and len(readers) == len(found) else None

    def input_held(self, module: nn.Module) -> bool:
        """Whether anything but this module may store its input."""
        calls = self._calls(module)
        return not calls or any(
            not isinstance(source := next(iter(node.args), None), Node)
            or list(source.users) != [node]
            or not self._new(source)
            for node in calls
        )

    def _calls(self, module: nn.Module) -> list[Node]:
        return [node for node in self.graph.nodes if self._module(node) is module]

    def _module(self, node: Node) -> nn.Module | None:
        return self.model.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _new(self, node: Node) -> bool:
        module = self._module(node)
        if module is None:
            return node.op.startswith("call_") and _among(node.target, STORELESS)
        return type(module) in NEW_OUTPUT

    def _users(self, node: Node) -> Iterator[nn.Module | None]:
        """The modules that read a value or an alias of it; None for what else may store it."""
        for user in node.users:
            first = bool(user.args) and user.args[0] is node
            module = self._module(user)
            if first and _among(user.target, IN_PLACE):
                yield None  # what it overwrites must not be stored
            if first and (isinstance(module, VIEWS) or _among(user.target, ALIASES)):
                yield from self._users(user)
            elif module is not None:
                yield module if first else None
            elif not _among(user.target, (*STORELESS, *IN_PLACE)):
                yield None


def _among(target: object, known: tuple[object, ...]) -> bool:
    return any(target is each or (isinstance(each, str) and target == each) for each in known)
