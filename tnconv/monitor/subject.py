"""The training run that is watched: its model and loss, and what belongs to them throughout."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from tnconv.diagrams.notices import warn
from tnconv.losses.reductions import Reduction, reduction_of
from tnconv.models.modules import mixes_samples, named_modules, own_parameters, unwrapped
from tnconv.monitor.step_curvature import Spectra
from tnconv.optim.workers import Workers

Loss = Callable[..., Tensor]
NORMALISING = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase)


@dataclass(eq=False)
class Subject:
    """A model, its loss and its workers; what cannot be had is ``left_out``, with the reason."""

    model: nn.Module
    loss_fn: Loss | None
    reduction: Reduction
    workers: Workers
    generator: torch.Generator
    samples: int | None = None
    scaler: Any = None
    batch_dim: int = 0
    constants: bool = False  # statistics of batches, where gradients of single samples are asked
    left_out: dict[Hashable, str] = field(default_factory=dict)
    asks_for_reduction: bool = False  # as the loss does not say
    found_reduction: Reduction | None = None
    told: set[tuple[str, str]] = field(default_factory=set)
    named: list[tuple[str, nn.Parameter]] = field(init=False)  # that learn
    sharded: bool = field(init=False)  # whether some worker holds a part of a parameter alone

    def __post_init__(self) -> None:
        self.core = unwrapped(self.model)
        self.spectra = Spectra(self.generator)
        for name, module in ((n, m) for m, n in named_modules(self.core).items()):
            for own, p in own_parameters(module):
                _expect_values(f"{name}.{own}" if name else own, p)
        self.look_again()

    def look_again(self) -> None:
        """Look the parameters up that learn: wrappers replace them."""
        self._modules = [(name, module) for module, name in named_modules(self.core).items()]
        found: dict[nn.Parameter, str] = {}
        for prefix, module in self._modules:
            for name, p in own_parameters(module):
                if p.requires_grad:
                    found.setdefault(p, f"{prefix}.{name}" if prefix else name)
        self.named = [(name, p) for p, name in found.items()]
        self.sharded = any(hasattr(p, "full_tensor") for _, p in self.named)

    @property
    def values(self) -> list[Tensor]:
        """What these parameters are now, also where each worker holds a shard of them."""
        return [whole(p.detach()) for _, p in self.named]

    @property
    def scale(self) -> float:
        """The factor of automatic mixed precision."""
        return float(self.scaler.get_scale()) if self.scaler is not None else 1.0

    @property
    def mixing(self) -> str | None:
        """A layer that normalises by the batch's statistics now, so that samples see each other."""
        return next((name for name, module in self._modules if mixes_samples(module)), None)

    @property
    def normalising(self) -> list[nn.Parameter]:
        """Parameters that learn of layers that normalise every sample by itself."""
        modules = [module for _, module in self._modules if isinstance(module, NORMALISING)]
        own = [p for m in modules if not mixes_samples(m) for p in m.parameters(recurse=False)]
        return [p for p in own if p.requires_grad]

    def leave_out(self, need: Hashable, reason: str) -> None:
        """Do not try for something again; the first time, say why."""
        if need not in self.left_out:
            self.left_out[need] = reason
            what = need if isinstance(need, str) else f"{need}"
            warn(f"the monitor leaves out {what}: {reason}")

    def tell(self, what: str, reason: str) -> None:
        """Say once why something is not measured at a step."""
        if (what, reason) not in self.told:
            self.told.add((what, reason))
            warn(f"{what}: {reason}")

    def attempt(self, need: Hashable, work: Callable[[], Any]) -> Any:
        """What some work gives, or None once it fails: the run that is watched goes on."""
        if need in self.left_out:
            return None
        try:
            return work()
        except Exception as error:
            self.leave_out(need, reason_of(error))
            return None


def _expect_values(name: str, parameter: Tensor) -> None:
    """Check that a parameter has values.

    Raises:
        ValueError: it is on the device "meta", or of a lazy layer that has not run.
    """
    if is_lazy(parameter):
        raise ValueError(
            f"parameter {name!r} has no shape yet; expected a model that has run once, as its lazy "
            "layers take their shapes from inputs"
        )
    if parameter.is_meta:
        raise ValueError(f"parameter {name!r} is on the device 'meta'; expected one with values")


def reason_of(error: Exception) -> str:
    """The message of an error, with the name of its class where that alone may be unclear."""
    if isinstance(error, NotImplementedError | RuntimeError | TypeError | ValueError):
        return str(error)
    return f"{type(error).__name__}: {error}"


def reduction_in(loss_fn: Loss | None, given: Reduction | None) -> Reduction:
    """How the loss puts samples together: as given, as it says, or by a mean.

    Raises:
        ValueError: neither a mean nor a sum.
    """
    if given not in (None, "mean", "sum"):
        raise ValueError(f"reduction is {given!r}; expected 'mean' or 'sum'")
    found = None if loss_fn is None else reduction_of(loss_fn)
    return given or found or "mean"


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of tensors that no graph leads to."""
    return [each.clone() for each in tensors]


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that is sharded over workers, or sparse; others as they are."""
    gathered = getattr(tensor, "full_tensor", None)
    found = tensor if gathered is None else gathered()
    return found if found.layout == torch.strided else found.to_dense()
