"""The memory-saving layers that the tests go through, and what is stored in a call."""

import copy

import pytest
import torch
from torch import Tensor, nn

from tnconv.nn import memory, save_memory
from tnconv.nn.memory.activations import Pointwise

torch.manual_seed(0)
D = {"dtype": torch.float64}
LAYERS = [
    (nn.Conv1d(4, 6, 3, stride=2, padding=1, **D), (2, 4, 9)),
    (nn.Conv2d(4, 6, (3, 2), padding="same", groups=2, **D), (2, 4, 7, 6)),
    (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", **D), (2, 4, 7, 6)),
    (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", **D), (4, 7, 6)),
    (nn.Conv2d(4, 6, 3, padding=1, padding_mode="replicate", **D), (2, 4, 7, 6)),
    (nn.Conv2d(4, 6, 3, dilation=2, bias=False, **D), (2, 4, 7, 6)),
    (nn.Conv3d(2, 3, 2, **D), (2, 2, 4, 3, 4)),
    (nn.ConvTranspose1d(4, 6, 3, stride=2, **D), (2, 4, 5)),
    (nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2, dilation=2, **D), (2, 4, 5, 4)),
    (nn.ConvTranspose3d(2, 3, 2, **D), (2, 2, 3, 2, 3)),
    (nn.Linear(5, 3, **D), (2, 4, 5)),
    (nn.BatchNorm1d(4, affine=False, momentum=None, **D), (3, 4)),
    (nn.BatchNorm2d(4, **D), (3, 4, 5, 5)),
    (nn.BatchNorm2d(4, **D).eval(), (3, 4, 5, 5)),
    (nn.BatchNorm2d(4, track_running_stats=False, **D).eval(), (3, 4, 5, 5)),
    (nn.BatchNorm3d(4, **D).eval(), (3, 4, 2, 3, 2)),
    (nn.LayerNorm(5, **D), (3, 4, 5)),
    (nn.GroupNorm(2, 4, **D), (3, 4, 5)),
    (nn.InstanceNorm1d(4, **D), (3, 4, 5)),
    (nn.InstanceNorm2d(4, affine=True, track_running_stats=True, **D).eval(), (3, 4, 5, 5)),
    (nn.InstanceNorm3d(4, affine=True, **D), (3, 4, 2, 3, 2)),
    *((kind(), (3, 7)) for kind in (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Hardsigmoid)),
    *((kind(), (3, 7)) for kind in (nn.Hardshrink, nn.Softshrink, nn.LeakyReLU, nn.ELU)),
    *((kind(), (3, 7)) for kind in (nn.CELU, nn.SELU, nn.Softplus)),
    (nn.Threshold(0.1, 0.3), (3, 7)),
    (nn.MaxPool1d(2), (2, 3, 8)),
    (nn.MaxPool2d(3, 2, 1), (2, 3, 8, 8)),
    (nn.MaxPool3d(2), (2, 3, 4, 4, 4)),
    (nn.AvgPool1d(2), (2, 3, 8)),
    (nn.AvgPool2d(3, 2, 1), (2, 3, 8, 8)),
    (nn.AvgPool3d(2), (2, 3, 4, 4, 4)),
    (nn.AdaptiveAvgPool1d(3), (2, 3, 8)),
    (nn.AdaptiveAvgPool2d((2, None)), (2, 3, 8, 8)),
    (nn.AdaptiveAvgPool3d(2), (2, 3, 4, 4, 4)),
    (nn.AdaptiveMaxPool1d(3), (2, 3, 8)),
    (nn.AdaptiveMaxPool2d(3), (2, 3, 8, 8)),
    (nn.AdaptiveMaxPool3d(2), (2, 3, 4, 4, 4)),
    (nn.Dropout(0.3), (3, 7)),
]
# with whether the reader of an activation stores its input; None if it is not known who reads
CASES = [
    (layer, shape, reader)
    for layer, shape in LAYERS
    for reader in (None, False, True)
    if reader is None or issubclass(getattr(memory, type(layer).__name__), Pointwise)
]
each_case = pytest.mark.parametrize(("layer", "shape", "reader"), CASES, ids=str)


def stored(call, *owners):
    """What a call gives, and the bytes it stores beyond the parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for m in owners for t in (*m.parameters(), *m.buffers())}
    kept = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        torch.manual_seed(1)
        y = call()
    return y, sum(size for size, _ in kept.values())


def close(a, b, tolerance):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def pair(layer, reader=None):
    """A copy of the layer, and the one that saves memory, on parameters of its own."""
    theirs = copy.deepcopy(layer)
    saving = save_memory(copy.deepcopy(layer))
    assert type(saving) is getattr(memory, type(layer).__name__)
    if reader is not None:
        saving.readers = [memory.Linear(2, 2).requires_grad_(reader)]
        saving.input_held = False
    return theirs, saving
