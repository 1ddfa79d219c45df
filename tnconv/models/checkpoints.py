"""Activation checkpointing: what a graph keeps of a tensor, and when a module runs once more.

Checkpoints run their segments again while gradients go backwards. Non-reentrant ones fill in what
the graph had saved. Reentrant ones run forwards without a graph first, and then once more, with a
graph and a backward pass of their own inside the one that is going on.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.utils.checkpoint import CheckpointFunction


def in_backward() -> bool:
    """Whether gradients are going backwards just now, in this thread."""
    return torch._C._current_graph_task_id() != -1


def in_reentrant_checkpoint() -> bool:
    """Whether the caller runs in a reentrant checkpoint, forwards or for the second time."""
    codes = {CheckpointFunction.forward.__code__, CheckpointFunction.backward.__code__}
    return any(code in codes for code in _callers())


def in_checkpoint() -> bool:
    """Whether the caller runs in a non-reentrant checkpoint, forwards or once more."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    name = "" if hooks is None else getattr(hooks[0], "__qualname__", "")
    return name.startswith(("_checkpoint_hook", "_recomputation_hook"))


@contextmanager
def refusing_reentrant(modules: Mapping[nn.Module, str]) -> Iterator[None]:
    """Refuse reentrant checkpoints while the context is open: they hide layers from their graph.

    The modules of a model are given with their names.

    Raises:
        NotImplementedError: a module with parameters that runs in one.
    """

    def check(module: nn.Module, args: tuple[Any, ...]) -> None:
        if not torch.is_grad_enabled():
            refuse_if_reentrant(modules[module])

    own = [m for m in modules if any(p is not None for p in m._parameters.values())]
    handles = [module.register_forward_pre_hook(check) for module in own]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def refuse_if_reentrant(layer: str) -> None:
    """Refuse a layer that runs in a reentrant checkpoint, without a graph.

    Raises:
        NotImplementedError: it does.
    """
    if not torch.is_grad_enabled() and in_reentrant_checkpoint():
        raise NotImplementedError(
            f"layer {layer!r} runs in a reentrant checkpoint, which keeps no graph; "
            "expected torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
        )


def refuse_reentrant_nodes(names: Iterable[str]) -> None:
    """Refuse a graph with reentrant checkpoints in it: no vector but the loss's gradient passes.

    Raises:
        NotImplementedError: there is one among the names of its operations.
    """
    if any(name == "CheckpointFunctionBackward" for name in names):
        raise NotImplementedError(
            "the output depends on a reentrant checkpoint, which vectors other than the loss's "
            "gradient cannot pass; expected checkpoint(..., use_reentrant=False)"
        )


def changed_in_place(layer: str) -> RuntimeError:
    """What to raise where something is to be made of an input that is no more what it was."""
    return RuntimeError(
        f"the input of layer {layer!r} was changed in place after the layer had read it; expected "
        "it to stay until all that is made of it was computed"
    )


class Held:
    """A tensor that is kept as the graph keeps what it saved.

    Where hooks on saved tensors are active (checkpoints, tensors on other devices or on disk), they
    pack and unpack it.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._weak = ref(tensor)
        self._version = tensor._version
        self._tensor: Tensor | None = None
        self._node: Any = None
        if torch._C._autograd._top_saved_tensors_default_hooks(False) is None:
            self._tensor = tensor
        else:
            with torch.enable_grad():
                anchor = torch.empty((), requires_grad=True)
                saved: Any = _Save.apply(anchor, tensor)  # type: ignore[no-untyped-call]
                self._node = saved.grad_fn

    def value(self, name: str) -> Tensor:
        """The tensor, without its history.

        Raises:
            RuntimeError: it was changed in place since, or freed with the graph.
        """
        tensor = self._tensor
        if tensor is None and self._node is not None:
            self._tensor = tensor = self._node.saved_tensors[0]
        elif tensor is None:
            tensor = self._weak()  # a graph that was retained keeps it
        if tensor is None:
            raise RuntimeError(
                f"the input of layer {name!r} was freed after the first backward pass through it; "
                "expected one backward pass, of the sum of all losses"
            )
        if self._node is None and tensor._version != self._version:
            raise changed_in_place(name)
        return tensor.detach()

    def pack(self) -> None:
        """Keep it as before, where hooks unpacked it; it can be asked for again."""
        if self._node is not None:
            self._tensor = None

    def free(self) -> None:
        """Keep it no longer than others do."""
        self._tensor = self._node = None


class _Save(torch.autograd.Function):
    """A node beside the graph with one saved tensor."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, tensor: Tensor) -> Tensor:
        ctx.save_for_backward(tensor)
        return anchor.clone()

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Any) -> Any:
        raise AssertionError("the node is beside the graph")


def _callers() -> Iterator[CodeType]:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame.f_code
        frame = frame.f_back
