"""What was measured or searched for once, kept on disk: JSON, one file for each key."""

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeAlias

import torch

from tnconv.diagrams.notices import warn

Json: TypeAlias = "str | int | float | bool | list[Json] | dict[str, Json] | None"
VARIABLE = "TNCONV_CACHE_DIR"
SMALLEST = 1e-100


def directory() -> Path:
    """``TNCONV_CACHE_DIR``, else ``tnconv`` in ``XDG_CACHE_HOME`` or in ``~/.cache``."""
    if chosen := os.environ.get(VARIABLE):
        return Path(chosen)
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path.home() / ".cache") / "tnconv"


def load(kind: str, key: Mapping[str, Json]) -> Json:
    """The value stored for a key, or None. A file of something else is ignored with a warning."""
    path = _path(kind, key)
    try:
        text = path.read_text(encoding="utf-8")
        entry = json.loads(text, parse_float=_number, parse_constant=_number)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:  # also no JSON, no text, deep nesting
        _warn(f"{path} is ignored: {type(error).__name__}")
        return None
    if not isinstance(entry, dict) or entry.get("key") != key or "value" not in entry:
        _warn(f"{path} is ignored: it holds no entry of its key")
        return None
    value: Json = entry["value"]
    return value


def _number(text: str) -> float:
    """What a measured number can be: zero, or of a size with which prices can be computed.

    Raises:
        ValueError: infinite, not a number, or so small or large that quotients leave the range.
    """
    value = float(text)
    if value != 0 and not SMALLEST < abs(value) < 1 / SMALLEST:
        raise ValueError(f"{text} is no measured number")
    return value


def save(kind: str, key: Mapping[str, Json], value: Json) -> None:
    """Store a value: written beside and renamed, so that other processes see all of it or nothing.

    Where that fails (a full disk, no permission) there is a warning, and nothing is stored.
    """
    path = _path(kind, key)
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8"
        ) as file:
            temporary = file.name
            json.dump({"key": key, "value": value}, file, indent=1, sort_keys=True)
        os.replace(temporary, path)
    except OSError as error:
        _warn(f"{path.parent} cannot be written: {type(error).__name__}")
        if temporary:
            Path(temporary).unlink(missing_ok=True)


def ignored(kind: str, key: Mapping[str, Json]) -> None:
    """Warn of a value that is not what its reader stores: it counts as missing."""
    _warn(f"{_path(kind, key)} is ignored: its value has an unexpected form")


def circumstances(device: torch.device) -> dict[str, Json]:
    """What measured times depend on: versions, the device, threads, and precision settings.

    The number of threads counts for processors only.
    """
    return {
        "tnconv": _version("tnconv"),
        "torch": torch.__version__,
        "device": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else 0,
        "precision": _precision(),
        **({"triton": _version("triton")} if device.type == "cuda" else {}),
    }


def _precision() -> dict[str, Json]:
    """Which formats float32 products and convolutions may use, and how kernels are chosen."""
    cudnn, onednn = torch.backends.cudnn, torch.backends.mkldnn
    families = {
        "cublas": torch.backends.cuda.matmul,
        "cudnn": getattr(cudnn, "conv", cudnn),
        "onednn products": getattr(onednn, "matmul", None),
        "onednn convolutions": getattr(onednn, "conv", None),
    }
    return {name: float32_format(family) for name, family in families.items()} | {
        "cudnn benchmark": cudnn.benchmark,
        "deterministic": cudnn.deterministic or torch.are_deterministic_algorithms_enabled(),
    }


def float32_format(family: object) -> Json:
    """The format in which kernels of `torch.backends.cuda.matmul`, or another, compute float32.

    ``"ieee"``, ``"tf32"`` or ``"bf16"`` from torch 2.9 on; before, whether TF32 is allowed.
    """
    setting: Json = getattr(family, "fp32_precision", None)
    if setting is None:
        return getattr(family, "allow_tf32", None)
    return "ieee" if setting == "none" else setting


@cache
def device_name(device: torch.device) -> str:
    """The accelerator's name, or the processor's."""
    if device.type != "cpu":
        named = getattr(torch.get_device_module(device), "get_device_name", lambda _: "")
        return f"{device.type} {named(device)}".strip()
    return f"cpu {torch.backends.cpu.get_cpu_capability()} {_processor()}"


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    if models:
        return models[0]
    return platform.processor() or platform.machine()


@cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a checkout, for one
        return "not installed"


def _path(kind: str, key: Mapping[str, Json]) -> Path:
    text = json.dumps(key, sort_keys=True)
    return directory() / kind / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


@cache
def _warn(message: str) -> None:
    """Warn, of each thing once."""
    warn(f"tnconv's cache: {message}", RuntimeWarning)
