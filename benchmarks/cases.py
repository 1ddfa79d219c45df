"""The cases: the 130 distinct convolutions, standing for 329 layers, of nine CNNs."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data" / "conv_layers.jsonl"
MOST_FLOPS = 3 * 10**9  # of the most expensive operation: some 20 to 50 ms on two cores
MOST_ENTRIES = 2**24  # of the unfolded input
LARGEST_BATCH = 32


@dataclass(frozen=True)
class Layer:
    """A convolution: channels first, one entry per spatial dimension, no batch in the shapes."""

    network: str
    layers: tuple[str, ...]
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """The network and the first of the layers that share this convolution."""
        return f"{self.network}:{self.layers[0]}"

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    @property
    def kind(self) -> str:
        """What sort of kernel: they take different ways through torch and through tnconv."""
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
        patch, positions = prod(self.weight_shape[1:]), prod(self.output_shape[1:])
        flops = 2 * patch * positions * max(self.out_channels, self.groups * patch)
        entries = self.groups * patch * positions
        most = min(MOST_FLOPS // flops, MOST_ENTRIES // entries, LARGEST_BATCH)
        return 1 << max(1, most).bit_length() - 1

    def describe(self) -> str:
        """Channels, kernel and input in one short cell, with what differs from the defaults."""
        text = f"{self.in_channels}→{self.out_channels} k{_short(self.kernel_size)}"
        for letter, values, default in (("s", self.stride, 1), ("p", self.padding, 0)):
            text += f" {letter}{_short(values)}" if set(values) != {default} else ""
        text += f" g{self.groups}" if self.groups > 1 else ""
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


def _short(values: Sequence[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else "x".join(map(str, values))
