"""The cases: 130 distinct convolutions, standing for 329 layers, of nine CNNs, and 20 others."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property
from math import prod
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data" / "conv_layers.jsonl"
MOST_FLOPS = 3 * 10**9  # of the most expensive operation: some 20 to 50 ms on two cores
MOST_ENTRIES = 2**24  # of the unfolded input
LARGEST_BATCH = 32


Pair = tuple[int, int]


@dataclass(frozen=True)
class Layer:
    """A convolution: channels first, one entry per spatial dimension, no batch in the shapes.

    An entry of ``padding`` is an int, or a pair where the two sides differ.
    """

    network: str
    layers: tuple[str, ...]
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int | Pair, ...]
    dilation: tuple[int, ...]
    groups: int
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The network and the first of the layers that share this convolution."""
        return f"{self.network}:{self.layers[0]}"

    @property
    def dims(self) -> int:
        """The number of spatial dimensions."""
        return len(self.kernel_size)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        channels = self.out_channels, self.in_channels
        first, second = channels[::-1] if self.transposed else channels
        return (first, second // self.groups, *self.kernel_size)

    @cached_property
    def pads(self) -> tuple[Pair, ...]:
        """Padding by side."""
        return tuple((p, p) if isinstance(p, int) else p for p in self.padding)

    @cached_property
    def asymmetric(self) -> bool:
        """Whether torch's kernels cannot pad the input by themselves."""
        return any(left != right for left, right in self.pads)

    @cached_property
    def unpadded(self) -> "Layer":
        """The layer that takes the padded input."""
        channels, *spatial = self.input_shape
        sizes = (size + sum(pads) for size, pads in zip(spatial, self.pads, strict=True))
        return replace(self, padding=(0,) * self.dims, input_shape=(channels, *sizes))

    @property
    def kind(self) -> str:
        """What sort of kernel: they take different ways through torch and through tnconv."""
        if self.transposed:
            return "transposed"
        if self.groups > 1:
            return "depthwise" if self.groups == self.in_channels else "grouped"
        fits = all(k <= s for k, s in zip(self.kernel_size, self.stride, strict=True))
        if fits and max(self.stride) > 1:
            return "patch"
        if max(self.kernel_size) == 1:
            return "pointwise"
        return "strided" if max(self.stride) > 1 else "general"

    @property
    def batch(self) -> int:
        """The largest power of two, up to 32, within both limits; at least 1."""
        patch = self.in_channels // self.groups * prod(self.kernel_size)
        positions = prod(self.output_shape[1:])
        flops = 2 * patch * positions * max(self.out_channels, self.groups * patch)
        entries = self.groups * patch * positions
        most = min(MOST_FLOPS // flops, MOST_ENTRIES // entries, LARGEST_BATCH)
        return 1 << max(1, most).bit_length() - 1

    def describe(self) -> str:
        """Channels, kernel and input in one short cell, with what differs from the defaults."""
        text = f"{self.in_channels}→{self.out_channels} k{_short(self.kernel_size)}"
        sides = ("s", self.stride, 1), ("p", self.padding, 0), ("d", self.dilation, 1)
        for letter, values, default in sides:
            text += f" {letter}{_short(values)}" if set(values) != {default} else ""
        text += f" g{self.groups}" if self.groups > 1 else ""
        text += " transposed" if self.transposed else ""
        text += f" out+{_short(self.output_padding)}" if any(self.output_padding) else ""
        return f"{text} @ {_short(self.input_shape[1:])}"


@cache
def layers() -> tuple[Layer, ...]:
    """All cases, in the order of the file."""
    with DATA.open() as lines:
        return tuple(_layer(json.loads(line)) for line in lines)


def _layer(row: dict[str, Any]) -> Layer:
    known = {field.name for field in fields(Layer)}
    tuples: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in row.items()
    }
    return Layer(**{name: value for name, value in tuples.items() if name in known})


def quick() -> tuple[Layer, ...]:
    """Of every network, for each kind of kernel, the convolution that most layers share."""
    chosen: dict[tuple[str, str], Layer] = {}
    for layer in layers():
        key = (layer.network, layer.kind)
        if key not in chosen or len(layer.layers) > len(chosen[key].layers):
            chosen[key] = layer
    return tuple(chosen.values())


def own() -> tuple[Layer, ...]:
    """The cases that the nine CNNs have not."""
    return OWN


def _own(
    network: str,
    layer: str,
    input_shape: tuple[int, ...],
    out_channels: int,
    kernel_size: int | tuple[int, ...],
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int | Pair, ...] = 0,
    dilation: int = 1,
    groups: int = 1,
    output_padding: int | None = None,
) -> Layer:
    """A layer with its output shape; transposed where there is ``output_padding``."""
    channels, *spatial = input_shape
    dims, transposed = len(spatial), output_padding is not None
    kernel_size, stride = _each(kernel_size, dims), _each(stride, dims)
    pads = padding if isinstance(padding, tuple) else (padding,) * dims
    sizes = []
    for size, k, s, p in zip(spatial, kernel_size, stride, pads, strict=True):
        both, reach = (2 * p if isinstance(p, int) else sum(p)), dilation * (k - 1)
        if output_padding is None:
            sizes.append((size + both - reach - 1) // s + 1)
        else:
            sizes.append((size - 1) * s - both + reach + output_padding + 1)
    return Layer(
        *(network, (layer,), channels, out_channels, kernel_size, stride, pads),
        *(_each(dilation, dims), groups, input_shape, (out_channels, *sizes), transposed),
        _each(output_padding or 0, dims) if transposed else (),
    )


def _each(value: int | tuple[int, ...], dims: int) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,) * dims


def _short(values: Sequence[int | Pair]) -> str:
    texts = [str(value) if isinstance(value, int) else f"{value[0]}:{value[1]}" for value in values]
    return texts[0] if len(set(texts)) == 1 else "x".join(texts)


OWN = (
    # dilation
    _own("deeplab", "aspp", (64, 33, 33), 64, 3, padding=12, dilation=12),
    _own("deeplab", "stage4", (128, 28, 28), 128, 3, padding=2, dilation=2),
    _own("mobile-deeplab", "depthwise", (96, 32, 32), 96, 3, padding=2, dilation=2, groups=96),
    # sides that differ, and 'same' with even kernels
    _own("efficientnet", "stem", (3, 224, 224), 32, 3, 2, ((0, 1),) * 2),
    _own("efficientnet", "depthwise", (144, 56, 56), 144, 5, 2, ((1, 2),) * 2, groups=144),
    _own("same", "even", (32, 32, 32), 32, 4, padding=((1, 2),) * 2),
    _own("pixelcnn", "down", (64, 32, 32), 64, (2, 3), padding=((1, 0), (1, 1))),
    # signals
    _own("wav2vec2", "conv1", (1, 16000), 512, 10, 5),
    _own("wav2vec2", "conv4", (512, 799), 512, 3, 2),
    _own("m5", "conv1", (1, 16000), 64, 80, 4),
    _own("conformer", "depthwise", (256, 400), 256, 31, padding=15, groups=256),
    _own("wavenet", "causal", (32, 16000), 32, 2, padding=((64, 0),), dilation=64),
    # videos
    _own("r3d", "stem", (3, 8, 56, 56), 64, 3, padding=1),
    _own("r3d", "layer3", (64, 4, 14, 14), 64, 3, padding=1),
    _own("r2plus1d", "spatial", (3, 8, 56, 56), 45, (1, 7, 7), (1, 2, 2), (0, 3, 3)),
    _own("x3d", "depthwise", (54, 8, 28, 28), 54, 3, padding=1, groups=54),
    # transposed
    _own("dcgan", "up", (128, 16, 16), 64, 4, 2, 1, output_padding=0),
    _own("unet", "up", (128, 28, 28), 64, 2, 2, output_padding=0),
    _own("cyclegan", "up", (64, 32, 32), 32, 3, 2, 1, output_padding=1),
    _own("hifigan", "up", (128, 128), 64, 16, 8, 4, output_padding=0),
)
