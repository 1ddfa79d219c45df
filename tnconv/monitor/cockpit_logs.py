"""Reading the JSON logs of the published tool, Cockpit."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from tnconv.monitor.run_folder import Run


def read_cockpit_log(path: str | Path) -> Run:
    """A log ``{step: {quantity: value, ...}}`` as a run.

    Arrays are ``{"__ndarray__": nested lists, "dtype", "shape"}``, as json_tricks writes them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: what is no such log.
    """
    path = Path(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    steps = [key for key in found if key.lstrip("-").isdecimal()] if isinstance(found, dict) else []
    if not steps or any(not isinstance(found[key], dict) for key in steps):
        raise ValueError(f"{path.name} is no log of Cockpit; expected a mapping by step")
    run = Run(label=path.stem)
    for key in sorted(steps, key=int):
        values = {name: _read(value) for name, value in found[key].items()}
        run.records.append({"step": int(key), **values})
    lists = [v for r in run.records for n, v in r.items() if n == "GradNorm"]
    run.names = [f"param_{at}" for at in range(len(lists[0]))] if lists else ()
    return run


def _read(value: Any) -> Any:
    if isinstance(value, dict) and "__ndarray__" in value:
        made = np.array(value["__ndarray__"], dtype=value.get("dtype", "float64"))
        return made.reshape(value.get("shape", made.shape)) if made.shape else made.item()
    if isinstance(value, dict):
        return {key: _read(each) for key, each in value.items() if key != "__tuple__"}
    if isinstance(value, list):
        return [_read(each) for each in value]
    return value
