"""Shampoo without inverses and roots: one structured factor for each axis of a parameter."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, overload

import torch
from torch import Tensor, nn

from tnconv.given import instances
from tnconv.models.modules import refuse_complex
from tnconv.optim.averages import all_finite
from tnconv.optim.axes import Axes, Kernels, axes
from tnconv.optim.batch_sizes import BatchSize, Samples
from tnconv.optim.factored import Parameters
from tnconv.optim.inverse_free import state_of
from tnconv.optim.memory import Memory, size, size_of
from tnconv.optim.saving import Resumable
from tnconv.optim.settings import Schedule, check, due, refuse_sharded
from tnconv.optim.stacks import alike, joined
from tnconv.optim.steps import descend
from tnconv.optim.structures import Choice, Structure, structure

AxisChoice = Choice | Mapping[Any, Choice | Sequence[Choice]]
Block = tuple[tuple[slice, ...], tuple[Structure, ...]]
"""Where a block of a parameter is, and the families of its axes."""


@dataclass(frozen=True, eq=False)
class Piece:
    """A block of a parameter: the at-th, and where it is."""

    weight: nn.Parameter
    at: int
    place: tuple[slice, ...]
    families: tuple[Structure, ...]

    @property
    def names(self) -> list[str]:
        """The factors' in the parameter's state."""
        return [f"K{n}.{self.at}" if self.at else f"K{n}" for n in range(len(self.families))]


class RFShampoo(Resumable):
    """``V <- μ V + G ×₁ K₁K₁ᵀ ... ×_N K_NK_Nᵀ + γ W``,  ``W <- W - η V``.

    G is the gradient of a parameter with N axes of sizes d, G' the one that is whitened by all
    factors, ``G ×₁ K₁ᵀ ... ×_N K_Nᵀ``, and B the batch size. With Π the projection on the family
    that axis n has, tr the trace over the size, and λ the damping, each factor follows

        s = 1/2 [B/∏' d Π(G'₍ₙ₎ G'₍ₙ₎ᵀ) + λ ∏' tr(KᵀK) Π(KₙᵀKₙ) - I],
        m <- α m + (1 - α) s,  Kₙ <- Kₙ (I - β m / max(1, ‖m‖)),

    where ∏' is over all other axes, from the identity. Source: Lin et al. 2024, "Can we remove the
    square root in adaptive gradient methods?", section 4.

    For ``Sₙ = (KₙKₙᵀ)⁻¹`` this is to first order in β, without damping, momentum and bound,
    ``Sₙ <- (1 - β) Sₙ + β B/∏' d G₍ₙ₎ (⊗' S)⁻¹ G₍ₙ₎ᵀ``: the update that is published as KL-Shampoo
    (Lin et al. 2025, arXiv 2509.03378). With ``whitened=False`` the statistic is Shampoo's own,
    ``B/∏' d Π(KₙᵀG₍ₙ₎G₍ₙ₎ᵀKₙ) + λ Π(KₙᵀKₙ)``: each factor then follows the inverse of its own.

    Needed are nothing but gradients, so that every architecture is trained. ``structures`` are as
    in `SINGD`: a choice for all axes, or a mapping from names of parameters, types of layers,
    numbers of axes, or ``"default"`` to one, or to one for each axis. Embeddings have one axis,
    with a diagonal factor unless their name or type is chosen.

    Args:
        model: the module that is trained.
        lr: the learning rate η.
        momentum: μ in [0, 1).
        damping: λ, positive.
        weight_decay: γ, at least 0.
        factor_lr: β, positive, or a function of the step.
        structures: of the factors, see above.
        update_factors_every: the steps that update factors.
        params: parameters, or groups of them, by default all.
        batch_size: B, a number, a callable or a model, by default the model: its samples are
            counted; 1 for losses that are sums.
        riemannian_momentum: α in [0, 1).
        whitened: whether a factor's statistic is whitened by all others.
        kernels: kernels as a "tensor", with a factor for every axis, or as a "matrix".
        joint: a bias is one more column of a weight that is a matrix.
        max_size: larger axes are split into blocks with factors of their own.
        merge: neighbouring axes whose sizes multiply to at most this are one.
        decoupled: ``W <- (1 - η γ) W`` instead of γ W in V.
        factor_dtype: what factors and their momenta are stored in, by default the parameter's.
        momentum_dtype: what V is stored in, by default the parameter's.

    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    >>> optimizer = RFShampoo(model, lr=0.05, structures={3: "dense", "default": "diagonal"})
    >>> nn.functional.cross_entropy(model(torch.rand(8, 1, 8, 8)), torch.arange(8)).backward()
    >>> optimizer.step()
    >>> [tuple(optimizer.state[model[0].weight][name].shape) for name in ("K0", "K1", "K2")]
    [(1, 16), (1, 9), (1, 9)]

    Raises:
        NotImplementedError: complex or sharded parameters.
        ValueError: a hyper-parameter out of its range, or a choice that there is not.
        TypeError: a model that is no module.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        momentum: float = 0.9,
        damping: float = 1e-3,
        weight_decay: float = 0.0,
        factor_lr: float | Callable[[int], float] = 1e-2,
        structures: AxisChoice = "dense",
        update_factors_every: Schedule = 1,
        *,
        params: Parameters | None = None,
        batch_size: BatchSize | None = None,
        riemannian_momentum: float = 0.5,
        whitened: bool = True,
        kernels: Kernels = "tensor",
        joint: bool = True,
        max_size: int = 2048,
        merge: int = 1,
        decoupled: bool = False,
        factor_dtype: torch.dtype | None = None,
        momentum_dtype: torch.dtype | None = None,
    ) -> None:
        settings = {k: v for k, v in locals().items() if k not in ("self", "model", "__class__")}
        settings["batch_size"] = None if batch_size is model else batch_size
        instances(model=model)
        check(settings)
        refuse_sharded(model, "RFShampoo")
        self.model, self.settings, self.fallback = model, settings | {"params": None}, None
        self._samples = Samples(model if batch_size is None else batch_size)
        self._read: dict[Tensor, tuple[Axes, list[Block]]] = {}
        self._arranged: tuple[object, ...] = ()
        names = ("lr", "momentum", "damping", "weight_decay", "factor_lr", "decoupled")
        defaults = {name: settings[name] for name in (*names, "momentum_dtype")} | {"steps": 0}
        defaults["factor_lr"] = None if callable(factor_lr) else factor_lr
        super().__init__(model.parameters() if params is None else params, defaults)
        self._arrange()

    @property
    def steps(self) -> int:
        """How many steps were taken."""
        return int(self.param_groups[0]["steps"])

    def memory(self) -> Memory:
        """How many bytes the state has of each parameter, by kind, once all were trained."""
        sizes: dict[Tensor, dict[str, int]] = {}
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.requires_grad):
                sizes[p] = {}
                if p in self._read:
                    dtype, (_, blocks) = self.settings["factor_dtype"] or p.dtype, self._read[p]
                    count = sum(family.count for _, each in blocks for family in each)
                    sizes[p]["K"] = size_of(count, dtype)
                    if self.settings["riemannian_momentum"]:
                        sizes[p]["m_K"] = size_of(count, dtype)
                if group["momentum"]:
                    sizes[p]["momentum_buffer"] = size(p, group["momentum_dtype"])
        named = {n: p for n, p in self.model.named_parameters() if p in sizes}
        return Memory(
            {n: size(p) for n, p in named.items()}, {n: sizes[p] for n, p in named.items()}
        )

    def remove_hooks(self) -> None:
        """Stop counting the model's samples."""
        self._samples.stop()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients; samples whose gradients no step has used count no longer."""
        self._samples.drop_unused()
        super().zero_grad(set_to_none)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update factors where they are due, then all parameters with a gradient.

        Raises:
            RuntimeError: factors are due, but no samples were counted.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._arrange()
        samples, finite = None, dict[Tensor, bool]()
        if due(self.settings["update_factors_every"], self.steps):
            samples, finite = self._samples.take(), self._finite()
        else:
            self._samples.forget()
        for group in self.param_groups:
            self._update(group, samples, finite)
            group["steps"] += 1
        return loss

    def _resume(self) -> None:
        self._samples.forget()

    def _finite(self) -> dict[Tensor, bool]:
        """Whether gradients can be learned from, in one message from the device."""
        grads = {
            p: p.grad for group in self.param_groups for p in group["params"] if p.grad is not None
        }
        return dict(zip(grads, all_finite([*grads.values()]), strict=True))

    def _arrange(self) -> None:
        """Find how parameters are read; they may have been frozen or replaced since the last look.

        Raises:
            ValueError: a weight and its bias in different groups.
        """
        every = [p for group in self.param_groups for p in group["params"]]
        now = tuple((id(p), p.requires_grad) for p in every)
        if now == self._arranged:
            return
        refuse_complex((n, p) for n, p in self.model.named_parameters() if p in set(every))
        s, self._read, self._arranged = self.settings, {}, now
        group_of = {p: at for at, group in enumerate(self.param_groups) for p in group["params"]}
        how = s["kernels"], s["joint"], s["max_size"], s["merge"]
        for read in axes(self.model, every, *how):
            if len({group_of[p] for p in read.parameters}) > 1:
                raise ValueError(
                    f"weight and bias of {read.name!r} are in different groups; expected one "
                    "group, or joint=False"
                )
            sizes = [tuple(part.stop - part.start for part in place) for place in read.blocks]
            families = [self._families(read, each) for each in sizes]
            self._read[read.weight] = read, list(zip(read.blocks, families, strict=True))

    def _families(self, read: Axes, sizes: tuple[int, ...]) -> tuple[Structure, ...]:
        choices: Any = self.settings["structures"]
        if isinstance(choices, Mapping):
            embeds = isinstance(read.layer, nn.Embedding | nn.EmbeddingBag)
            keys: list[Any] = [read.name, *type(read.layer).__mro__]
            keys += [] if embeds else [len(sizes), "default"]
            key = next((each for each in keys if each in choices), None)
            if key is None and not embeds:
                raise ValueError(
                    f"structures has no choice for {read.name!r} with {len(sizes)} axes; add "
                    "'default'"
                )
            choices = "diagonal" if key is None else choices[key]
        elif isinstance(read.layer, nn.Embedding | nn.EmbeddingBag):
            choices = "diagonal"
        each = list(choices) if isinstance(choices, tuple | list) else [choices] * len(sizes)
        if len(each) != len(sizes):
            raise ValueError(
                f"structures are {len(each)} for {read.name!r}; expected one for each of its "
                f"{len(sizes)} axes"
            )
        return tuple(structure(choice, size) for choice, size in zip(each, sizes, strict=True))

    def _update(
        self,
        group: Mapping[str, Any],
        samples: float | None,  # None where factors stay
        finite: Mapping[Tensor, bool],
    ) -> None:
        """The factors and the step of a group."""
        grads: dict[Tensor, Tensor] = {p: p.grad for p in group["params"] if p.grad is not None}
        every = {p: self._read[p][0] for p in group["params"] if p in self._read}
        read = {w: axes for w, axes in every.items() if any(p in grads for p in axes.parameters)}
        tensors = {weight: each.tensor(grads) for weight, each in read.items()}
        learn = {
            weight: samples is not None and all(finite.get(p, True) for p in each.parameters)
            for weight, each in read.items()
        }
        directions = {weight: torch.empty_like(each) for weight, each in tensors.items()}
        pieces = [Piece(w, at, *block) for w in read for at, block in enumerate(self._read[w][1])]

        def kind(piece: Piece) -> tuple[Hashable, int]:
            own, families = piece.weight, piece.families
            largest = max(prod(f.size for f in families), *(f.count for f in families))
            return (own.dtype, own.device, families, learn[own]), largest

        for some in alike(pieces, kind):
            given = joined([tensors[each.weight][each.place].unsqueeze(0) for each in some])
            part = given.to(torch.promote_types(given.dtype, torch.float32))
            members = self._members(some, part.dtype)
            if samples is not None and learn[some[0].weight]:
                members = self._follow(some, members, part, samples, group)
            for n, (family, k) in enumerate(zip(some[0].families, members, strict=True)):
                part = turned(part, n, family.outer, k)
            for each, own in zip(some, part, strict=True):
                directions[each.weight][each.place] = own
        steps = [each.parts(directions[weight]) for weight, each in read.items()]
        found = {p: value for own in steps for p, value in own.items() if p in grads}
        descend([*found], [*found.values()], self.state, group)

    def _members(self, pieces: Sequence[Piece], dtype: torch.dtype) -> list[Tensor]:
        """The factors of all axes, of pieces that are alike: (pieces, count)."""
        for piece in pieces:
            state, own = self.state[piece.weight], piece.weight
            for name, family in zip(piece.names, piece.families, strict=True):
                if name not in state or state[name].shape[-1] != family.count:
                    state[name] = state_of(family, 1, own, self.settings["factor_dtype"])
                    if self.settings["riemannian_momentum"]:
                        state[f"m_{name}"] = torch.zeros_like(state[name])
                if state[name].device != own.device:
                    for each in {name, f"m_{name}"} & state.keys():
                        state[each] = state[each].to(own.device)
        return [self._joined(pieces, n, "", dtype) for n in range(len(pieces[0].families))]

    def _joined(self, pieces: Sequence[Piece], axis: int, kind: str, dtype: torch.dtype) -> Tensor:
        states = [self.state[piece.weight][kind + piece.names[axis]] for piece in pieces]
        return joined(states).to(dtype)

    def _follow(
        self,
        pieces: Sequence[Piece],
        members: Sequence[Tensor],
        grads: Tensor,  # (pieces, *sizes)
        samples: float,
        group: Mapping[str, Any],
    ) -> list[Tensor]:
        """One update of all factors of pieces that are alike, from those before it."""
        families, alpha = pieces[0].families, self.settings["riemannian_momentum"]
        rate = group["factor_lr"]
        rate = self.settings["factor_lr"](self.steps) if rate is None else rate
        slopes = self._slopes(families, members, grads, samples, group["damping"])
        found = []
        for n, (family, k, slope) in enumerate(zip(families, members, slopes, strict=True)):
            m = (1 - alpha) * slope
            if alpha:
                m = m + alpha * self._joined(pieces, n, "m_", k.dtype)
            norm = family.squared_norm(m).sqrt().clamp(min=1).unsqueeze(-1)
            found.append(k - rate / norm * family.product(k, m))
            for at, piece in enumerate(pieces):
                state, name = self.state[piece.weight], piece.names[n]
                for kept, value in ((name, found[-1]), *([(f"m_{name}", m)] if alpha else [])):
                    state[kept] = value[at : at + 1].to(state[kept].dtype, copy=len(pieces) > 1)
        return found

    def _slopes(
        self,
        families: Sequence[Structure],
        members: Sequence[Tensor],
        grads: Tensor,
        samples: float,
        damping: float,
    ) -> list[Tensor]:
        """``s`` of every axis."""
        whitened = self.settings["whitened"]
        given = grads
        if whitened:
            for n, (family, k) in enumerate(zip(families, members, strict=True)):
                given = turned(given, n, family.rmatmat, k)
        inner = [family.inner(k) for family, k in zip(families, members, strict=True)]
        means = [
            family.trace(each) / family.size for family, each in zip(families, inner, strict=True)
        ]
        found = []
        for n, (family, k) in enumerate(zip(families, members, strict=True)):
            others = [at for at in range(len(families)) if at != n]
            columns = given.movedim(n + 1, 1).reshape(len(given), family.size, -1)
            if whitened:
                curved = family.inner_products(columns) / family.weights(k)
                spread = prod((means[at] for at in others), start=torch.ones_like(means[0]))
            else:
                curved, spread = family.inner(k, columns), torch.ones_like(means[0])
            scale = samples / prod(families[at].size for at in others)
            damped = damping * spread.unsqueeze(-1) * inner[n]
            found.append((scale * curved + damped - family.identity(k)) / 2)
        return found


def turned(
    x: Tensor,  # (k, *sizes)
    axis: int,
    product: Callable[[Tensor, Tensor], Tensor],
    member: Tensor,  # (k, count)
) -> Tensor:
    """A product with a matrix on an axis, of k tensors.

    >>> turned(torch.ones(1, 2, 3), 1, structure("diagonal", 3).matmat, torch.ones(1, 3)).shape
    torch.Size([1, 2, 3])
    """
    moved = x.movedim(axis + 1, 1)
    found = product(member, moved.reshape(*moved.shape[:2], -1))
    return found.reshape(moved.shape).movedim(1, axis + 1)
