"""Convolutions and transposed convolutions: ``torch.nn``'s modules, computed by their diagrams."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from tnconv import functional
from tnconv.diagrams.hyperparameters import IntOrTuple, per_dimension
from tnconv.nn.symbolic import has_symbolic_sizes

NATIVE_DIMS = 3  # torch has convolutions in so many
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


class Convolution(_ConvNd):
    """What all convolutions share: ``y = conv(pad(x), w) + b``; zeros are no pad, but in Π."""

    @property
    def dims(self) -> int:
        """The number of spatial dimensions."""
        return len(self.kernel_size)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if has_symbolic_sizes(input) and self.dims <= NATIVE_DIMS:
            return super()._conv_forward(input, weight, bias)
        padding: str | IntOrTuple = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, self.padding_mode)
            padding = 0
        settings = (self.stride, padding, self.dilation, self.groups)
        return functional.conv(input, weight, bias, *settings)

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight, self.bias)


class Transposed(_ConvTransposeNd):
    """What all transposed convolutions share: ``y = conv_transpose(x, w) + b``."""

    @property
    def dims(self) -> int:
        """The number of spatial dimensions."""
        return len(self.kernel_size)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if has_symbolic_sizes(input) and self.dims <= NATIVE_DIMS:
            return super().forward(input, output_size)  # type: ignore[no-any-return]
        extra = output_padding(self, input, output_size)
        settings = (self.stride, self.padding, extra, self.groups, self.dilation)
        return functional.conv_transpose(input, self.weight, self.bias, *settings)


def output_padding(
    layer: _ConvTransposeNd, input: Tensor, output_size: list[int] | None
) -> tuple[int, ...]:
    """What the layer adds to reach an output size; its own setting without one."""
    found = layer._output_padding(
        input,
        output_size,
        layer.stride,  # type: ignore[arg-type]
        layer.padding,  # type: ignore[arg-type]
        layer.kernel_size,  # type: ignore[arg-type]
        len(layer.kernel_size),
        layer.dilation,  # type: ignore[arg-type]
    )
    return tuple(found)


class Conv1d(Convolution, nn.Conv1d):
    """``torch.nn.Conv1d``, computed by its diagram.

    >>> Conv1d(4, 6, 5, padding="same")(torch.rand(8, 4, 32)).shape
    torch.Size([8, 6, 32])
    """


class Conv2d(Convolution, nn.Conv2d):
    """``torch.nn.Conv2d``, computed by its diagram.

    >>> Conv2d(4, 6, 3, stride=2, padding=1, groups=2)(torch.rand(8, 4, 32, 32)).shape
    torch.Size([8, 6, 16, 16])
    """


class Conv3d(Convolution, nn.Conv3d):
    """``torch.nn.Conv3d``, computed by its diagram.

    >>> Conv3d(4, 6, (1, 3, 3), padding_mode="circular")(torch.rand(8, 4, 5, 8, 8)).shape
    torch.Size([8, 6, 5, 6, 6])
    """


class ConvTranspose1d(Transposed, nn.ConvTranspose1d):
    """``torch.nn.ConvTranspose1d``, computed by its diagram.

    >>> ConvTranspose1d(4, 6, 3, stride=2)(torch.rand(8, 4, 16)).shape
    torch.Size([8, 6, 33])
    """


class ConvTranspose2d(Transposed, nn.ConvTranspose2d):
    """``torch.nn.ConvTranspose2d``, computed by its diagram.

    >>> layer = ConvTranspose2d(4, 6, 3, stride=2, padding=1)
    >>> layer(torch.rand(8, 4, 16, 16), output_size=(32, 31)).shape
    torch.Size([8, 6, 32, 31])
    """


class ConvTranspose3d(Transposed, nn.ConvTranspose3d):
    """``torch.nn.ConvTranspose3d``, computed by its diagram.

    >>> ConvTranspose3d(4, 6, 2, stride=2)(torch.rand(8, 4, 2, 8, 8)).shape
    torch.Size([8, 6, 4, 16, 16])
    """


class ConvNd(Convolution):
    """A convolution over ``dims`` dimensions; the other arguments are ``torch.nn.Conv2d``'s.

    >>> ConvNd(4, 2, 3, kernel_size=2)(torch.rand(8, 2, 3, 4, 5, 6)).shape
    torch.Size([8, 3, 2, 3, 4, 5])

    Raises:
        ValueError: a hyper-parameter out of its range or with another number of entries.
        TypeError: a hyper-parameter that is no int, tuple or (for padding) string.
        NotImplementedError: a padding mode but zeros in more dimensions than torch pads.
    """

    def __init__(
        self,
        dims: int,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrTuple,
        stride: IntOrTuple = 1,
        padding: str | IntOrTuple = 0,
        dilation: IntOrTuple = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if dims > 3 and padding_mode in ("reflect", "replicate", "circular"):
            raise NotImplementedError(
                f"padding_mode={padding_mode!r} has dims={dims}; expected at most 3, or 'zeros'"
            )
        super().__init__(
            in_channels,
            out_channels,
            per_dimension("kernel_size", kernel_size, dims, 1),
            per_dimension("stride", stride, dims, 1),
            padding if isinstance(padding, str) else per_dimension("padding", padding, dims, 0),
            per_dimension("dilation", dilation, dims, 1),
            False,
            (0,) * dims,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )


class ConvTransposeNd(Transposed):
    """A transposed convolution over ``dims`` dimensions, else as ``torch.nn.ConvTranspose2d``.

    >>> ConvTransposeNd(4, 2, 3, kernel_size=2)(torch.rand(8, 2, 3, 4, 5, 6)).shape
    torch.Size([8, 3, 4, 5, 6, 7])

    Raises:
        ValueError: a hyper-parameter out of its range or with another number of entries.
        TypeError: a hyper-parameter that is no int or tuple.
    """

    def __init__(
        self,
        dims: int,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrTuple,
        stride: IntOrTuple = 1,
        padding: IntOrTuple = 0,
        output_padding: IntOrTuple = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: IntOrTuple = 1,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            per_dimension("kernel_size", kernel_size, dims, 1),
            per_dimension("stride", stride, dims, 1),
            per_dimension("padding", padding, dims, 0),
            per_dimension("dilation", dilation, dims, 1),
            True,
            per_dimension("output_padding", output_padding, dims, 0),
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
