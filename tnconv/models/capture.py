"""Watching a model: what its layers read, and the gradients after what they gave.

Forward hooks see every call of every module that holds parameters itself; a tensor hook on the
call's output shows the gradient there, whatever the network's topology, also where the output is
changed in place afterwards. All hooks are gone when the watch ends, whatever ended it.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from inspect import signature
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from tnconv.functional.dynamo import untraced
from tnconv.models.calls import Call, Pass
from tnconv.models.checkpoints import (
    Held,
    in_backward,
    in_checkpoint,
    in_reentrant_checkpoint,
    refuse_if_reentrant,
)
from tnconv.models.layers import described, describes
from tnconv.models.modules import (
    makes_another,
    mixes_samples,
    named_modules,
    own_parameters,
    tensors,
    uncompiled,
    unwrapped,
)

Receiver = Callable[[Pass, Call, Tensor], None]
Ready = Callable[[Pass], None]
Wanted = Callable[[nn.Module, nn.Parameter], bool]


@dataclass(eq=False)
class Watch:
    """The passes through a model that were seen.

    ``ready`` is told of each pass when the model returns, ``receive`` of the gradients after its
    layers. Nothing is seen while the watch is ``paused``, by its owner, or ``muted``, by others
    (`alone`), nor calls of modules none of whose parameters are ``wanted``. If ``loose``, layers
    that run without the model count as well: those up to where one runs again are a pass, and what
    layers read is kept as the graph keeps it. If it ``refuses_reentrant`` checkpoints, layers that
    run in one, without a graph, raise. Copies and pickles of the model carry inert hooks.
    """

    model: nn.Module
    ready: Ready
    receive: Receiver
    per_sample: bool = False
    wanted: Wanted = lambda module, parameter: True
    loose: bool = False
    refuses_reentrant: bool = False
    batch_dim: int = 0
    passes: list[Pass] = field(default_factory=list)
    paused: bool = False
    muted: int = 0
    _inside: bool = False
    _hooked: WeakSet[nn.Module] = field(default_factory=WeakSet)
    _reached: Pass | None = None  # by a gradient, last
    _hooks: list[RemovableHandle] = field(default_factory=list)
    _gradient_hooks: list[RemovableHandle] = field(default_factory=list)

    @property
    def silent(self) -> bool:
        """Whether nothing is seen for now."""
        return self.paused or self.muted > 0

    def start(self) -> None:
        """Register the forward hooks."""
        _ACTIVE.add(self)
        begin, end, closed = Inert(self._begin), Inert(self._end), Inert(self._closed)
        self._hooks.append(self.model.register_forward_pre_hook(begin, with_kwargs=True))
        self.look_again()
        self._hooks.append(self.model.register_forward_hook(end))
        self._hooks.append(self.model.register_forward_hook(closed, always_call=True))

    def look_again(self) -> None:
        """Register the forward hooks of modules that the model did not have before."""
        for module, name in named_modules(self.model).items():
            if module in self._hooked:
                continue
            self._hooked.add(module)
            hook = _Hook(self, name)
            if self.per_sample and isinstance(module, _BatchNorm):
                self._hooks.append(module.register_forward_hook(Inert(hook.check)))
            if own_parameters(module):
                self._hooks.append(
                    module.register_forward_hook(Inert(hook.seen), prepend=True, with_kwargs=True)
                )

    def stop(self) -> None:
        """Remove all hooks, those on the graph's tensors, too."""
        _ACTIVE.discard(self)
        while self._hooks:
            self._hooks.pop().remove()
        self._hooked.clear()
        self.forget()

    def forget(self) -> None:
        """Drop the passes, and the hooks on their graphs."""
        while self._gradient_hooks:
            self._gradient_hooks.pop().remove()
        self.passes.clear()
        self._reached = None

    def on_gradient(self, tensor: Tensor, hook: Callable[[Tensor], None]) -> None:
        """Show the gradient after a tensor, if there is one, until the watch forgets it."""

        def arrived(grad: Tensor | None) -> None:
            if grad is not None and not self.muted:
                hook(grad)

        self._on_backward(tensor, arrived)

    def follow(self, here: Pass, call: Call, output: Tensor) -> None:
        """Note a call, and ask for the gradient after its output, or what that is a view of."""

        def arrived(grad: Tensor | None) -> None:
            if self.muted:
                return
            call.reached, self._reached = True, here
            if grad is not None:
                whole = grad.shape == call.output_shape
                self.receive(here, call, grad if whole else grad.reshape(call.output_shape))

        here.add(call)
        self._on_backward(output, arrived)

    def _on_backward(self, tensor: Tensor, hook: Callable[[Tensor | None], None]) -> None:
        """A function that passes no gradient on makes it None."""
        self.add_gradient_hook(tensor.register_hook(hook))  # type: ignore[no-untyped-call]

    def add_gradient_hook(self, handle: RemovableHandle) -> None:
        """Remove a hook on the graph when the watch forgets its passes."""
        self._gradient_hooks.append(handle)

    def pass_of(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pass:
        """The pass that a module's call belongs to.

        A reentrant checkpoint calls modules while gradients go backwards, for the pass they are in.
        """
        if self._reached is not None and in_backward():
            return self._reached
        if self.loose and not (self._inside and self.passes):
            last = self.passes[-1].calls if self.passes else ()
            if not self.passes or any(call.module is module for call in last):
                self._open(args, kwargs)
        return self.passes[-1]

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.silent and not in_backward():
            self._inside = True
            self._open(args, kwargs)

    def _open(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.passes.append(Pass(args, kwargs, len(self.passes), self.batch_dim))

    def _end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.passes and not self.silent and not in_backward():
            given = tensors(output)
            self.passes[-1].outputs = tuple(y for y in given if not is_functorch_wrapped_tensor(y))
            self.ready(self.passes[-1])

    def _closed(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """The model returned, or raised."""
        self._inside = False


_ACTIVE: WeakSet[Watch] = WeakSet()


@contextmanager
def alone(model: nn.Module, own: Watch | None = None) -> Iterator[None]:
    """Passes through a model that no watch but one's ``own`` sees, as long as the context is open.

    The library's own passes are of this kind: they belong to no loop of the user's.
    """
    others = [watch for watch in _ACTIVE if watch is not own] if len(_ACTIVE) else []
    if others:
        modules = {*model.modules()}
        others = [watch for watch in others if not modules.isdisjoint(watch.model.modules())]
    for watch in others:
        watch.muted += 1
    try:
        yield
    finally:
        for watch in others:
            watch.muted -= 1


class Inert:
    """A hook that does nothing in copies and pickles, and that no compiled region contains."""

    def __init__(self, hook: Callable[..., None] | None = None) -> None:
        self.hook = hook

    @untraced
    def __call__(self, *args: Any, **kwargs: Any) -> None:
        if self.hook is not None:
            self.hook(*args, **kwargs)

    def __reduce__(self) -> tuple[object, ...]:
        return Inert, ()


class _Hook:
    """The forward hooks of one module."""

    def __init__(self, watch: Watch, name: str) -> None:
        self.watch, self.name = watch, name

    def check(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Refuse a layer through which samples see each other on the way of a gradient.

        Raises:
            NotImplementedError: batch normalisation by the batch's statistics.
        """
        seen = not self.watch.silent and isinstance(output, Tensor) and output.requires_grad
        if seen and mixes_samples(module):
            raise NotImplementedError(
                f"layer {self.name!r} normalises by the batch's statistics, so no sample has a "
                "gradient of its own; expected evaluation mode and running statistics"
            )

    def seen(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Note the call, and ask for the gradient after its output.

        Raises:
            NotImplementedError: a reentrant checkpoint, if the watch refuses them.
        """
        deaf = self.watch.silent or not (self.watch.passes or self.watch.loose)
        saves = self.watch.loose and in_checkpoint()
        if deaf and not saves:
            return
        watched = _before_views(output) if isinstance(output, Tensor) else None
        if watched is None or not watched.requires_grad:
            if self.watch.refuses_reentrant:
                refuse_if_reentrant(self.name)
            return
        deaf = deaf or is_functorch_wrapped_tensor(watched)
        if deaf and not saves:
            return
        learns = tuple(
            (n, p)
            for n, p in own_parameters(module)
            if p.requires_grad and self.watch.wanted(module, p) and not makes_another(module, n)
        )
        inputs = tuple(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        if not learns or not inputs:
            return
        if deaf or (in_backward() and not in_reentrant_checkpoint()):
            if saves:  # a checkpoint's recomputation saves what its first run saved
                _ = [Held(tensor) for tensor in inputs]
            return
        here = self.watch.pass_of(module, args, kwargs)
        edge, shape = get_gradient_edge(watched), tuple(output.shape)
        known = describes(module)
        call = Call(self.name, module, args, _ordered(module, kwargs), shape, edge, known, learns)
        call.description = described(module, call.given, shape) if known else None
        call.described = call.description is not None
        call.recomputed = in_checkpoint()
        if self.watch.loose and call.described:
            call.hold_as_the_graph_does()
        elif saves:
            _ = [Held(tensor) for tensor in call.inputs]
        self.watch.follow(here, call, watched)


def _ordered(module: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keywords in the order of the parameters of ``forward``; names that it does not show last."""
    if len(kwargs) < 2:
        return kwargs
    names = [*signature(module.forward).parameters]
    return dict(
        sorted(
            kwargs.items(),
            key=lambda item: names.index(item[0]) if item[0] in names else len(names),
        )
    )


def _before_views(output: Tensor) -> Tensor:
    """What a layer's output is a view of, all of it: there the graph stays where it is.

    Changing a view in place moves the graph before it, so that hooks on the view are lost.
    """
    base = output._base
    whole = base is not None and base.numel() == output.numel()
    if base is not None and whole and base.is_contiguous() and output.is_contiguous():
        return base if base.requires_grad and base.grad_fn is not None else output
    return output


@contextmanager
def watching(
    model: nn.Module,
    ready: Ready,
    receive: Receiver,
    per_sample: bool = False,
    batch_dim: int = 0,
) -> Iterator[Watch]:
    """Watch a model, on the module that ``torch.compile`` or DistributedDataParallel wraps.

    Compiled code runs no hooks, so compiled parts run as they were written meanwhile.
    """
    watch = Watch(unwrapped(model), ready, receive, per_sample, batch_dim=batch_dim)
    with uncompiled(model), ExitStack() as stack:
        stack.callback(watch.stop)
        watch.start()
        yield watch
