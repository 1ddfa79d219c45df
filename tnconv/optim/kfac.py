"""KFAC: gradient descent preconditioned by Kronecker-factored curvature."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tnconv.diagrams.kronecker import Flavour
from tnconv.optim.blocks import Block, blocks
from tnconv.optim.collection import FactorWatch, LossFunction, LossScale
from tnconv.optim.damping import adapted
from tnconv.optim.preconditioner import (
    INVERSES,
    Inverse,
    State,
    bases,
    move,
    update_factors,
    update_inverses,
)
from tnconv.optim.saving import Resumable
from tnconv.optim.settings import GROUPED, Schedule, check, due
from tnconv.optim.steps import descend, natural_gradients, predicted_change
from tnconv.optim.workers import Workers
from tnconv.quantities import kronecker_factors as kronecker
from tnconv.quantities.kronecker_factors import Fisher, Reduction

Fallback = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
Parameters = Iterable[nn.Parameter] | Iterable[dict[str, Any]]


class KFAC(Resumable):
    """``V <- μ V + ν P(G) + γ W``,  ``W <- W - η V``  with ``P(G) ≈ (B ⊗ A + λ I)⁻¹ G``.

    G is the gradient of a layer's weight W, with its bias as one more column (``joint``), for every
    group a matrix; A and B are running averages (decay β) of the layer's Kronecker factors, as in
    `tnconv.quantities.KFAC` with the same ``flavour``, ``fisher``, ``samples``, ``generator``,
    ``per_group`` and ``reduction``. The trust region ``ν = min(1, √(κ / (η² Σ ⟨G, P(G)⟩)))`` bounds
    the step in the curvature's own norm. η is ``lr``, μ ``momentum``, λ ``damping``, γ
    ``weight_decay`` (``decoupled``: ``W <- (1 - η γ) W`` instead), κ ``kl_clip`` (``math.inf``: no
    bound). Groups of parameters, given as ``params``, can have their own.

    * Linear and (transposed) convolutional layers are preconditioned. All other parameters, and
      those of layers whose factors were never seen, are trained by SGD with the same settings, or
      the others by the optimizer that ``fallback`` makes of them: `fallback` then holds it.
    * ``fisher="empirical"`` and ``"forward-only"`` need nothing but ``loss.backward()``. For "mc"
      and "type-2" give the ``loss_fn`` that the loop calls, a module; for a function, call
      `propagate` before ``loss.backward()``. Losses must not change scale afterwards, but for
      "empirical", which can be told a ``loss_scale`` such as ``GradScaler.get_scale``.
    * ``inverse="cholesky"`` damps the factors apart (`damping.factored`), "eigen" their product
      exactly, and "ekfac" corrects its eigenvalues whenever it collects factors (`ekfac`). After
      `adapt` the damping follows how well the model of a step predicts the loss.
    * Factors are collected in steps that ``update_factors_every`` names, from layers in training
      mode; inverses are refreshed at ``update_inverses_every``-th steps, and at those of the first
      so many that collect factors. Both are a number, or a function of the step that says whether.
    * Passes between two steps count as micro-batches of one batch; their losses are to be divided
      by their number. Passes under ``torch.func`` are not watched; compiled graphs break at layers.
      Under ``torch.distributed`` factors are averages over workers, who share the inversions.
    * ``state_dict`` holds plain tensors and numbers. Copies of the model carry hooks that do
      nothing (`remove_hooks`); a deep copy of the optimizer has a model of its own.

    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    >>> loss_fn, labels = nn.CrossEntropyLoss(), torch.randint(10, (8,))
    >>> optimizer = KFAC(model, lr=0.05, damping=1e-2, fisher="mc", loss_fn=loss_fn)
    >>> loss_fn(model(torch.rand(8, 1, 8, 8)), labels).backward()
    >>> optimizer.step()
    >>> {name: tuple(a.shape) for name, a in optimizer.state[model[0].weight].items() if name < "a"}
    {'A': (1, 10, 10), 'B': (1, 4, 4), 'A_inverse': (1, 10, 10), 'B_inverse': (1, 4, 4)}

    Raises:
        ValueError: a hyper-parameter out of its range, or a model without parameters.
        TypeError: a model that is no module.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.1,
        momentum: float = 0.9,
        damping: float = 1e-2,
        decay: float = 0.95,
        weight_decay: float = 0.0,
        flavour: Flavour = "reduce",
        kl_clip: float = 1e-4,
        update_factors_every: Schedule = 1,
        update_inverses_every: Schedule = 10,
        *,
        params: Parameters | None = None,
        fisher: Fisher = "empirical",
        samples: int = 1,
        generator: torch.Generator | None = None,
        loss_fn: LossFunction | None = None,
        reduction: Reduction = "mean",
        loss_scale: LossScale | None = None,
        joint: bool = True,
        per_group: bool = True,
        inverse: Inverse = "cholesky",
        decoupled: bool = False,
        adapt_damping: float | None = None,
        factor_dtype: torch.dtype | None = None,
        fallback: Fallback | None = None,
        process_group: "dist.ProcessGroup | None" = None,
    ) -> None:
        settings = {k: v for k, v in locals().items() if k not in ("self", "model", "__class__")}
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
        check(settings)
        kfac = kronecker.KFAC(flavour, fisher, samples, generator, joint, per_group, reduction)
        self.model, self.settings, self.fallback = model, settings | {"params": None}, None
        self._blocks: list[Block] = []
        self._watch = FactorWatch(model, kfac, loss_fn, loss_scale)
        self._workers = Workers(process_group)
        self.predicted: Tensor | None = None
        defaults = {name: settings[name] for name in GROUPED} | {"steps": 0}
        super().__init__(model.parameters() if params is None else params, defaults)
        self._arrange()
        held = {p for block in self._blocks for p in block.parameters}
        others = [p for group in self.param_groups for p in group["params"] if p not in held]
        if fallback is not None and others:
            self.fallback = fallback(others)

    @property
    def steps(self) -> int:
        """How many steps were taken."""
        return int(self.param_groups[0]["steps"])

    def remove_hooks(self) -> None:
        """Stop watching the model; later steps use the factors collected so far."""
        self._watch.stop()

    def propagate(self, output: Tensor, targets: Any) -> None:
        """Collect factors for a loss ``loss_fn(output, targets)`` that is no module's call."""
        self._watch.propagate(output, targets)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients, and the factors that were collected from them since the last step."""
        if self._watch.kfac.fisher == "empirical":
            self._watch.clear()
        super().zero_grad(set_to_none)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update factors and inverses where they are due, then all parameters with a gradient.

        Raises:
            RuntimeError: factors are due whose loss was not seen.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update_factors()
        self._update_inverses()
        self.predicted = None
        for at, group in enumerate(self.param_groups):
            self._update(group, [b for b in self._blocks if self._group_of[b.key] == at])
            group["steps"] += 1
        if self.fallback is not None:
            self.fallback.step()
        self._watch.forget()
        self._resume()
        return loss

    def adapt(self, before: float | Tensor, after: float | Tensor) -> None:
        """Adapt the damping of all groups to how a step changed the loss of its batch.

        It falls by the factor ``adapt_damping`` where the change is near what the quadratic model
        of the step predicted, and grows by it where the loss fell by far less. "eigen" uses the new
        value at once, "cholesky" when it inverts again.

        Raises:
            RuntimeError: no step was taken since the last call, or without ``adapt_damping``.
        """
        factor = self.settings["adapt_damping"]
        if factor is None or self.predicted is None:
            raise RuntimeError("adapt needs adapt_damping, and a step before each call")
        ratio = float((after - before) / self.predicted)
        for group in self.param_groups:
            group["damping"] = adapted(group["damping"], ratio, factor)
        self.predicted = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train more of the model's parameters."""
        super().add_param_group(param_group)
        check({name: self.param_groups[-1][name] for name in GROUPED})
        self._arrange()

    def _arrange(self) -> None:
        """Find the blocks of the parameters in all groups."""
        group_of = {p: at for at, group in enumerate(self.param_groups) for p in group["params"]}
        self._blocks = blocks(self.model, group_of, self.settings["joint"])
        self._watch.parameters = {block.key for block in self._blocks}
        self._group_of = group_of
        self._resume()

    def _resume(self) -> None:
        """Watch the model where the next step updates factors."""
        if self.settings["inverse"] == "ekfac":
            self._watch.bases = bases(self._blocks, self.state)
            self._watch.clear()
        self._watch.watch.paused = not due(self.settings["update_factors_every"], self.steps)

    def _with(self, setting: str) -> list[tuple[Block, State, float]]:
        """The blocks with their state and a setting of their group."""
        groups = self.param_groups
        found = [
            (block, self.state[block.key], groups[self._group_of[block.key]][setting])
            for block in self._blocks
        ]
        for block, state, _ in found:
            move(state, block.key.device)
        return found

    def _update_factors(self) -> None:
        if not self._watch.watch.paused:
            dtype = self.settings["factor_dtype"]
            update_factors(self._with("decay"), self._watch, self._workers, dtype)

    def _update_inverses(self) -> None:
        schedule, inverse = self.settings["update_inverses_every"], self.settings["inverse"]
        wanted = self._with("damping")
        early = not callable(schedule) and self.steps < schedule and not self._watch.watch.paused
        if not (early or due(schedule, self.steps)):
            wanted = [each for each in wanted if INVERSES[inverse][0] not in each[1]]
        update_inverses(wanted, inverse, self._workers)

    def _update(self, group: Mapping[str, Any], own: list[Block]) -> None:
        others = () if self.fallback is None else self.fallback.param_groups
        elsewhere = {p for each in others for p in each["params"]}
        grads: dict[Tensor, Tensor] = {
            p: p.grad for p in group["params"] if p.grad is not None and p not in elsewhere
        }
        needed = INVERSES[self.settings["inverse"]][0]
        ready = [block for block in own if needed in self.state[block.key]]
        natural = natural_gradients(ready, self.state, grads, group)
        taken = {
            parameter: descend(parameter, natural.get(parameter, grad), self.state, group)
            for parameter, grad in grads.items()
        }
        if self.settings["adapt_damping"] is not None:
            change = predicted_change(ready, self.state, grads, taken, group)
            self.predicted = change if self.predicted is None else self.predicted + change
