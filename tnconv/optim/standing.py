"""How each parameter is preconditioned, or why it is not."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from tnconv.models.layers import describes
from tnconv.models.modules import is_compiled
from tnconv.optim.blocks import Block

PLAIN: Mapping[str, tuple[type[nn.Module], ...]] = {
    "normalisation": (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
    "embedding": (nn.Embedding, nn.EmbeddingBag),
    "recurrent": (nn.RNNBase, nn.RNNCellBase),
    "attention": (nn.MultiheadAttention, NonDynamicallyQuantizableLinear),
}
"""Modules whose parameters have no Kronecker factors by design."""
MOST_NAMES = 8


@dataclass(frozen=True)
class Standing:
    """One parameter: ``how`` it is preconditioned, by which ``layer``, or ``why`` it is not.

    ``by_design`` is whether nobody would expect factors.
    """

    name: str
    how: str
    layer: str = ""
    why: str = ""
    by_design: bool = True

    def __str__(self) -> str:
        what = f"by layer {self.layer!r}" if self.layer else self.why
        return f"{self.name}: {self.how}, {what}" if what else f"{self.name}: {self.how}"


def standings(
    model: nn.Module,
    blocks: Iterable[Block],
    seen: Collection[Tensor],  # the keys of blocks with factors
    groups: Mapping[Tensor, int],
    fallback: Collection[Tensor],
    most: int,
) -> list[Standing]:
    """All parameters of a model, in its order."""
    holders: dict[Tensor, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(parameter, []).append(module)
    of = {parameter: block for block in blocks for parameter in block.parameters}

    def standing(name: str, parameter: nn.Parameter) -> Standing:
        if parameter not in groups:
            return Standing(name, "not trained", why="in no group of parameters")
        if not parameter.requires_grad:
            return Standing(name, "not trained", why="frozen")
        other = "the fallback" if parameter in fallback else "running squares of its gradient"
        block = of.get(parameter)
        if block is None:
            why, by_design = _reason(parameter, holders[parameter])
            return Standing(name, other, why=why, by_design=by_design)
        if block.pieces(4 * most) > 1:
            why = f"a factor of layer {block.name!r} has more than {4 * most} rows"
            return Standing(name, other, why=why)
        if block.key not in seen:
            why = f"layer {block.name!r} was not seen"
            return Standing(name, other, why=why, by_design=False)
        count = block.pieces(most)
        how = "Kronecker factors" if count == 1 else f"Kronecker factors in up to {count} blocks"
        return Standing(name, how, layer=block.name)

    return [standing(name, p) for name, p in model.named_parameters()]


def message(model: nn.Module, found: Sequence[Standing], optimizer: str) -> str | None:
    """What to say of parameters that have a gradient, but against expectation no factors."""
    named = dict(model.named_parameters())
    lost = [s for s in found if not s.by_design and named[s.name].grad is not None]
    if not lost:
        return None
    names = [f"{each.name!r} ({each.why})" for each in lost]
    rest = len(names) - MOST_NAMES
    listed = "; ".join(names[:MOST_NAMES]) + (f"; and {rest} more" if rest > 0 else "")
    return (
        f"{optimizer} has no Kronecker factors for {len(lost)} parameter{'s' * (len(lost) > 1)} "
        f"with gradients: {listed}. "
        f"They are preconditioned by {lost[0].how} alone. {_advice(model, lost, optimizer)}"
    )


def _advice(model: nn.Module, lost: Sequence[Standing], optimizer: str) -> str:
    if all("was not seen" not in each.why for each in lost):
        return "tnconv.models.register_layer describes further layers."
    if any(is_compiled(module) for module in model.modules()):
        return (
            f"Compiled code that ran before {optimizer} was made runs no hooks: make {optimizer} "
            "first, or call torch._dynamo.reset()."
        )
    return (
        "Layers are seen in training mode, when they are called themselves, outside of reentrant "
        "checkpoints (for 'mc' and 'type-2'), and when loss.backward() adds to their gradients."
    )


def _reason(parameter: nn.Parameter, holders: Sequence[nn.Module]) -> tuple[str, bool]:
    """Why a parameter has no factors, and whether that is by design.

    Vectors, and what a module with layers inside adds or multiplies by itself, have none.
    """
    for kind, types in PLAIN.items():
        if all(isinstance(each, types) for each in holders):
            return f"{kind} has none", True
    if len({describes(each) for each in holders}) > 1 or len(holders) > 1:
        return "layers of several kinds share it", True
    kind = type(holders[0]).__name__
    vector = sum(size > 1 for size in parameter.shape) <= 1
    inner = any(next(child.parameters(), None) is not None for child in holders[0].children())
    return f"no factors are known for {kind}", vector or inner
