"""Kernels of our own: values against float64 on the processor, times against the best other route.

A row for each layer and format says what the kernel takes on the input and on a padded one, what
the best of the other routes takes, and what a table without a margin would choose. Rows of tiles
say which side is fastest: `tiling` chooses it from sizes.
"""

from collections.abc import Mapping
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

import tnconv
from benchmarks.device.facts import tf32_products
from benchmarks.device.plan_choices import BATCH, LAYERS, Geometry
from benchmarks.device.sections import Found, Rows, error
from tnconv import diagrams
from tnconv.codegen import ROUTES
from tnconv.codegen.kernels.launching import has_kernel, launched
from tnconv.codegen.kernels.patch_gram import patch_gram
from tnconv.codegen.kernels.tiling import SIDES, Tiling, tiling
from tnconv.codegen.kernels.windows import Windows, unfolded_gram
from tnconv.codegen.programs.tuning import candidates

TRIED = (
    "resnet 64 3x3 @56",
    "resnet 7x7/2 @224",
    "resnet 64-128 3x3/2 @56",
    "resnet 512 3x3 @7",
    "resnext 128 32 groups @56",
    "depthwise 96 7x7 @56",
    "signal 64 k9 d2",
)
TINY = "small 16 3x3 @14"
FORMATS: Mapping[str, tuple[torch.dtype, str]] = {
    "float32": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "float16": (torch.float16, "ieee"),
    "bfloat16": (torch.bfloat16, "ieee"),
    "float32 by three tf32": (torch.float32, "tf32x3"),
    "float64": (torch.float64, "ieee"),
}
"""Dtypes, and formats of products of float32; the last two are for values and for later."""
FEW = 3  # programs of other routes that are measured
SAMPLES = 4  # whose values are compared
OTHERS = tuple(name for name in ROUTES if name != "patch gram")


def own_kernels(rows: Rows) -> None:
    """Values and times of products of patches."""
    tiny = rows.setting.tiny
    for layer in (TINY,) if tiny else TRIED:
        for name in ("float32", "float64") if tiny else FORMATS:
            rows.attempt(
                f"patch gram, {layer}, {name}",
                lambda layer=layer, name=name: measured(rows, LAYERS[layer], name),
            )
            if rows.setting.cuda:
                torch.cuda.empty_cache()
    for layer in TRIED[: 0 if tiny else 4]:
        rows.attempt(f"tiles, {layer}", lambda layer=layer: tiles(rows, LAYERS[layer]))


def windows_of(layer: Geometry) -> Windows:
    """The windows of a layer whose numbers are the same in all dimensions."""
    kernel_size = layer.weight_shape[2:]
    reach = [layer.dilation * (k - 1) + 1 for k in kernel_size]
    sizes = zip(layer.input_shape[1:], reach, strict=True)
    positions = tuple((i + 2 * layer.padding - r) // layer.stride + 1 for i, r in sizes)
    each = [(number,) * len(positions) for number in (layer.stride, layer.padding, layer.dilation)]
    return Windows(kernel_size, positions, *each, layer.groups)


def measured(rows: Rows, layer: Geometry, name: str) -> Found:
    """Error, milliseconds, and the best of other routes, in one format."""
    setting, (dtype, precision) = rows.setting, FORMATS[name]
    given, batch = windows_of(layer), 2 if setting.tiny else BATCH
    x = torch.randn(batch, *layer.input_shape, device=setting.device, dtype=dtype)
    few = x[:SAMPLES]
    found: dict[str, object] = {"runs": has_kernel(x)}
    found["error"] = error(called(few, given, precision), unfolded_gram(few.double().cpu(), given))
    found["mirrored"] = bool(torch.equal(mine := called(few, given, precision), mine.mT))
    ms = setting.milliseconds(lambda: called(x, given, precision), 0.04)
    flops = x.shape[0] * prod(given.positions) * given.rows(x) ** 2 * given.groups
    found |= {"ms": ms, "Tflop/s of the triangle": flops / ms / 1e9}
    inside = given._replace(padding=(0,) * len(given.padding))
    padded = F.pad(x, [layer.padding] * 2 * len(given.padding))
    found["ms padded before"] = setting.milliseconds(
        lambda: called(padded, inside, precision), 0.04
    )
    if x.dim() == 4:
        last = x.to(memory_format=torch.channels_last)
        found["ms channels last"] = setting.milliseconds(
            lambda: called(last, given, precision), 0.04
        )
    if precision == "tf32":
        with tf32_products():
            return found | best_other(rows, layer, x)
    return found | best_other(rows, layer, x)


def called(x: Tensor, given: Windows, precision: str) -> Tensor:
    """By the kernel in a format of products; as programs do where it does not run."""
    return launched(x, given, precision) if has_kernel(x) else patch_gram(x, *given)


def best_other(rows: Rows, layer: Geometry, x: Tensor) -> Found:
    """What programs without the kernel take, and which one the compiler chooses with it."""
    setting, kernel_size = rows.setting, layer.weight_shape[2:]
    network = diagrams.kfac_expand(tuple(x.shape), kernel_size, **layer.keywords)
    how = {"device": setting.device, "dtype": x.dtype}
    ways = candidates(tnconv.compile(network, routes=OTHERS, **how))[:FEW]
    times = {
        " + ".join(plans[0].label for plans in way.terms): setting.milliseconds(
            lambda way=way: way.run(x), 0.04
        )
        for way in ways
    }
    chosen = tnconv.compile(network, **how)
    ours = [plan for plan in chosen.terms[0] if "patch gram" in plan.routes]
    return {
        "others": times,
        "best other ms": min(times.values()),
        "chosen": chosen.terms[0][0].label,
        "predicted ms": ours[0].seconds * 1e3 if ours else None,
    }


def tiles(rows: Rows, layer: Geometry) -> Found:
    """Milliseconds by the side of tiles, in float32 and in TF32, and the side that is taken."""
    setting, given = rows.setting, windows_of(layer)
    x = torch.randn(BATCH, *layer.input_shape, device=setting.device)
    if not has_kernel(x):
        return {"runs": False}
    count, total = given.rows(x), len(x) * prod(given.positions)
    units = torch.cuda.get_device_properties(setting.device).multi_processor_count
    found: dict[str, object] = {"taken": tiling(count, given.groups, total, 4, units, False).block}
    for precision in ("ieee", "tf32"):
        for side in SIDES:
            ways: dict[str, float] = {}
            for splits in (1, 4, 16):
                depth = 128 // x.element_size()
                part = depth * -(-total // (depth * splits))
                way = Tiling(side, depth, -(-count // side), part, -(-total // part))
                ways[f"{splits} parts"] = setting.milliseconds(
                    lambda way=way, of=precision: launched(x, given, of, way), 0.02
                )
            found[f"{precision}, {side}"] = ways
    return found
