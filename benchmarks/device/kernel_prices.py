"""Every kernel of the considered programs: the time that the device takes, and its price.

A kernel is a step of a program, on operands as the program has them. Prices of one table can so be
compared with times, kind by kind, and another table be fitted from the rows.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import geometric_mean, median

import torch
from torch import Tensor

import tnconv
from benchmarks.device.plan_choices import BATCH, FEW, LAYERS, networks
from benchmarks.device.sections import Found, Rows, Setting
from tnconv.codegen.lowering.writer import Step
from tnconv.codegen.programs.names import Names
from tnconv.codegen.programs.program import Program
from tnconv.codegen.programs.tuning import candidates

TOGETHER = 10  # calls in a graph
LONGEST = 0.02  # seconds of a kernel by its price; longer ones are left out


@dataclass(frozen=True)
class Timed:
    """A step: its text with shapes and strides in the place of names, and its times."""

    text: str
    kind: str
    flops: int
    bytes: int
    predicted: float
    taken: float


def kernel_prices(rows: Rows) -> None:
    """A row for each dtype with all kernels, and price over time by kind."""
    tiny = rows.setting.tiny
    for dtype in (torch.float32,) if tiny else (torch.float32, torch.float16):
        rows.attempt(f"kernels in {dtype}", lambda dtype=dtype: kernels(rows, dtype))


def kernels(rows: Rows, dtype: torch.dtype) -> Found:
    """All kernels that the layers' programs have, each once."""
    setting, found = rows.setting, dict[str, Timed]()
    layers = {"small 16 3x3 @14": LAYERS["small 16 3x3 @14"]} if setting.tiny else LAYERS
    for geometry in layers.values():
        for net in networks(geometry, 2 if setting.tiny else BATCH).values():
            if not rows.left:
                break
            program = tnconv.compile(net, device=setting.device, dtype=dtype)
            for way in candidates(program, item=dtype.itemsize)[: 1 if setting.tiny else FEW]:
                for each in timed(way, setting, dtype, found):
                    found[each.text] = each
        if setting.cuda:
            torch.cuda.empty_cache()
    ratios = defaultdict[str, list[float]](list)
    for each in found.values():
        ratios[each.kind].append(each.predicted / each.taken)
    return {
        "kinds": {
            kind: {
                "count": len(of),
                "mean": geometric_mean(of),
                "median": median(of),
                "least": min(of),
                "most": max(of),
            }
            for kind, of in sorted(ratios.items())
        },
        "kernels": [vars(each) for each in found.values()],
    }


def timed(
    program: Program, setting: Setting, dtype: torch.dtype, known: dict[str, Timed]
) -> Iterator[Timed]:
    """The steps of a program that are not known yet, one after the other."""
    if any(step.kernel.seconds > LONGEST for step in program.steps):
        return
    operands = [
        torch.randn(shape, device=setting.device, dtype=dtype)
        for shape in program.operands.values()
    ]
    arguments = [f"operand_{at}" for at in range(len(operands))]
    names = Names.of(arguments, program.steps)
    shown = Names(list(map(described, operands)))
    space: dict[str, object] = dict(program.function.__globals__)
    space |= {**dict(zip(arguments, operands, strict=True)), "like": operands[0]}
    space |= {"one": operands[0].new_ones(()), "torch": torch, "F": torch.nn.functional}
    for step in program.steps:
        call = eval(f"lambda: {names.call(step.value)}", space)  # a step of our own program
        value = call()
        text = shown.call(step.value)
        space[names.text(step.value)] = value
        shown = Names(shown.arguments, {**shown.given, step.value: described(value)})
        if text not in known and worth(step):
            kernel = step.kernel
            taken = seconds(call, setting)
            yield Timed(text, kernel.kind, kernel.flops, kernel.bytes, kernel.seconds, taken)


def worth(step: Step) -> bool:
    """Whether it is one kernel on operands, not a constant or a loop."""
    return bool(step.value.reads) and "loop" not in step.kernel.kind


def described(value: Tensor) -> str:
    """Shape and strides."""
    return f"<{list(value.shape)} {list(value.stride())}>"


def seconds(call: Callable[[], object], setting: Setting) -> float:
    """What the device takes, without the host's part: several calls in a CUDA graph."""
    if not setting.cuda:
        return setting.milliseconds(call, 0.01) / 1e3
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(TOGETHER):
            call()
    graph.replay()
    return min(setting.sample(graph.replay, 3) for _ in range(3)) / TOGETHER / 1e3
