"""Optimizers of models whose layers' Kronecker factors are watched while a training loop runs.

What becomes of the factors is up to the kind of optimizer: `Factored` finds the blocks of
parameters, collects, takes part with other workers, says what is preconditioned how, and saves.
"""

import sys
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, overload

import torch
from torch import Tensor, nn

from tnconv.diagrams.notices import warn
from tnconv.given import instances, optional
from tnconv.losses.roots import recognised
from tnconv.models.modules import weak
from tnconv.optim.blocks import Block, blocks
from tnconv.optim.collection import FactorWatch
from tnconv.optim.inverses import wide
from tnconv.optim.memory import Memory, size
from tnconv.optim.preconditioner import State
from tnconv.optim.running_squares import NAMES
from tnconv.optim.saving import Resumable
from tnconv.optim.settings import check, due, refuse_sharded
from tnconv.optim.standing import Standing, message, standings
from tnconv.optim.workers import Workers
from tnconv.quantities.kronecker_factors import KFAC

Fallback = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
Parameters = Iterable[nn.Parameter] | Iterable[dict[str, Any]]


class Factored(Resumable):
    """The frame of `tnconv.optim.KFAC` and `SINGD`: blocks, watching, steps, other workers, saving.

    Args:
        model: the module that is trained, also compiled or in DistributedDataParallel.
        settings: all hyper-parameters by name.

    Raises:
        NotImplementedError: sharded parameters, or a loss whose curvature is not known.
        ValueError: a hyper-parameter out of its range, or a model without parameters.
        TypeError: a model that is no module, or a loss that is a class.
    """

    grouped: ClassVar[tuple[str, ...]]
    """Hyper-parameters that groups of parameters can have for themselves."""
    watch_type: ClassVar[type[FactorWatch]] = FactorWatch

    def __init__(self, model: nn.Module, settings: Mapping[str, Any]) -> None:
        loss_fn, params = settings["loss_fn"], settings["params"]
        instances(model=model, **optional(loss_fn=loss_fn))
        check(settings)
        names = "flavour", "fisher", "samples", "generator", "joint", "per_group", "reduction"
        kfac = KFAC(**{name: settings[name] for name in names if name in settings})
        if kfac.fisher in ("type-2", "mc") and loss_fn is not None:
            recognised(loss_fn)
        refuse_sharded(model, type(self).__name__)
        self.model, self.settings, self.fallback = model, dict(settings) | {"params": None}, None
        self._blocks: list[Block] = []
        self._large: list[Block] = []
        self._told = set[str]()
        watched = model, kfac, loss_fn, settings["loss_scale"], weak(self._arrange)
        self._watch = self.watch_type(*watched)
        self._workers = Workers(settings["process_group"], model, weak(self._take_part))
        defaults = {name: settings[name] for name in self.grouped} | {"steps": 0, "divisor": None}
        defaults |= {name: None for name, value in defaults.items() if callable(value)}
        super().__init__(model.parameters() if params is None else params, defaults)
        self._arrange()
        others = self._others()
        if settings["fallback"] is not None and others:
            self.fallback = settings["fallback"](others)

    @abstractmethod
    def _update_curvature(self) -> None:
        """Collect what the passes since the last step have shown, where that is due."""

    @abstractmethod
    def _update(self, group: Mapping[str, Any], own: list[Block]) -> None:
        """A step of the parameters of a group, those in its own blocks included."""

    @staticmethod
    @abstractmethod
    def _ready(state: State) -> bool:
        """Whether the state of a block's key has factors."""

    @staticmethod
    @abstractmethod
    def _forget(state: State) -> None:
        """Drop the factors in a parameter's state."""

    def _prepare(self) -> None:
        """Watch the model where the next step updates factors."""
        self._watch.watch.paused = not self._collects

    @property
    def _collects(self) -> bool:
        return due(self.settings["update_factors_every"], self.steps)

    @property
    def _most(self) -> int:
        """Rows of the largest factor that is not split; layers of four times as many have none."""
        return int(self.settings.get("max_factor", sys.maxsize // 4))

    def reset_factors(self) -> None:
        """Forget all factors, squares, and what was made of them, as if no step had been taken."""
        for state in self.state.values():
            self._forget(state)
            for name in NAMES:
                state.pop(name, None)
        self._watch.clear()
        self._prepare()

    @property
    def steps(self) -> int:
        """How many steps were taken."""
        return int(self.param_groups[0]["steps"])

    def remove_hooks(self) -> None:
        """Stop watching the model; later steps use the factors collected so far."""
        self._watch.stop()
        self._workers.leave()

    def propagate(self, output: Tensor, targets: Any) -> None:
        """Collect factors for a loss ``loss_fn(output, targets)`` that is no module's call."""
        self._watch.propagate(output, targets)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Passes that factors do not see, whatever becomes of their gradients.

        >>> model = nn.Linear(3, 2)
        >>> from tnconv.optim import KFAC
        >>> optimizer = KFAC(model)
        >>> with optimizer.paused():
        ...     model(torch.rand(4, 3)).sum().backward()
        """
        self._watch.watch.muted += 1
        try:
            yield
        finally:
            self._watch.watch.muted -= 1

    def standings(self) -> list[Standing]:
        """How each parameter is preconditioned, by which layer, or by which fallback and why."""
        elsewhere = self._elsewhere()
        found = [*self._blocks, *self._large]
        seen = {b.key for b in found if self._ready(self.state[b.key])}
        return standings(self.model, found, seen, self._group_of, elsewhere, self._most)

    def memory(self) -> Memory:
        """How many bytes the state has of each parameter, by kind, once all were trained.

        Factors of several parameters are counted for their weight; a fallback's state is not known
        before its first step, and not counted.
        """
        elsewhere, sizes = self._elsewhere(), dict[Tensor, dict[str, int]]()
        blocks = {p: block for block in self._blocks for p in block.parameters}
        for group in self.param_groups:
            for p in group["params"]:
                if not p.requires_grad or p in elsewhere:
                    sizes[p] = {}
                    continue
                kept: dict[str, int] = {}
                if p not in blocks:
                    kept["squares"] = size(p, wide(p)) + 8  # with the number of outliers in a row
                elif blocks[p].key is p:
                    kept |= self._factor_sizes(blocks[p])
                if group["momentum"]:
                    kept["momentum_buffer"] = size(p, group.get("momentum_dtype"))
                sizes[p] = kept
        named = {n: p for n, p in self.model.named_parameters() if p in sizes}
        return Memory(
            {n: size(p) for n, p in named.items()}, {n: sizes[p] for n, p in named.items()}
        )

    @abstractmethod
    def _factor_sizes(self, block: Block) -> dict[str, int]:
        """The bytes of a block's factors, by kind."""

    def summary(self) -> str:
        """`standings` in words, a line for each parameter."""
        return "\n".join(map(str, self.standings()))

    def __repr__(self) -> str:
        counts: dict[str, int] = {}
        for each in self.standings():
            counts[each.how] = counts.get(each.how, 0) + 1
        words = ", ".join(f"{count} by {how}" for how, count in counts.items())
        return f"{super().__repr__()}\n(parameters: {words})"

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients, and the factors that were collected from them since the last step."""
        self._watch.clear()
        self._look_for_changes()
        super().zero_grad(set_to_none)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update factors and inverses where they are due, then all parameters with a gradient.

        Raises:
            RuntimeError: factors are due whose loss was not seen, or with ``strict`` whose layers
                were not.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._look_for_changes()
        self._update_curvature()
        for at, group in enumerate(self.param_groups):
            self._update(group, [b for b in self._blocks if self._group_of[b.key] == at])
            group["steps"] += 1
        if self.fallback is not None:
            self.fallback.step()
        self._watch.forget()
        self._prepare()
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train more of the model's parameters."""
        super().add_param_group(param_group)
        check({name: self.param_groups[-1][name] for name in self.grouped})
        self._arrange()

    def _elsewhere(self) -> set[Tensor]:
        """The parameters that the fallback trains."""
        groups = () if self.fallback is None else self.fallback.param_groups
        return {p for each in groups for p in each["params"]}

    def _others(self) -> list[nn.Parameter]:
        """Those that learn, without factors, and that the fallback does not have so far."""
        held = {p for block in self._blocks for p in block.parameters} | self._elsewhere()
        every = (p for group in self.param_groups for p in group["params"])
        return [p for p in every if p.requires_grad and p not in held]

    def _signature(self) -> tuple[tuple[int, bool], ...]:
        every = (p for group in self.param_groups for p in group["params"])
        return tuple((id(p), p.requires_grad) for p in every)

    def _look_for_changes(self) -> None:
        """Parameters may have been frozen, unfrozen or replaced since the last look."""
        if self._signature() != self._arranged:
            refuse_sharded(self.model, type(self).__name__)
            self._arrange()

    def _arrange(self) -> None:
        """Find the blocks of the parameters in all groups."""
        group_of = {p: at for at, group in enumerate(self.param_groups) for p in group["params"]}
        most, elsewhere = self._most, self._elsewhere()
        found = blocks(self.model, group_of, self.settings["joint"])
        found = [block for block in found if elsewhere.isdisjoint(block.parameters)]
        self._blocks = [block for block in found if block.pieces(4 * most) == 1]
        self._large = [block for block in found if block.pieces(4 * most) > 1]
        self._group_of, self._arranged = group_of, self._signature()
        self._watch.look_at(
            {block.key: block.weight is not None and block.bias is not None
             for block in self._blocks}
        )  # fmt: skip
        self._prepare()
        if self.fallback is not None and (others := self._others()):
            self.fallback.add_param_group({"params": others})

    def _resume(self) -> None:
        """A state was loaded."""
        self._watch.clear()
        self._prepare()

    @torch.no_grad()
    def _take_part(self) -> None:
        """A step of the other workers, with nothing to add."""
        self._watch.forget()
        self._update_curvature()
        for group in self.param_groups:
            group["steps"] += 1
        self._prepare()

    def _note_divisor(self, total: float) -> None:
        """Keep what a mean divides by, for the running squares of other parameters."""
        for group in self.param_groups:
            if total or group["divisor"] is None:
                group["divisor"] = (total or 1.0) if self._watch.averages else 1.0

    def _say(self, left_out: list[Block]) -> None:
        """Tell what has no factors, once.

        Raises:
            RuntimeError: parameters that were not seen, with ``strict``.
        """
        if left_out and "outliers" not in self._told:
            self._told.add("outliers")
            names = ", ".join(repr(block.name) for block in left_out)
            warn(
                f"{type(self).__name__} left out the factors of layers {names} "
                f"at step {self.steps}: they are not finite, or far from their running averages"
            )
        if self._workers.unclear and "workers" not in self._told:
            self._told.add("workers")
            warn(
                "torch.distributed is initialised, but no DistributedDataParallel runs this model: "
                f"{type(self).__name__}'s factors are of this process alone; give process_group to "
                "average them over workers, or process_group='local'"
            )
        missing = {b.name for b in self._blocks if not self._ready(self.state[b.key])} - self._told
        if (not missing and "looked" in self._told) or left_out:
            return
        self._told |= {"looked", *missing}
        if (text := message(self.model, self.standings(), type(self).__name__)) is not None:
            if self.settings["strict"]:
                raise RuntimeError(text)
            warn(text)
