"""CUDA graphs of programs, captured warm and cold, and programs inside ``torch.compile``."""

import torch

import tnconv
from benchmarks.device.plan_choices import LAYERS, networks
from benchmarks.device.sections import Found, Rows, error
from tnconv import functional

CAPTURED = ("resnet 7x7/2 @224", "depthwise 96 7x7 @56", "resnet 64 3x3 @56", "small 16 3x3 @14")


def graphs(rows: Rows) -> None:
    """Replayed values, values of eager calls afterwards, and times of both."""
    rows.attempt("torch.compile", lambda: compiled(rows))
    if not rows.setting.cuda:
        return
    for layer in CAPTURED:
        for operation in ("kfac_reduce", "kfac_expand", "gradient norms"):
            for warm in (True, False):
                rows.attempt(
                    f"{operation}, {layer}, {'warm' if warm else 'cold'}",
                    lambda o=operation, at=layer, w=warm: captured(rows, o, at, w),
                )


def captured(rows: Rows, operation: str, layer: str, warm: bool) -> Found:
    """A program that ran before the capture, or never."""
    setting = rows.setting
    net = networks(LAYERS[layer], 8)[operation]

    def random() -> list[torch.Tensor]:
        return [torch.randn(shape, device=setting.device) for shape in net.operands.values()]

    operands = random()
    program = tnconv.compile(net, device=setting.device)
    torch.mm(operands[0].flatten(1)[:, :8].T, operands[0].flatten(1)[:, :8])  # cuBLAS is ready
    if warm:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                program.run(*operands)
        torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = program.run(*operands)
    eager = program.run(*operands)  # what was kept from the capture would be garbage here
    fresh = tnconv.compile(net, device=setting.device).run(*operands)
    off = error(eager, fresh)
    for operand, other in zip(operands, random(), strict=True):
        operand.copy_(other)
    graph.replay()
    wanted = tnconv.compile(net, device=setting.device).run(*operands)
    replayed = error(result, wanted)
    if max(off, replayed) > 1e-2:
        raise ValueError(f"replay wrong by {replayed:.1e}, eager afterwards by {off:.1e}")
    return {
        "replay error": replayed,
        "eager error": off,
        "eager ms": setting.milliseconds(lambda: program.run(*operands), 0.05),
        "graph ms": setting.milliseconds(graph.replay, 0.05),
    }


def compiled(rows: Rows) -> Found:
    """``mode="reduce-overhead"`` on a CUDA device, the eager back end elsewhere."""
    setting = rows.setting

    def factor(x: torch.Tensor) -> torch.Tensor:
        return functional.kfac_reduce(x, 3, padding=1)

    how = {"mode": "reduce-overhead"} if setting.cuda else {"backend": "eager"}
    x = torch.randn(8, 16, 14, 14, device=setting.device)
    fast = torch.compile(factor, fullgraph=True, **how)  # type: ignore[call-overload]
    for _ in range(3):
        value = fast(x).clone()
    off = error(value, factor(x))
    return {
        "error": off,
        "ms": setting.milliseconds(lambda: fast(x), 0.05),
        "eager ms": setting.milliseconds(lambda: factor(x), 0.05),
    }
