"""Damped Newton steps along leading eigenvectors of a batch's Gauss-Newton matrix."""

from collections.abc import Callable, Iterable, Mapping
from inspect import signature
from math import inf
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from tnconv.given import instances
from tnconv.losses.reductions import batch_size
from tnconv.models.capture import Inert
from tnconv.models.modules import unwrapped, weak
from tnconv.operators.low_rank import LowRankBlock, low_rank_ggn
from tnconv.operators.low_rank.damping import Damping
from tnconv.optim.workers import Workers
from tnconv.quantities.second_order import Fisher, columns

Parameters = Iterable[nn.Parameter] | Iterable[dict[str, Any]]
GROUPED = ("lr", "directions", "damping", "complement_lr", "momentum", "weight_decay")


class LowRankNewton(torch.optim.Optimizer):
    """``W <- W - η Σ_k γ[k] / (λ[k] + δ[k]) e_k - η' V``  with  ``V <- μ V + g - Σ_k γ[k] e_k``.

    ``(λ[k], e_k)`` are the leading eigenpairs of the Gauss-Newton matrix of the step's batch and
    ``γ[k] = e_k · g`` the slopes of its gradient g: a damped Newton step in their span, and
    gradient descent with momentum in the complement. Source: Dangel, Tatzel & Hennig 2022 (ViViT),
    section 4.

    The curvature is that of the one pass through the model since the last step whose loss
    ``loss_fn``, a module, was called on its output; the pass runs once more, in `step`, for its
    columns. Every group of parameters has a matrix of its own.

    Args:
        model: The module that is trained; its layers must keep samples apart.
        loss_fn: The loss that the loop calls, a module.
        lr: η, of the Newton step.
        directions: The most eigenvectors k for each group.
        damping: δ: a number, or a rule (`tnconv.operators.low_rank.damping`).
        complement_lr: η', of the gradient's part that no direction has.
        momentum: μ in [0, 1).
        weight_decay: γ, apart from the gradient: ``W <- (1 - η' γ) W``.
        fisher: ``"type-2"`` columns of the loss's Hessian, or ``"mc"``, which are sampled.
        samples: The number of sampled columns for each sample of the batch.
        curvature_samples: The number of samples, drawn anew for every step, that the curvature is
            made of; all where it is None.
        generator: Where samples and columns are drawn; torch's default generator where it is None.
        params: Parameters, or groups of them with settings of their own; by default all.

    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    >>> loss_fn, labels = nn.CrossEntropyLoss(), torch.randint(10, (8,))
    >>> optimizer = LowRankNewton(model, loss_fn)
    >>> loss_fn(model(torch.rand(8, 1, 8, 8)), labels).backward()
    >>> optimizer.step()

    Raises:
        NotImplementedError: a loss whose Hessian has no known root.
        TypeError: a model or a loss that is no module.
        ValueError: a hyper-parameter out of its range, or foreign parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: nn.Module,
        lr: float = 1.0,
        directions: int = 10,
        damping: float | Damping = 1.0,
        complement_lr: float = 0.01,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        fisher: Fisher = "type-2",
        samples: int = 1,
        curvature_samples: int | None = None,
        generator: torch.Generator | None = None,
        params: Parameters | None = None,
    ) -> None:
        settings = {k: v for k, v in locals().items() if k not in ("self", "model", "__class__")}
        instances(model=model, loss_fn=loss_fn)
        if not isinstance(loss_fn, nn.Module):
            kind = type(loss_fn).__name__
            raise TypeError(f"loss_fn is a {kind}; expected a torch.nn.Module, which is watched")
        columns(fisher, samples, generator)  # checks them
        check(settings)
        self.model, self.loss_fn, self.settings = unwrapped(model), loss_fn, settings
        self._workers = Workers(model=model)
        self._inputs: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._targets: list[Any] = []
        self._versions: list[tuple[Tensor, int]] = []  # of what the pass read
        self._modes: list[bool] = []
        self._paused = False  # while the library runs the model itself
        self._handles: list[RemovableHandle] = [
            self.model.register_forward_pre_hook(Inert(weak(self._called)), with_kwargs=True),
            loss_fn.register_forward_hook(Inert(weak(self._loss_called)), with_kwargs=True),
        ]
        defaults = {name: settings[name] for name in GROUPED}
        super().__init__(self.model.parameters() if params is None else params, defaults)

    def remove_hooks(self) -> None:
        """Stop watching the model and the loss; later steps need them again."""
        while self._handles:
            self._handles.pop().remove()
        self._workers.leave()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train more of the model's parameters."""
        super().add_param_group(param_group)
        check({name: self.param_groups[-1][name] for name in GROUPED})
        own = {*self.model.parameters()}
        for parameter in self.param_groups[-1]["params"]:
            if parameter not in own:
                shape = tuple(parameter.shape)
                raise ValueError(f"a parameter of shape {shape} is not the model's; expected its")

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take a step from the one batch whose loss was called since the last one.

        Raises:
            NotImplementedError: several workers.
            RuntimeError: no batch, or several.
        """
        loss = None
        if closure is not None:
            self._forget()
            with torch.enable_grad():
                loss = closure()
        if (count := self._workers.count) > 1:
            raise NotImplementedError(
                f"LowRankNewton is asked for a step of {count} workers, whose gradients are of all "
                "batches and whose matrix would be of one; expected a single process"
            )
        blocks = self._curvature()
        for at, group in enumerate(self.param_groups):
            self._update(group, blocks.get(str(at)))
        self._forget()
        return loss

    def _curvature(self) -> Mapping[str, LowRankBlock]:
        """The matrix of every group with a gradient."""
        if len(self._targets) != 1 or len(self._inputs) != 1:
            raise RuntimeError(
                f"the loss was called {len(self._targets)} times since the last step, and the "
                f"model {len(self._inputs)} times; expected once each, in training mode"
            )
        self._expect_the_same_pass()
        names = {p: name for name, p in self.model.named_parameters() if p.requires_grad}
        groups = {
            str(at): [names[p] for p in group["params"] if p.grad is not None and p in names]
            for at, group in enumerate(self.param_groups)
        }
        (args, kwargs) = self._inputs[0]
        inputs: Any = args
        if kwargs:  # positional arguments are named, too
            inputs = dict(signature(self.model.forward).bind(*args, **kwargs).arguments)
        subset = self._subset(batch_size(inputs))
        self._paused = True
        try:
            found = low_rank_ggn(
                self.model,
                self.loss_fn,
                inputs,
                self._targets[0],
                fisher=self.settings["fisher"],
                samples=self.settings["samples"],
                generator=self.settings["generator"],
                curvature_samples=subset,
                gradient_samples=subset,
                groups={at: own for at, own in groups.items() if own},
            )
        finally:
            self._paused = False
        return found.blocks

    def _expect_the_same_pass(self) -> None:
        """Check that the pass would be what it was.

        Raises:
            RuntimeError: tensors that it read, or the mode of a module, are no more what they were.
        """
        if any(tensor._version != version for tensor, version in self._versions):
            raise RuntimeError(
                "inputs or targets were changed in place before step(), which runs the pass once "
                "more; expected them to stay until then"
            )
        if self._modes != _modes(self.model):
            raise RuntimeError(
                "the mode of the model changed before step(), which runs the pass once more; "
                "expected it to stay until then"
            )

    def _subset(self, size: int) -> list[int] | None:
        count, generator = self.settings["curvature_samples"], self.settings["generator"]
        if count is None or count >= size:
            return None
        device = "cpu" if generator is None else generator.device
        found: list[int] = torch.randperm(size, generator=generator, device=device)[:count].tolist()
        return found

    def _update(self, group: Mapping[str, Any], block: LowRankBlock | None) -> None:
        """One group's step: along its directions, and along what is left of the gradient."""
        if block is None:
            return
        named = dict(self.model.named_parameters())
        left = {name: _gradient(named[name]) for name in block.rows.like}
        count = min(group["directions"], block.rank)
        if count:
            steps = block.newton_coefficients(group["damping"], count)
            vectors = block.eigh(count).vectors
            along = [each.flatten(1) @ left[name].flatten() for name, each in vectors.items()]
            slopes = torch.stack(along).sum(0)
            for name, each in vectors.items():
                left[name] = left[name] - torch.tensordot(slopes, each, 1)
                step = torch.tensordot(steps.to(each), each, 1)
                named[name].add_(step, alpha=group["lr"])
        for name, gradient in left.items():
            named[name].mul_(1 - group["complement_lr"] * group["weight_decay"])
            if group["momentum"]:
                state = self.state[named[name]]
                buffer = state.setdefault("momentum_buffer", torch.zeros_like(gradient))
                gradient = buffer.mul_(group["momentum"]).add_(gradient)
            named[name].add_(gradient, alpha=-group["complement_lr"])

    def state_dict(self) -> dict[str, Any]:
        """Everything that a later run needs to go on exactly."""
        found: dict[str, Any] = super().state_dict()
        if (generator := self.settings["generator"]) is not None:
            found["generator"] = generator.get_state()
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from another run's `state_dict`."""
        given = dict(state_dict)
        drawn = given.pop("generator", None)
        super().load_state_dict(given)
        if drawn is not None and self.settings["generator"] is not None:
            self.settings["generator"].set_state(drawn.cpu())
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        kind = type(self).__name__
        raise TypeError(f"{kind} cannot be pickled with its hooks; save its state_dict instead")

    def _called(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if model.training and torch.is_grad_enabled() and not self._paused:
            self._inputs.append((args, kwargs))
            self._keep_versions((args, kwargs))
            self._modes = _modes(model)

    def _loss_called(
        self, loss_fn: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Any
    ) -> None:
        given = dict(zip(("input", "target"), args, strict=False)) | kwargs
        if self._inputs and not self._paused and given["input"].requires_grad:
            self._targets.append(given["target"])
            self._keep_versions(given["target"])

    def _keep_versions(self, given: Any) -> None:
        tensors = (each for each in tree_leaves(given) if isinstance(each, Tensor))
        self._versions += [(each, each._version) for each in tensors]

    def _forget(self) -> None:
        for kept in (self._inputs, self._targets, self._versions):
            kept.clear()


def _modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad.detach()


ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lr": (lambda value: 0 <= value < inf, "a number, at least 0"),
    "directions": (lambda value: value >= 1 and value % 1 == 0, "an int, at least 1"),
    "damping": (lambda value: callable(value) or 0 < value < inf, "a positive number or a rule"),
    "complement_lr": (lambda value: 0 <= value < inf, "a number, at least 0"),
    "momentum": (lambda value: 0 <= value < 1, "a number in [0, 1)"),
    "weight_decay": (lambda value: 0 <= value < inf, "a number, at least 0"),
    "curvature_samples": (
        lambda value: value is None or (value >= 1 and value % 1 == 0),
        "None or an int, at least 1",
    ),
}


def check(settings: Mapping[str, Any]) -> None:
    """Raise unless all settings are allowed.

    Raises:
        ValueError: one that is not.
    """
    for name, value in settings.items():
        allowed, words = ALLOWED.get(name, (lambda value: True, ""))
        if not allowed(value):
            raise ValueError(f"{name} is {value!r}; expected {words}")
