"""Chosen plans against the best of other routes: predicted and measured time and memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import geometric_mean

import torch

import tnconv
from benchmarks.device.sections import Found, Rows, error
from tnconv import diagrams
from tnconv.codegen.programs.tuning import candidates
from tnconv.diagrams import Expression

BATCH = 32
FEW = 5  # programs of a network that are measured


@dataclass(frozen=True)
class Geometry:
    """A convolution by its shapes and torch's keywords."""

    input_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1

    @property
    def keywords(self) -> Mapping[str, int]:
        names = ("stride", "padding", "dilation", "groups")
        return {name: getattr(self, name) for name in names}


LAYERS: Mapping[str, Geometry] = {
    "resnet 7x7/2 @224": Geometry((3, 224, 224), (64, 3, 7, 7), stride=2, padding=3),
    "resnet 64 3x3 @56": Geometry((64, 56, 56), (64, 64, 3, 3), padding=1),
    "resnet 64-128 3x3/2 @56": Geometry((64, 56, 56), (128, 64, 3, 3), stride=2, padding=1),
    "resnet 64-128 1x1/2 @56": Geometry((64, 56, 56), (128, 64, 1, 1), stride=2),
    "resnet 256-64 1x1 @56": Geometry((256, 56, 56), (64, 256, 1, 1)),
    "resnet 512 3x3 @7": Geometry((512, 7, 7), (512, 512, 3, 3), padding=1),
    "depthwise 96 3x3/2 @56": Geometry((96, 56, 56), (96, 1, 3, 3), 2, 1, groups=96),
    "depthwise 96 7x7 @56": Geometry((96, 56, 56), (96, 1, 7, 7), padding=3, groups=96),
    "resnext 128 32 groups @56": Geometry((128, 56, 56), (128, 4, 3, 3), padding=1, groups=32),
    "patches 16/16 @224": Geometry((3, 224, 224), (768, 3, 16, 16), stride=16),
    "signal 64 k9 d2": Geometry((64, 1000), (64, 64, 9), padding=8, dilation=2),
    "small 16 3x3 @14": Geometry((16, 14, 14), (16, 16, 3, 3), padding=1),
}


def networks(layer: Geometry, batch: int) -> dict[str, Expression]:
    """The networks that users need most, of one layer."""
    x, weight, how = (batch, *layer.input_shape), layer.weight_shape, layer.keywords
    net = diagrams.conv(x, weight, **how)
    return {
        "kfac_expand": diagrams.kfac_expand(x, weight[2:], **how),
        "per-sample gradients": net.vjp("weight", per_sample=True),
        "gradient norms": diagrams.gradient_norms(net),
        "weight gradient": net.vjp("weight"),
        "forward": net,
        "input gradient": net.vjp("x"),
        "kfac_reduce": diagrams.kfac_reduce(x, weight[2:], **how),
        "squared gradients": diagrams.ggn_diagonal(net, "weight"),
        "gradient products": diagrams.gradient_dots(net, "weight"),
    }


def plan_choices(rows: Rows) -> None:
    """A row for each layer and operation, then how far choices are from the best."""
    tiny = rows.setting.tiny
    layers = {"small 16 3x3 @14": LAYERS["small 16 3x3 @14"]} if tiny else LAYERS
    names = list(networks(LAYERS["small 16 3x3 @14"], 1))
    for operation in names[:2] if tiny else names:
        for layer, geometry in layers.items():
            net = networks(geometry, 2 if tiny else BATCH)[operation]
            rows.attempt(f"{operation}, {layer}", lambda net=net: compared(rows, net))
            if rows.setting.cuda:
                torch.cuda.empty_cache()
    measured = [row for row in rows.rows if "regret" in row]
    if measured:
        regrets = [float(str(row["regret"])) for row in measured]
        predicted = [float(str(row["price over time"])) for row in measured]
        rows.rows.append(
            {
                "name": "all",
                "rows": len(measured),
                "mean regret": geometric_mean(regrets),
                "worst regret": max(regrets),
                "mean price over time": geometric_mean(predicted),
            }
        )


def compared(rows: Rows, net: Expression) -> Found:
    """Of the chosen program and the best of other routes."""
    setting = rows.setting
    program = tnconv.compile(net, device=setting.device)
    operands = [torch.randn(shape, device=setting.device) for shape in program.operands.values()]
    expected, times, kept = program.run(*operands), dict[str, object](), []
    for way in candidates(program)[:FEW]:
        label = " + ".join(plans[0].label for plans in way.terms)
        taken = setting.milliseconds(lambda way=way: way.run(*operands), 0.06)
        kept.append(taken)
        times[label] = {
            "ms": taken,
            "predicted": way.schedule.seconds * 1e3,
            "kernels": len(way.steps),
            "error": error(way.run(*operands), expected),
        }
    flops = sum(step.kernel.flops for step in program.steps if step.kernel)
    moved = sum(step.kernel.bytes for step in program.steps if step.kernel)
    return {
        "ms": kept[0],
        "regret": kept[0] / min(kept),
        "price over time": program.schedule.seconds * 1e3 / kept[0],
        "Tflop/s": flops / kept[0] / 1e9,
        "TB/s": moved / kept[0] / 1e9,
        "MiB": setting.mebibytes(lambda: program.run(*operands)),
        "predicted MiB": program.peak_memory() / 2**20,
        "programs": times,
    }
