"""Half precision, channels-last tensors, mixed precision with a scaler, and what layers hold."""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from benchmarks.device.model_values import LOSS
from benchmarks.device.plan_choices import BATCH, LAYERS, Geometry
from benchmarks.device.sections import Found, Rows
from tnconv import functional
from tnconv import nn as tnn
from tnconv.optim import KFAC

Call = Callable[[], object]
TRIED = (
    "resnet 64 3x3 @56",
    "resnet 64-128 1x1/2 @56",
    "resnet 512 3x3 @7",
    "patches 16/16 @224",
)


def precision_layouts(rows: Rows) -> None:
    """Times next to torch's in the same dtype and memory format."""
    tiny = rows.setting.tiny
    dtypes = (torch.bfloat16,) if tiny else (torch.float16, torch.bfloat16, torch.float32)
    for dtype in dtypes:
        if dtype != torch.float32:
            rows.attempt(f"KFAC under autocast, {dtype}", lambda dtype=dtype: scaled(rows, dtype))
        for layer in TRIED[: 0 if tiny else None]:
            rows.attempt(
                f"{dtype}, {layer}", lambda dtype=dtype, at=layer: formats(rows, dtype, at)
            )
    if rows.setting.cuda:
        rows.attempt("held by layers", lambda: held(rows))


def formats(rows: Rows, dtype: torch.dtype, layer: str) -> Found:
    """Forward, both gradients and the expanded factor, in both memory formats."""
    found = dict[str, object]()
    for memory_format in (torch.contiguous_format, torch.channels_last):
        name = str(memory_format).removeprefix("torch.")
        more = in_format(rows, dtype, LAYERS[layer], memory_format)
        found |= {f"{what}, {name}": value for what, value in more.items()}
    return found


def in_format(
    rows: Rows, dtype: torch.dtype, layer: Geometry, memory_format: torch.memory_format
) -> Found:
    """Torch's time over ours, whether a result keeps torch's format, and the factor's time."""
    setting, how, kernel = rows.setting, dict(layer.keywords), layer.weight_shape[2:]
    x = torch.randn(BATCH, *layer.input_shape, device=setting.device, dtype=dtype)
    weight = torch.randn(layer.weight_shape, device=setting.device, dtype=dtype)
    x, weight = x.to(memory_format=memory_format), weight.to(memory_format=memory_format)
    reference = nn.functional.conv2d(x, weight, **how)
    v = torch.randn_like(reference)
    sides = [[how[name]] * 2 for name in ("stride", "padding", "dilation")]

    def gradient(*mask: bool) -> object:
        return torch.ops.aten.convolution_backward(
            v, x, weight, [0], *sides, False, [0, 0], layer.groups, mask
        )

    pairs: Mapping[str, tuple[Call, Call]] = {
        "forward": (
            lambda: functional.conv(x, weight, **how),
            lambda: nn.functional.conv2d(x, weight, **how),
        ),
        "weight gradient": (
            lambda: functional.weight_vjp(x, layer.weight_shape, v, **how),
            lambda: gradient(False, True, False),
        ),
        "input gradient": (
            lambda: functional.input_vjp(x.shape, weight, v, **how),
            lambda: gradient(True, False, False),
        ),
    }
    found: dict[str, object] = {}
    for operation, (ours, torchs) in pairs.items():
        ours()
        taken = setting.milliseconds(ours, 0.04)
        found[operation] = setting.milliseconds(torchs, 0.04) / taken
    kept = functional.conv(x, weight, **how)
    found["keeps torch's format"] = kept.stride() == reference.stride()
    found["kfac_expand ms"] = setting.milliseconds(
        lambda: functional.kfac_expand(x, kernel, **how), 0.04
    )
    return found


def scaled(rows: Rows, dtype: torch.dtype) -> Found:
    """Three steps of mixed precision."""
    device = rows.setting.device
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)).to(device)
    scaler = torch.amp.GradScaler(device.type)
    optimizer = KFAC(model, fisher="empirical", loss_scale=scaler.get_scale)
    x, y = torch.rand(6, 3, 8, 8, device=device), torch.randint(5, (6,), device=device)
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype):
            loss = LOSS(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    if not all(bool(p.isfinite().all()) for p in model.parameters()):
        raise ValueError("parameters are not finite")
    return {"ran": True}


def held(rows: Rows) -> Found:
    """MiB that torch's layers and the memory-saving ones hold for the backward pass, and peak."""
    device, found = rows.setting.device, dict[str, object]()
    for name in ("torch", "save_memory"):
        model: nn.Module = nn.Sequential(
            nn.Conv2d(3, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.AvgPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1),
        ).to(device)
        if name == "save_memory":
            model = tnn.save_memory(model) or model
        x = torch.randn(64, 3, 128, 128, device=device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        total = model(x).sum()
        found[f"{name} held MiB"] = (torch.cuda.memory_allocated(device) - before) / 2**20
        total.backward()
        found[f"{name} peak MiB"] = (torch.cuda.max_memory_allocated(device) - before) / 2**20
    return found
