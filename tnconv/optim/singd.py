"""SINGD: natural gradient descent with structured factors that need no inverse."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tnconv.diagrams.kronecker import Flavour
from tnconv.optim.averages import all_finite
from tnconv.optim.blocks import Block
from tnconv.optim.collection import LossFunction, LossScale
from tnconv.optim.factored import Factored, Fallback, Parameters
from tnconv.optim.inverse_free import (
    NAMES,
    Descent,
    Families,
    StructuredWatch,
    any_state,
    identity_entries,
    projection,
    state_of,
    whitened,
)
from tnconv.optim.memory import size_of
from tnconv.optim.preconditioner import State, divided_by, gathered
from tnconv.optim.running_squares import damped, update_squares
from tnconv.optim.settings import Schedule
from tnconv.optim.stacks import alike, joined
from tnconv.optim.steps import descend
from tnconv.optim.structures import structure
from tnconv.optim.structures.choices import LayerChoice, chosen
from tnconv.quantities.kronecker_factors import Fisher, Reduction

MOMENTA = ("m_K", "m_C")
SUMS = ("input", "grad_output")
Entries = tuple[Tensor, Tensor]
"""What was collected of both factors of a block, as means."""


class SINGD(Factored):
    """``V <- μ V + C Cᵀ G K Kᵀ + γ W``,  ``W <- W - η V``, without inverses.

    G is the gradient of a layer's weight, with its bias as one more column (``joint``), for every
    group a matrix. K Kᵀ and C Cᵀ follow the inverses of its damped Kronecker factors A and B, in
    families of `tnconv.optim.structures`: with ``H = Π(Kᵀ A K)`` and ``H' = Π(Cᵀ B C)``, tr the
    trace over the size, and λ the damping, in steps that ``update_factors_every`` names,

        m_K <- α m_K + 1/2 [tr(H') H + λ tr(CᵀC) Π(KᵀK) - I],  K <- K - β K m_K,

    likewise for C. Both start at the identity. With ``kfac_like`` both traces are 1 and α is 0:
    then ``K Kᵀ`` follows ``(A + λ I)⁻¹`` to first order in β. Nothing is inverted or decomposed, so
    that all of it works in half precision. Source: Lin et al. 2024.

    ``structures`` are those of K and C: names of `tnconv.optim.structures.STRUCTURES`, classes, or
    functions of the size; one for both or a pair; or a mapping to these from names and types of
    layers, with ``"default"`` for all others:

    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    >>> rule = lambda size: "dense" if size <= 64 else "hierarchical"
    >>> optimizer = SINGD(model, lr=0.05, structures={nn.Linear: (rule, "dense"), "0": "diagonal"})
    >>> nn.functional.cross_entropy(model(torch.rand(8, 1, 8, 8)), torch.arange(8)).backward()
    >>> optimizer.step()
    >>> {name: tuple(optimizer.state[model[0].weight][name].shape) for name in ("K", "C")}
    {'K': (1, 10), 'C': (1, 4)}

    What is watched, which passes count, all other parameters, ``fallback``, workers, saving and
    copying are as in `tnconv.optim.KFAC`. Of every factor only the entries that its structure has
    are collected, and summed over workers.

    Args:
        model: the module that is trained, also compiled or in DistributedDataParallel.
        lr: the learning rate η.
        momentum: μ in [0, 1).
        damping: λ, positive.
        weight_decay: γ, at least 0.
        factor_lr: β, positive, or a function of the step.
        structures: of K and C, see above.
        update_factors_every: the steps that update factors.
        params: parameters, or groups of them, by default all.
        riemannian_momentum: α in [0, 1), by default 0.5, with ``kfac_like`` 0.
        kfac_like: factors follow their own curvature alone.
        normalize_factor_lr: divide β by the largest entry of m where that is above 1, and
            ``1/2`` is ``(1 - α)/2``.
        flavour: how positions count, "expand", "reduce" or "hybrid".
        fisher: the vectors of B, "empirical", "type-2", "mc" or "forward-only".
        samples: vectors per sample for "mc".
        generator: where "mc" draws from.
        loss_fn: the loss that the loop calls, a module if factors are to be collected by its calls.
        reduction: whether a loss without ``loss_fn`` is a "mean" or "sum".
        loss_scale: what the loss was multiplied with before its backward pass.
        joint: a bias is one more column of its weight.
        decoupled: ``W <- (1 - η γ) W`` instead of γ W in V.
        decay: of the running squares of parameters without factors.
        factor_dtype: what K, C and their momenta are stored in, by default the parameter's.
        momentum_dtype: what V is stored in, by default the parameter's.
        fallback: makes an optimizer of the parameters without factors.
        process_group: the workers that sum factors, by default those of the model's
            DistributedDataParallel; "local" for none.
        strict: whether parameters that were never seen are an error.

    Raises:
        NotImplementedError: sharded parameters, or a loss whose curvature is not known.
        ValueError: a hyper-parameter out of its range, or a model without parameters.
        TypeError: a model that is no module, or a loss that is a class.
    """

    grouped = (
        *("lr", "momentum", "damping", "weight_decay", "decoupled", "factor_lr", "decay"),
        "momentum_dtype",
    )
    own_dtypes = (*NAMES, *MOMENTA, "momentum_buffer", "squares")
    watch_type = StructuredWatch
    _watch: StructuredWatch

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-2,
        momentum: float = 0.9,
        damping: float = 1e-3,
        weight_decay: float = 0.0,
        factor_lr: float | Callable[[int], float] = 1e-2,
        structures: LayerChoice = ("dense", "dense"),
        update_factors_every: Schedule = 10,
        *,
        params: Parameters | None = None,
        riemannian_momentum: float | None = None,
        kfac_like: bool = False,
        normalize_factor_lr: bool = False,
        flavour: Flavour = "reduce",
        fisher: Fisher = "empirical",
        samples: int = 1,
        generator: torch.Generator | None = None,
        loss_fn: LossFunction | None = None,
        reduction: Reduction = "mean",
        loss_scale: LossScale | None = None,
        joint: bool = True,
        decoupled: bool = False,
        decay: float = 0.95,
        factor_dtype: torch.dtype | None = None,
        momentum_dtype: torch.dtype | None = None,
        fallback: Fallback | None = None,
        process_group: "dist.ProcessGroup | Literal['local'] | None" = None,
        strict: bool = False,
    ) -> None:
        settings = {k: v for k, v in locals().items() if k not in ("self", "model", "__class__")}
        if kfac_like and riemannian_momentum:
            raise ValueError(
                f"riemannian_momentum is {riemannian_momentum}; expected 0 with kfac_like"
            )
        self._families: dict[Tensor, Families] = {}
        super().__init__(model, settings)

    @staticmethod
    def _ready(state: State) -> bool:
        return any_state(state)

    @staticmethod
    def _forget(state: State) -> None:
        for name in (*NAMES, *MOMENTA):
            state.pop(name, None)

    def _prepare(self) -> None:
        """Watch the model where the next step updates factors; what is watched may depend on K."""
        before, self._families = self._families, {}
        for block in self._blocks:
            sizes = block.shape[2], block.shape[1]
            known = before.get(block.key)
            if known is None or tuple(family.size for family in known) != sizes:
                layer = self.model.get_submodule(block.name)
                known = self._chosen(layer, block.name, sizes)
            self._families[block.key] = known
            state = self.state[block.key] if block.key in self.state else {}
            if any_state(state) and any(
                state[name].shape != (block.shape[0], family.count)
                for name, family in zip(NAMES, known, strict=True)
            ):
                self._forget(state)
        self._watch.families = self._families
        self._watch.members = {
            block.key: (self.state[block.key]["K"], self.state[block.key]["C"])
            for block in self._blocks
            if block.key in self.state and any_state(self.state[block.key])
        }
        super()._prepare()

    def _chosen(self, layer: nn.Module, name: str, sizes: tuple[int, int]) -> Families:
        first, second = chosen(self.settings["structures"], name, layer)
        return structure(first, sizes[0]), structure(second, sizes[1])

    def _factor_sizes(self, block: Block) -> dict[str, int]:
        dtype, alpha = self.settings["factor_dtype"] or block.key.dtype, self._momentum
        found = dict[str, int]()
        for name, family in zip(NAMES, self._families[block.key], strict=True):
            for kind in (name, f"m_{name}") if alpha else (name,):
                found[kind] = size_of(block.shape[0] * family.count, dtype)
        return found

    @property
    def _momentum(self) -> float:
        """α."""
        given = self.settings["riemannian_momentum"]
        default = 0.0 if self.settings["kfac_like"] else 0.5
        return default if given is None else float(given)

    def _zeros(self, block: Block) -> dict[str, Tensor]:
        """What a worker adds that did not see a block, in the order of what others do."""
        groups, (first, second) = block.shape[0], self._families[block.key]
        dtype = torch.promote_types(block.key.dtype, torch.float32)
        shapes = {"count": (), "input": (groups, first.count)}
        shapes |= {"grad_output": (groups, second.count)}
        return {n: block.key.new_zeros(shape, dtype=dtype) for n, shape in shapes.items()}

    def _update_curvature(self) -> None:
        """Factors, where they are due."""
        watch, workers = self._watch, self._workers
        if watch.watch.paused:
            return
        new = gathered(self._blocks, watch, workers, self._zeros)
        total = divided_by(new.total, watch, workers)
        self._note_divisor(new.total)
        finite = all_finite([sums[name] for sums in new.sums.values() for name in SUMS])
        left_out, entries = list[Block](), dict[Block, Entries]()
        for at, (block, sums) in enumerate(new.sums.items()):
            if all(finite[2 * at : 2 * at + 2]):
                entries[block] = sums["input"] / sums["count"], sums["grad_output"] / total
            else:
                left_out.append(block)
        for some in self._alike(entries):
            self._follow(some, [entries[block] for block in some])
        self._say(left_out)

    def _alike(self, blocks: Iterable[Block]) -> list[list[Block]]:
        """Blocks that take the same steps with matrices of the same families."""

        def kind(block: Block) -> tuple[Hashable, int]:
            own, families = block.key, self._families[block.key]
            largest = max(families[0].size * families[1].size, *(f.count for f in families))
            found = self._group_of[own], own.dtype, own.device, families
            return found, block.shape[0] * largest

        return alike(blocks, kind)

    def _follow(self, blocks: Sequence[Block], entries: Sequence[Entries]) -> None:
        """One update of the factors of blocks that are `_alike`."""
        families = self._families[blocks[0].key]
        descent = self._descent(self.param_groups[self._group_of[blocks[0].key]])
        states, groups = [self.state[b.key] for b in blocks], [b.shape[0] for b in blocks]
        dtype = self.settings["factor_dtype"]
        for block, state in zip(blocks, states, strict=True):
            for name, family in zip(NAMES, families, strict=True):
                if name not in state:
                    state[name] = state_of(family, block.shape[0], block.key, dtype)
                    if descent.momentum:
                        state[f"m_{name}"] = torch.zeros_like(state[name])
        given = [joined(each) for each in zip(*entries, strict=True)]
        members = [joined([s[name] for s in states]).to(given[0]) for name in NAMES]
        momenta = [torch.zeros(())] * len(NAMES)
        if descent.momentum:
            momenta = [joined([s[m] for s in states]).to(given[0]) for m in MOMENTA]
        if self.settings["fisher"] == "forward-only":
            given[1] = identity_entries(families[1], members[1])
        found = list(map(projection, families, members, given))
        stepped, momenta = descent.step(families, members, momenta, found)
        new = dict(zip((*NAMES, *MOMENTA), (*stepped, *momenta), strict=True))
        for name in (*NAMES, *(MOMENTA if descent.momentum else ())):
            for state, own in zip(states, torch.split(new[name], groups), strict=True):
                state[name] = own.to(state[name].dtype, copy=len(blocks) > 1)

    def _descent(self, group: Mapping[str, Any]) -> Descent:
        rate, settings = group["factor_lr"], self.settings
        return Descent(
            group["damping"],
            rate if rate is not None else settings["factor_lr"](self.steps),
            self._momentum,
            settings["kfac_like"],
            settings["normalize_factor_lr"],
        )

    def _update(self, group: Mapping[str, Any], own: list[Block]) -> None:
        elsewhere = self._elsewhere()
        grads: dict[Tensor, Tensor] = {
            p: p.grad for p in group["params"] if p.grad is not None and p not in elsewhere
        }
        natural = dict[Tensor, Tensor]()
        ready = [b for b in own if any(p in grads for p in b.parameters)]
        for some in self._alike(b for b in ready if any_state(self.state[b.key])):
            states = [self.state[block.key] for block in some]
            members = [joined([state[name] for state in states]) for name in NAMES]
            rows = joined([block.rows(grads) for block in some])
            found = whitened(rows, self._families[some[0].key], members)
            for block, part in zip(
                some, torch.split(found, [b.shape[0] for b in some]), strict=True
            ):
                natural |= {p: v for p, v in block.tensors(part).items() if p in grads}
        others = {p: g for p, g in grads.items() if p not in natural}
        if group["divisor"] is not None:
            update_squares(others, self.state, group["decay"], group["divisor"])
        states = [self.state[p] for p in others]
        each = damped([*others.values()], states, group["damping"])
        natural |= dict(zip(others, each, strict=True))
        descend([*natural], [*natural.values()], self.state, group)
