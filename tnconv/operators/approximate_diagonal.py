"""Approximate Hessian diagonals of a whole network for about the price of a gradient."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tnconv.given import instances
from tnconv.losses.diagonals import LossFunction, Method
from tnconv.models.computing import Inputs, arguments, compute
from tnconv.models.modules import uncompiled, unwrapped
from tnconv.operators.hessian_diagonal import chosen_parameters
from tnconv.quantities.hesscale import HesScale
from tnconv.recursions import check_method, diagonals
from tnconv.recursions.naming import describing


def hesscale(
    model: nn.Module,
    loss_fn: LossFunction,
    inputs: Inputs,
    targets: Any,
    method: Method = "hesscale",
    *,
    parameters: Iterable[str] | None = None,
    backward: bool = False,
    per_sample: bool = False,
    batch_dim: int = 0,
) -> dict[str, Tensor]:
    """``s ≈ ∂²L / ∂θ²`` of every parameter, in its shape, by one recursion backwards.

    Through every operation goes ``s_x = (J∘J)ᵀ s + Σ_o g_o ∂²y_o / ∂x²``, with the exact gradient
    g. It neglects second derivatives in two different entries of one value, and so the pairs of
    positions that share a weight, and the pairs of paths that meet again (but those through
    functions of single entries, which are one function): it is exact for the last linear layer,
    with a diagonal output Hessian for the last two, for ReLU networks equal to "gn".

    Args:
        model: any; dropout stays as it is, and BatchNorm in evaluation mode is a constant scale.
        loss_fn: a loss of `tnconv.losses`, or of torch that they know.
        inputs: a tensor, or a sequence or mapping of the model's arguments.
        targets: of the loss.
        method: "hesscale" starts with the exact diagonal of the loss's Hessian in the outputs, "gn"
            leaves out the second derivatives of operations (and is never negative, for convex
            losses), "bl89" starts with Becker & LeCun's approximation for cross-entropy, and
            "hesscale+" keeps cross-entropy's whole Hessian until the last layer, which makes the
            last two exact and takes a vjp of the last layer per output position.
        parameters: names of those that count, by default all that learn.
        backward: whether to add the loss's gradient to each parameter's ``grad``, as
            ``loss.backward()`` does, in the same pass.
        per_sample: whether to give each sample's part, of shape ``(n, *parameter)``; then samples
            must not see each other, and parameters belong to layers with diagrams.
        batch_dim: the dimension of the inputs that is the batch, which parts of samples depend on.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 5))
    >>> x, labels = torch.rand(8, 3, 6, 6), torch.randint(5, (8,))
    >>> hesscale(model, nn.CrossEntropyLoss(), x, labels)["0.weight"].shape
    torch.Size([4, 3, 3, 3])

    Raises:
        NotImplementedError: an operation or a loss without a rule, or samples that cannot be told
            apart.
        TypeError: an output that is no tensor.
        ValueError: an unknown method or parameter, or ``backward`` with ``per_sample``.
    """
    instances(model=model, loss_fn=loss_fn)
    check_method(method)
    whole = unwrapped(model)
    chosen = chosen_parameters(whole, parameters)
    if per_sample:
        if backward:
            raise ValueError(
                "backward is True with per_sample; expected loss.backward() beside a call with "
                "per_sample"
            )
        each = HesScale(method, per_sample=True)
        with unfused_attention():
            result = compute(model, loss_fn, inputs, targets, [each], batch_dim=batch_dim)[each]
        return {name: result[name] for name in chosen if name in result}
    with torch.enable_grad(), uncompiled(whole), unfused_attention():
        args, kwargs = arguments(inputs)
        output = whole(*args, **kwargs)
        describe = describing(whole)
        how: dict[str, Any] = {"gradients": backward, "describe": describe}
        _, found = diagonals(loss_fn, output, targets, chosen.values(), method, **how)
    if backward:
        accumulate({p: flow.gradient for p, flow in found.items()})
    return {name: found[p].diagonal for name, p in chosen.items() if p in found}


@torch.no_grad()
def accumulate(gradients: Mapping[Tensor, Tensor | None]) -> None:
    """Add gradients to those that parameters have, as autograd does."""
    for parameter, gradient in gradients.items():
        if gradient is None:
            continue
        if parameter.grad is None:
            parameter.grad = gradient.to(parameter.dtype)
        else:
            parameter.grad += gradient


@contextmanager
def unfused_attention() -> Iterator[None]:
    """Attention made of products and a softmax, for which there are rules."""
    cuda = torch.backends.cuda
    kinds: Any = (
        (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
        (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
        (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
    )
    before = [enabled() for enabled, _ in kinds]
    for _, enable in kinds:
        enable(False)
    try:
        yield
    finally:
        for (_, enable), was in zip(kinds, before, strict=True):
            enable(was)
