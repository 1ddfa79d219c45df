"""Kronecker factors of linear and convolutional layers, their damping, and their inverses.

Per group, a layer computes ``y[n, d, o] = Σ_{ck} w[d, ck] a[n, ck, o]`` with the patches a of its
input. For a loss that is a mean over N samples, its gradient ``s[n, d, o]`` after y holds 1/N, and
sample n alone has the gradient ``g_n = N Σ_o s_{no} a_{no}ᵀ`` after w. The block of w in the
empirical Fisher, ``1/N Σ_n g_n g_nᵀ``, is approximated by ``A ⊗ B``:

    expand  A = 1/(N·O) Σ_{n,o} a_{no} a_{no}ᵀ           B = N Σ_{n,o} s_{no} s_{no}ᵀ
    reduce  A = 1/N Σ_n ā_n ā_nᵀ, ā_n = 1/O Σ_o a_{no}   B = N Σ_n (Σ_o s_{no})(Σ_o s_{no})ᵀ

Exact for one sample with one position, and for any number of them that share their patch.
A bias has the patch 1, so that its block is B.
"""

from dataclasses import dataclass
from typing import Literal, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tnconv import functional
from tnconv.nn import Conv1d, Conv2d, Conv3d

Flavour = Literal["expand", "reduce"]
Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1d, Conv2d, Conv3d)


def has_factors(module: nn.Module) -> TypeGuard[Layer]:
    """Whether the module is one of `LAYERS`, no subclass, and holds its weight as a parameter."""
    return type(module) in LAYERS and "weight" in module._parameters


@dataclass(frozen=True)
class Statistics:
    """What some calls of a layer add to its factors: ``A = inputs / N``, ``B = N outputs``.

    Added up over micro-batches, they give the factors of the joint batch.
    """

    samples: int
    inputs: Tensor  # (g, c·K, c·K)
    outputs: Tensor  # (g, d, d)

    def __add__(self, other: "Statistics") -> "Statistics":
        inputs, outputs = self.inputs + other.inputs, self.outputs + other.outputs
        return Statistics(self.samples + other.samples, inputs, outputs)

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B."""
        return self.inputs / max(1, self.samples), self.outputs * self.samples


def statistics(
    layer: Layer,
    x: Tensor,  # (n, g·c, *i) or (n, *o, c), or without n
    grad_output: Tensor,  # (n, g·d, *o) or (n, *o, d), or without n
    flavour: Flavour,
) -> Statistics:
    """The statistics of one call, from the compiled diagrams of both factors.

    >>> found = statistics(nn.Linear(3, 2), torch.rand(8, 3), torch.rand(8, 2), "expand")
    >>> [tuple(factor.shape) for factor in found.factors]
    [(1, 3, 3), (1, 2, 2)]
    """
    dtype = torch.promote_types(layer.weight.dtype, torch.float32)
    x, s = (_channels_first(layer, array).to(dtype) for array in (x, grad_output))
    samples, positions = len(s), s[0, 0].numel() if s.numel() else 1
    kernel, ones = (1,) * (x.dim() - 2), (1,) * (s.dim() - 2)
    factor = functional.kfac_expand if flavour == "expand" else functional.kfac_reduce
    if isinstance(layer, nn.Linear):
        inputs, outputs = factor(x, kernel), factor(s, ones)
    else:
        x, padding = _padded(layer, x)
        settings = (layer.stride, padding, layer.dilation, layer.groups)
        inputs = factor(x, layer.kernel_size, *settings)
        outputs = factor(s, ones, groups=layer.groups)
    if flavour == "expand":
        return Statistics(samples, inputs * samples / positions, outputs * samples)
    return Statistics(samples, inputs * samples, outputs * samples * positions**2)


def damped_inverses(
    inputs: Tensor,  # (g, c·K, c·K)
    outputs: Tensor,  # (g, d, d)
    damping: float,
) -> tuple[Tensor, Tensor]:
    """``(A + π√λ I)⁻¹`` and ``(B + √λ/π I)⁻¹``, π² the ratio of the mean eigenvalues of A and B.

    One π per group; 1 where a factor is zero. Source: Martens & Grosse 2015, section 6.3.

    >>> a, b = damped_inverses(torch.eye(2)[None], 4 * torch.eye(3)[None], damping=0.01)
    >>> 1 / a[0, 0, 0], 1 / b[0, 0, 0]
    (tensor(1.0500), tensor(4.2000))
    """
    means = [factor.diagonal(dim1=-2, dim2=-1).mean(-1) for factor in (inputs, outputs)]
    ratio = (means[0] / means[1]).sqrt()
    pi = torch.where((ratio > 0) & ratio.isfinite(), ratio, 1.0)
    root = damping**0.5
    return inverse(inputs, pi * root), inverse(outputs, root / pi)


def inverse(
    matrix: Tensor,  # (g, d, d)
    damping: Tensor | float,  # (g,)
) -> Tensor:
    """``(M + λ I)⁻¹`` of positive semi-definite M by Cholesky; in float64 where that fails.

    >>> inverse(torch.ones(1, 1, 1), 1.0)
    tensor([[[0.5000]]])

    Raises:
        torch.linalg.LinAlgError: a matrix that is not positive definite in float64 either.
    """
    for dtype in (matrix.dtype, torch.float64):
        damped = matrix.to(dtype, copy=True)
        damped.diagonal(dim1=-2, dim2=-1).add_(torch.as_tensor(damping).unsqueeze(-1))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed.any():
            return torch.cholesky_inverse(lower).to(matrix.dtype)
    raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
        f"a damped Kronecker factor of shape {tuple(matrix.shape)} is not positive definite; "
        "expected finite inputs and gradients, or a larger damping"
    )


def _channels_first(layer: Layer, array: Tensor) -> Tensor:
    """An input or output as ``(n, c, *o)``; without a batch it is one sample."""
    if isinstance(layer, nn.Linear):
        return array.movedim(-1, 1) if array.dim() > 1 else array[None]
    return array if array.dim() > len(layer.kernel_size) + 1 else array[None]


def _padded(
    layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor
) -> tuple[Tensor, str | tuple[int, ...]]:
    """The input and the padding with zeros that it still needs; other modes are applied to it."""
    if layer.padding_mode == "zeros":
        return x, layer.padding
    return F.pad(x, layer._reversed_padding_repeated_twice, layer.padding_mode), "valid"
