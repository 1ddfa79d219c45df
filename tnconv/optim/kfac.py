"""KFAC: gradient descent preconditioned by Kronecker-factored curvature."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tnconv.diagrams.kronecker import Flavour
from tnconv.optim.blocked import kept_entries, padded_size
from tnconv.optim.blocks import Block
from tnconv.optim.collection import LossFunction, LossScale
from tnconv.optim.factored import Factored, Fallback, Parameters
from tnconv.optim.factored_damping import adapted
from tnconv.optim.inverses import wide
from tnconv.optim.memory import size_of
from tnconv.optim.preconditioner import (
    FACTORS,
    INVERSES,
    Inverse,
    State,
    bases,
    forget,
    fresh_moments,
    measured,
    move,
    update_factors,
    update_inverses,
    update_moments,
)
from tnconv.optim.running_squares import update_squares
from tnconv.optim.settings import GROUPED, Schedule, due
from tnconv.optim.steps import descend, natural_gradients, predicted_change, scaled, trust
from tnconv.quantities.kronecker_factors import Fisher, Reduction


class KFAC(Factored):
    """``V <- μ V + ν P(G) + γ W``,  ``W <- W - η V``  with ``P(G) ≈ (B ⊗ A + λ I)⁻¹ G``.

    G is the gradient of a layer's weight W, with its bias as one more column (``joint``), for every
    group a matrix; A and B are running averages (decay β) of the layer's Kronecker factors, as in
    `tnconv.quantities.KFAC` with the same ``flavour``, ``fisher``, ``samples``, ``generator``,
    ``per_group`` and ``reduction``. The trust region ``ν = min(1, √(κ / (η₀² Σ ⟨G, P(G)⟩)))``
    bounds the natural gradient in the curvature's own norm: a step with the learning rate η₀ = 0.1
    by κ, and others in proportion to their rate. η is ``lr``, μ ``momentum``, λ ``damping``, γ
    ``weight_decay`` (``decoupled``: ``W <- (1 - η γ) W`` instead), κ ``kl_clip`` (``math.inf``: no
    bound). Groups of parameters, given as ``params``, can have their own.

    * Linear and (transposed) convolutional layers are preconditioned. All other parameters have
      natural gradients of their own, over the running squares of their gradients (`diagonal`), or
      the optimizer that ``fallback`` makes of them trains them: `fallback` then holds it. `summary`
      says which are which. Parameters that get gradients, but whose layers were never seen, are
      named in one warning, or with ``strict`` in an error, at the first step that needs factors.
    * Factors are of the passes whose gradients a step uses: those of which ``loss.backward()``
      added to ``grad``, as long as that is not dropped. What cannot be told apart, runs in
      `paused`.
    * ``fisher="empirical"`` and ``"forward-only"`` need nothing but ``loss.backward()``. For "mc"
      and "type-2" give the ``loss_fn`` that the loop calls, a module; for a function, call
      `propagate` before ``loss.backward()``. Losses must not change scale afterwards, but for
      "empirical", which can be told a ``loss_scale`` such as ``GradScaler.get_scale``, and which
      takes a mean for one over samples unless ``loss_fn`` tells what it divides by.
    * ``inverse="cholesky"`` damps the factors apart (`damping.factored`), "eigen" their product
      exactly, and "ekfac" corrects its eigenvalues whenever it collects factors (`ekfac`); where it
      finds a new eigenbasis, it holds layers' inputs and output gradients until the step. After
      `adapt` the damping follows how well the model of a step predicts the loss.
    * Factors are collected, and running squares updated, in steps that ``update_factors_every``
      names, from layers in training mode; inverses are refreshed at ``update_inverses_every``-th
      steps, and at those of the first so many that collect factors. Both are a number, or a
      function of the step that says whether. Factors that are not finite, or a thousand times the
      running ones, are left out.
    * Factors with more than ``max_factor`` rows have diagonal blocks only, of at most that size;
      layers with more than four times as many rows are preconditioned like other parameters.
    * Passes between two steps count as micro-batches of one batch; their losses are to be divided
      by their number. Passes under ``torch.func`` are not watched; compiled graphs break at layers.
    * Under DistributedDataParallel, or with a ``process_group``, factors are averages over workers,
      who share the inversions; every worker takes every step.
    * ``state_dict`` holds plain tensors and numbers; what was collected since the last step belongs
      to gradients, and is no more part of it than they are. Copies of the model carry hooks that do
      nothing (`remove_hooks`); a deep copy of the optimizer has a model of its own.

    Args:
        model: the module that is trained, also compiled or in DistributedDataParallel.
        lr: the learning rate η.
        momentum: μ in [0, 1).
        damping: λ, positive.
        decay: β in [0, 1), of all running averages.
        weight_decay: γ, at least 0.
        flavour: how positions count, "expand", "reduce" or "hybrid".
        kl_clip: κ, positive; no bound where it is infinite.
        update_factors_every: the steps that collect factors.
        update_inverses_every: the steps that refresh inverses.
        params: parameters, or groups of them, by default all.
        fisher: the vectors of B, "empirical", "type-2", "mc" or "forward-only".
        samples: vectors per sample for "mc".
        generator: where "mc" draws from.
        loss_fn: the loss that the loop calls, a module if factors are to be collected by its calls.
        reduction: whether a loss without ``loss_fn`` is a "mean" or "sum".
        loss_scale: what the loss was multiplied with before its backward pass.
        joint: a bias is one more column of its weight.
        per_group: groups of a convolution have factors of their own.
        inverse: "cholesky", "eigen" or "ekfac".
        decoupled: weight decay without the preconditioner's learning rate.
        adapt_damping: the factor of `adapt`, in (0, 1).
        factor_dtype: what running averages are stored in, by default float32 or wider.
        fallback: makes an optimizer of the parameters without factors.
        process_group: the workers that average factors, by default those of the model's
            DistributedDataParallel; "local" for none.
        max_factor: the most rows of a factor that is not split.
        strict: whether parameters that were never seen are an error.

    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    >>> loss_fn, labels = nn.CrossEntropyLoss(), torch.randint(10, (8,))
    >>> optimizer = KFAC(model, lr=0.05, damping=1e-2, fisher="mc", loss_fn=loss_fn)
    >>> loss_fn(model(torch.rand(8, 1, 8, 8)), labels).backward()
    >>> optimizer.step()
    >>> {name: tuple(a.shape) for name, a in optimizer.state[model[0].weight].items() if name < "a"}
    {'A': (1, 10, 10), 'B': (1, 4, 4), 'A_inverse': (1, 10, 10), 'B_inverse': (1, 4, 4)}
    >>> print(optimizer.summary())
    0.weight: Kronecker factors, by layer '0'
    0.bias: Kronecker factors, by layer '0'
    3.weight: Kronecker factors, by layer '3'
    3.bias: Kronecker factors, by layer '3'

    Raises:
        NotImplementedError: sharded parameters, or a loss whose curvature is not known.
        ValueError: a hyper-parameter out of its range, or a model without parameters.
        TypeError: a model that is no module, or a loss that is a class.
    """

    grouped = GROUPED
    own_dtypes = FACTORS

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
        process_group: "dist.ProcessGroup | Literal['local'] | None" = None,
        max_factor: int = 2048,
        strict: bool = False,
    ) -> None:
        settings = {k: v for k, v in locals().items() if k not in ("self", "model", "__class__")}
        self.predicted: Tensor | None = None
        super().__init__(model, settings)
        self._watch.rotates = inverse == "ekfac"

    _forget = staticmethod(forget)

    @staticmethod
    def _ready(state: State) -> bool:
        return any(name.startswith("A") for name in state)

    def _factor_sizes(self, block: Block) -> dict[str, int]:
        groups, d, a = block.shape
        groups = groups if self.settings["per_group"] else 1
        wider, most = wide(block.key), self.settings["max_factor"]
        kept = self.settings["factor_dtype"] or wider
        counts = {name: groups * kept_entries(n, most) for name, n in (("A", a), ("B", d))}
        found = {name: size_of(count, kept) for name, count in counts.items()}
        for name in INVERSES[self.settings["inverse"]][:2]:
            found[name] = size_of(counts[name[0]], wider)
        if self.settings["inverse"] != "cholesky":
            padded = groups * padded_size(d, most) * padded_size(a, most)
            found["eigenvalues"] = size_of(padded, wider)
            if self.settings["inverse"] == "ekfac":
                found["moments"] = size_of(padded, kept)
        return found

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

    def _prepare(self) -> None:
        """Watch the model where the next step updates factors."""
        if self.settings["inverse"] == "ekfac":
            self._watch.bases = bases(self._blocks, self.state)
            self._watch.keep = self._refreshes
        super()._prepare()

    @property
    def _refreshes(self) -> bool:
        schedule = self.settings["update_inverses_every"]
        early = not callable(schedule) and self.steps < schedule and self._collects
        return early or due(schedule, self.steps)

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

    def _update_curvature(self) -> None:
        """Factors, inverses and moments, where they are due."""
        self.predicted = None
        watch, workers, inverse = self._watch, self._workers, self.settings["inverse"]
        collects, dtype = not watch.watch.paused, self.settings["factor_dtype"]
        left_out: list[Block] = []
        if collects:
            new = measured(self._blocks, watch, workers, self.settings["max_factor"])
            self._note_divisor(new.total)
            left_out = update_factors(self._with("decay"), new.factors, dtype)
            self._say(left_out)
        needed, wanted = INVERSES[inverse][0], self._with("damping")
        wanted = [
            each
            for each in wanted
            if needed not in each[1] or (self._refreshes and each[0] not in left_out)
        ]
        update_inverses(wanted, inverse, workers)
        if collects and inverse == "ekfac":
            fresh = {block for block, state, _ in wanted if needed in state}
            counts = [block for block in new.factors if block not in left_out]
            found = fresh_moments(counts, fresh, new, watch, workers, self.state)
            update_moments(self._with("decay"), found, dtype)

    def _update(self, group: Mapping[str, Any], own: list[Block]) -> None:
        elsewhere = self._elsewhere()
        grads: dict[Tensor, Tensor] = {
            p: p.grad for p in group["params"] if p.grad is not None and p not in elsewhere
        }
        needed = INVERSES[self.settings["inverse"]][0]
        ready = [block for block in own if needed in self.state[block.key]]
        held = {p for block in ready for p in block.parameters}
        if group["divisor"] is not None:
            collects = not self._watch.watch.paused
            others = {
                p: g
                for p, g in grads.items()
                if p not in held and (collects or "squares" not in self.state[p])
            }
            update_squares(others, self.state, group["decay"], group["divisor"])
        natural = natural_gradients(ready, self.state, grads, group)
        directions = scaled([*natural.values()], trust(natural, grads, group))
        steps = descend([*natural], directions, self.state, group)
        taken = dict(zip(natural, steps, strict=True))
        if self.settings["adapt_damping"] is not None:
            change = predicted_change(ready, self.state, grads, taken, group)
            self.predicted = change if self.predicted is None else self.predicted + change
