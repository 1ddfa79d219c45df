"""A pretended accelerator: torch's Python backend with fake tensors; counts what is asked of it.

``python -m tests.pretended_device`` runs quantities and KFAC on a device ``gpu`` that computes
nothing, in a process of its own, since a backend stays registered. Hooks of backward passes run on
the engine's thread for the device, as with CUDA. It prints a line of JSON for each case: how often
the host waited for a number, how often tensors moved between devices, where results lie.
"""

import json
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves

from tnconv.codegen.prices.shipped import shipped

CUDA = torch.device("cuda", 0)
ASKED, MOVED = Counter[str](), Counter[str]()
LOCAL = threading.local()
RANDOM = ("uniform_", "normal_", "exponential_", "bernoulli_")
_dispatch, _register_hook = FakeTensorMode.dispatch, Tensor.register_hook


class Backend(getattr(backend_registration, "_DummyBackendModule", object)):  # torch >= 2.10
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def synchronize(self, device: object = None) -> None:
        pass


def dispatch(
    self: FakeTensorMode, func: Any, types: Any, args: Any = (), kwargs: Any = None
) -> Any:
    """Numbers are made up where the host asks for one; all else is as with fake tensors."""
    name, inner = str(func), getattr(LOCAL, "inner", False)
    if "_local_scalar_dense" in name:
        ASKED["number"] += args[0].device.type == "gpu"
        return not inverting() if args[0].dtype == torch.bool else 1
    if "aten.nonzero" in name:
        ASKED["positions"] += args[0].device.type == "gpu"
        with self:
            shape = max(1, args[0].numel() // 2), args[0].dim()
            return torch.empty(shape, dtype=torch.int64, device=args[0].device)
    if any(word in name for word in RANDOM):
        return args[0]
    LOCAL.inner = True
    try:
        result = _dispatch(self, func, types, args, kwargs or {})
    finally:
        LOCAL.inner = inner
    if not inner and ("_to_copy" in name or "copy_." in name):
        source = args[1] if "copy_" in name else args[0]
        if isinstance(source, Tensor) and isinstance(result, Tensor):
            kinds = source.device.type, result.device.type
            if kinds[0] != kinds[1]:
                MOVED["->".join(kinds)] += 1
    return result


def inverting() -> bool:
    """Whether a factorisation asks if it failed: the only question whose good answer is no."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and not frame.f_code.co_filename.endswith("optim/inverses.py"):
        frame = frame.f_back
    return frame is not None


def prepare() -> FakeTensorMode:
    """Register the device, with the prices of an accelerator; fake tensors on it from now on."""
    backend_registration._setup_privateuseone_for_python_backend("gpu", backend_module=Backend())
    import tnconv.codegen.compiler as compiler

    measured = compiler.coefficients

    def prices(device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
        return shipped(CUDA, dtype, 1) if device.type == "gpu" else measured(device, dtype)

    compiler.coefficients = prices
    mode = FakeTensorMode()

    def register_hook(self: Tensor, hook: Callable[[Any], Any]) -> Any:
        def wrapped(gradient: Any) -> Any:
            with mode:
                return hook(gradient)

        return _register_hook(self, wrapped)

    FakeTensorMode.dispatch = dispatch  # type: ignore[method-assign]
    Tensor.register_hook = register_hook  # type: ignore[method-assign]
    return mode


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """How often the host asked, and how often something moved, in the context."""
    found: dict[str, int] = {}
    before = sum(ASKED.values()), sum(MOVED.values())
    yield found
    found["asked"] = sum(ASKED.values()) - before[0]
    found["moved"] = sum(MOVED.values()) - before[1]


def network() -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 5))
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, device="gpu")
                module._parameters[name] = nn.Parameter(empty)
    return model


def kinds(result: object) -> list[str]:
    """Of the devices on which a result's tensors lie."""
    leaves = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
    return sorted({each.device.type for each in leaves})


def main() -> None:
    mode = prepare()
    import tnconv
    from tnconv.optim import KFAC
    from tnconv.quantities import Gradient

    loss_fn = nn.CrossEntropyLoss()

    def say(name: str, counts: dict[str, int], result: object) -> None:
        print(json.dumps({"name": name, **counts, "on": kinds(result)}), flush=True)

    with mode:
        x = torch.empty(6, 3, 8, 8, device="gpu")
        y = torch.zeros(6, dtype=torch.int64, device="gpu")
        # where samples are is told by values, which fake tensors have not: per-sample quantities
        # are for benchmarks.device
        with counted() as counts:
            result = tnconv.compute(network(), loss_fn, x, y, [Gradient()])[Gradient]
        say("compute", counts, dict(result))
        for inverse in ("cholesky", "eigen"):
            model = network()
            optimizer = KFAC(model, inverse=inverse, update_inverses_every=1)  # type: ignore[arg-type]
            for _ in range(2):
                optimizer.zero_grad()
                loss_fn(model(x), y).backward()
                with counted() as counts:
                    optimizer.step()
            state = [dict(each) for each in optimizer.state.values()]
            say(f"KFAC {inverse}", counts, state)


if __name__ == "__main__":
    main()
