"""Unfold and fold (im2col and col2im) for any number of dimensions."""

from torch import Tensor, nn

from tnconv import functional
from tnconv.nn.symbolic import has_symbolic_sizes


class UnfoldNd(nn.Unfold):
    """``torch.nn.Unfold`` in as many dimensions as the tuples among its arguments have entries.

    With ints alone these are all dimensions after the batch and the channels; input without a
    batch therefore needs a tuple.

    >>> import torch
    >>> UnfoldNd(3, padding=1)(torch.rand(8, 2, 4, 5, 6)).shape
    torch.Size([8, 54, 120])
    >>> UnfoldNd((3, 3))(torch.rand(2, 5, 6)).shape
    torch.Size([18, 12])
    """

    @property
    def dims(self) -> int | None:
        """The number of dimensions; None if the arguments are ints alone."""
        return _entries(self.kernel_size, self.dilation, self.padding, self.stride)

    def forward(self, input: Tensor) -> Tensor:
        kernel_size, dims = self.kernel_size, self.dims
        if has_symbolic_sizes(input) and input.ndim == 4 and dims in (None, 2):
            return super().forward(input)
        if isinstance(kernel_size, int) and dims is not None:
            kernel_size = (kernel_size,) * dims
        return functional.unfold(input, kernel_size, self.dilation, self.padding, self.stride)


class FoldNd(nn.Fold):
    """``torch.nn.Fold`` in as many dimensions as the tuples among its arguments have entries.

    With ints alone these are two, as in torch.

    >>> import torch
    >>> FoldNd((4, 5, 6), 3, padding=1)(torch.rand(8, 54, 120)).shape
    torch.Size([8, 2, 4, 5, 6])
    """

    @property
    def dims(self) -> int:
        """The number of dimensions."""
        settings = (self.kernel_size, self.dilation, self.padding, self.stride)
        dims = _entries(self.output_size, *settings)
        return 2 if dims is None else dims

    def forward(self, input: Tensor) -> Tensor:
        if has_symbolic_sizes(input) and self.dims == 2:
            return super().forward(input)
        size = self.output_size
        size = (size,) * self.dims if isinstance(size, int) else size
        return functional.fold(
            input, size, self.kernel_size, self.dilation, self.padding, self.stride
        )


def _entries(*settings: object) -> int | None:
    """The length of the first tuple."""
    return next((len(s) for s in settings if isinstance(s, (tuple, list))), None)
