"""The price of a loop in Python, one sample at a time."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from tnconv.codegen.prices.convolutions import NativeConvolution
from tnconv.codegen.prices.kinds import Kernel, Kind, Probe, Random, coefficient
from tnconv.codegen.prices.movement import Calls, Copy, Elementwise
from tnconv.codegen.prices.native_shapes import Convolution
from tnconv.codegen.prices.tables import Machine, Table
from tnconv.codegen.prices.timing import Call

COUNT = 32
SMALL = Convolution((1, 8, 8, 8), (8, 8, 3, 3), (1, 8, 8, 8), 1, (1, 1), (1, 1), (1, 1))
LARGE = Convolution((1, 64, 28, 28), (64, 64, 3, 3), (1, 64, 28, 28), 1, (1, 1), (1, 1), (1, 1))


def _per_sample_gradients(one: Convolution) -> Probe:
    """The loop of an emitted program: the weight gradient of each sample, joined."""
    settings = one.strides, one.paddings, one.dilations, False, [0, 0], 1, [False, True, False]

    def prepared(random: Random) -> Call:
        x, v = random(COUNT, *one.x[1:]), random(COUNT, *one.y[1:])

        def call() -> object:
            return torch.cat(
                [
                    torch.ops.aten.convolution_backward(
                        given, image, image.new_empty(one.w), None, *settings
                    )[1]
                    for image, given in zip(torch.split(x, 1), torch.split(v, 1), strict=True)
                ]
            )

        return call

    def seconds(table: Table) -> float:
        turn = table[NativeConvolution].price("weight gradient", one).seconds
        size = one.entries.w
        joined = table[Copy].price(COUNT * size, size).seconds
        return table[Loop].seconds(COUNT, turn, alone=True) + joined

    return Probe(prepared, seconds)


def _sums(random: Random) -> Call:
    """Python's sum of arrays that stay in a cache, as an emitted loop adds them."""
    rows = random(COUNT, 2**15).unbind()
    return lambda: sum(rows)


@dataclass(frozen=True)
class Loop(Kind):
    """``t = count (turn + Σ t_step)``: the calls of a Python loop, and its turns.

    Prices of kernels assume that a batch keeps all threads busy. Where a turn computes one sample,
    the threads share smaller parts of it, and its steps take ``alone`` times as long. Sums over
    turns add ``moved / added`` to a turn, where totals and what is added to them stay in a cache,
    and else take as long as `Elementwise` operations.
    """

    decisions: ClassVar = ("0007", "0011")
    elementwise: Elementwise
    calls: Calls
    machine: Machine
    turn: float = coefficient(  # turns: slices of operands, and the Python around the calls
        2e-5, "s/call", _per_sample_gradients(SMALL)
    )
    alone: float = coefficient(  # kernels of one sample, relative to their share of a batch's
        1.0, "times", _per_sample_gradients(LARGE)
    )
    added: float = coefficient(  # bytes read plus bytes written in a sum over turns, in a cache
        6e10,
        "bytes/s",
        Probe(_sums, lambda table: COUNT * table[Loop].adding(2**15).seconds),
    )

    def seconds(self, count: int, steps: float, alone: bool = False) -> float:
        """The seconds of all turns.

        Args:
            count: How many turns there are.
            steps: The seconds of the calls in one turn, for a share of a batch.
            alone: Whether a turn computes a single sample instead.
        """
        longer = max(1.0, self.alone) if alone else 1.0  # a share cannot take less than itself
        return count * (self.turn + longer * steps)

    def adding(self, entries: int) -> Kernel:
        """Adding the ``entries`` that one turn of the loop gives to the running total."""
        kernel = self.elementwise.price(entries, 2 * entries)
        if kernel.bytes > self.machine.cached:
            return kernel
        seconds = self.calls.together(self.calls.launch + kernel.bytes / self.added)
        return replace(kernel, seconds=min(seconds, kernel.seconds))
