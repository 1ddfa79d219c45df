"""The price of a loop in Python, one sample at a time."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from tnconv.codegen.prices.convolutions import NativeConvolution
from tnconv.codegen.prices.kinds import Kind, Probe, Random, coefficient
from tnconv.codegen.prices.movement import Copy
from tnconv.codegen.prices.native_shapes import Convolution
from tnconv.codegen.prices.tables import Table
from tnconv.codegen.prices.timing import Call

COUNT = 32
SAMPLE = Convolution((1, 8, 8, 8), (8, 8, 3, 3), (1, 8, 8, 8), 1, (1, 1), (1, 1), (1, 1))


def _per_sample_gradients(random: Random) -> Call:
    """The loop of an emitted program: the weight gradient of each sample, joined."""
    x, v = random(COUNT, 8, 8, 8), random(COUNT, 8, 8, 8)
    settings = [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False]

    def call() -> object:
        return torch.cat(
            [
                torch.ops.aten.convolution_backward(
                    given, image, image.new_empty(8, 8, 3, 3), None, *settings
                )[1]
                for image, given in zip(torch.split(x, 1), torch.split(v, 1), strict=True)
            ]
        )

    return call


def _seconds(table: Table) -> float:
    one = table[NativeConvolution].price("weight gradient", SAMPLE).seconds
    size = SAMPLE.entries.w
    return table[Loop].seconds(COUNT, one) + table[Copy].price(COUNT * size, size).seconds


@dataclass(frozen=True)
class Loop(Kind):
    """``t = count (turn + Σ t_step)``: the calls of a Python loop, and what a turn adds to them."""

    decisions: ClassVar = ("0007", "0011")
    turn: float = coefficient(  # turns: slices of operands, and the Python around the calls
        2e-5, "s/call", Probe(_per_sample_gradients, _seconds)
    )

    def seconds(self, count: int, steps: float) -> float:
        """Of all turns, each of which takes ``steps`` seconds."""
        return count * (self.turn + steps)
