"""A run on disk: scalars in JSON lines that are only appended to, arrays in one file per step.

``scalars.jsonl`` begins with a header; then every line has a step and some values, an alert, or
both. Lines of one step belong together. A line that was torn by a crash is skipped, and reported.
``arrays/step-<n>.npz`` is written under another name first, so that it is whole or not there.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from tnconv.diagrams.notices import warn
from tnconv.displays import Shown

SCALARS, ARRAYS = "scalars.jsonl", "arrays"
WORDS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
"""Numbers that JSON has not."""


class RunWriter:
    """Writes a run into a folder, which is made; a run that is there already is gone on with."""

    def __init__(self, folder: str | Path, header: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        (self.folder / ARRAYS).mkdir(parents=True, exist_ok=True)
        self.path = self.folder / SCALARS
        new = not self.path.exists() or not self.path.stat().st_size
        if not new:
            self._end_the_torn_line()
        if new:
            self._append({"header": dict(header)})
        else:
            self.resumed(header)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append the values of a step: numbers and lists of them, mappings, arrays."""
        scalars = {name: v for name, v in values.items() if not _has_arrays(v)}
        arrays = {name: v for name, v in values.items() if name not in scalars}
        if arrays:
            self._save(step, dict(_flat(arrays)))
        if scalars or not arrays:
            self._append({"step": step, **scalars})

    def resumed(self, header: Mapping[str, Any]) -> None:
        """Append another header: what is written from now on has other parameters."""
        self._append({"resumed": dict(header)})

    def alert(self, step: int, alert: Mapping[str, Any]) -> None:
        """Append an alert."""
        self._append({"step": step, "alert": dict(alert)})

    def _append(self, line: Mapping[str, Any]) -> None:
        text = json.dumps(_spelled(line), allow_nan=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def _end_the_torn_line(self) -> None:
        with self.path.open("rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")

    def _save(self, step: int, arrays: Mapping[str, Any]) -> None:
        path = self.folder / ARRAYS / f"step-{step:09d}.npz"
        if path.exists():
            try:
                with np.load(path) as held:
                    arrays = {**{name: held[name] for name in held.files}, **arrays}
            except Exception as error:
                warn(f"{path.name} cannot be read and is written anew: {type(error).__name__}")
        other = path.with_suffix(".part")
        with other.open("wb") as file:
            np.savez_compressed(file, **arrays)
        os.replace(other, path)


@dataclass(repr=False)
class Run(Shown):
    """A run that was read: records by step, names of parameters, alerts, and what was wrong.

    Args:
        records: one mapping of values for each step that was recorded.
        names: of the parameters, in the order of lists by parameter.
        alerts: what was raised, with its step.
        problems: what could not be read.
        label: what the run is called.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    names: Sequence[str] = ()
    alerts: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    label: str = ""

    def series(self, name: str) -> tuple[list[int], list[Any]]:
        """The steps at which something was recorded, and its values."""
        found = [(r["step"], r[name]) for r in self.records if name in r]
        return [step for step, _ in found], [value for _, value in found]

    @property
    def recorded(self) -> list[str]:
        """The names of all that was recorded."""
        return list(dict.fromkeys(k for r in self.records for k in r if k != "step"))

    def to_pandas(self) -> Any:
        """A table with a row for each step, lists and mappings in columns of their own."""
        return frame(self.records, self.names)


def read_run(folder: str | Path) -> Run:
    """Read a run, also while it is being written.

    Raises:
        FileNotFoundError: no run is there.
        ValueError: a file that is none of a run's.
    """
    folder = Path(folder)
    path = folder / SCALARS if folder.is_dir() else folder
    if not path.exists():
        raise FileNotFoundError(f"no run in {folder}; expected a folder with {SCALARS}")
    run, by_step, lines = Run(label=folder.name), dict[int, dict[str, Any]](), 0
    text = path.read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(text.split("\n")):
        if not line.strip():
            continue
        try:
            found = _read(json.loads(line))
            if not isinstance(found, dict):
                raise ValueError("no mapping")
        except ValueError:
            run.problems.append(f"line {number + 1} of {path.name} is torn and was skipped")
            continue
        if not _take(run, by_step, found):
            run.problems.append(f"line {number + 1} of {path.name} is none of a run's")
        lines += 1
    if run.problems and not lines and not text.startswith("{"):
        raise ValueError(f"{path.name} is no run; expected lines of JSON, of which one is a header")
    for file in sorted((path.parent / ARRAYS).glob("step-*.npz")):
        try:
            with np.load(file) as arrays:
                step = int(file.stem.partition("-")[2])
                by_step.setdefault(step, {"step": step}).update(_nested(arrays))
        except Exception as error:  # what zipfile, zlib and numpy raise is of a dozen kinds
            kind = type(error).__name__
            run.problems.append(f"{file.name} cannot be read and was skipped: {kind}")
    run.records = [by_step[step] for step in sorted(by_step)]
    for problem in run.problems:
        warn(problem)
    return run


def _take(run: Run, by_step: dict[int, dict[str, Any]], line: dict[str, Any]) -> bool:
    """Whether a line is one of a run, which it is added to."""
    header = line.get("header") or line.get("resumed")
    if header is not None:
        names = header.get("parameters", run.names) if isinstance(header, dict) else None
        if isinstance(names, list | tuple):
            run.names = names
        return isinstance(names, list | tuple)
    step, alert = line.pop("step", None), line.pop("alert", None)
    if not isinstance(step, int) or not _is_alert(alert):
        return False
    if alert is not None:
        run.alerts.append({"step": step, **alert})
    if line:
        by_step.setdefault(step, {"step": step}).update(line)
    return True


def _is_alert(given: Any) -> bool:
    """None, or what has the words of an alert."""
    words = ("level", "title", "text")
    return given is None or (
        isinstance(given, dict) and all(given.get(w) is not None for w in words)
    )


def frame(records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Any:
    """Records as a pandas table; arrays stay objects."""
    pd = import_module("pandas")
    rows = []
    for record in records:
        row: dict[str, Any] = {}
        for name, value in record.items():
            row |= dict(columns(name, value, names))
        rows.append(row)
    return pd.DataFrame(rows).set_index("step") if rows else pd.DataFrame()


def columns(name: str, value: Any, names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """A value as columns: lists by parameter, mappings by key."""
    if isinstance(value, list) and len(value) == len(names) and not _has_arrays(value):
        yield from ((f"{name}/{key}", each) for key, each in zip(names, value, strict=True))
    elif isinstance(value, Mapping) and not _has_arrays(value):
        yield from ((f"{name}/{key}", each) for key, each in value.items())
    else:
        yield name, value


def _has_arrays(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_has_arrays(each) for each in value.values())
    if isinstance(value, tuple | list):
        return any(isinstance(each, list | tuple) or _has_arrays(each) for each in value)
    return isinstance(value, np.ndarray)


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Arrays by path; ``#`` marks places in a sequence."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _flat(each, f"{name}/{key}" if name else str(key))
    elif isinstance(value, tuple | list) and any(isinstance(x, _NESTED) for x in value):
        for at, each in enumerate(value):
            yield from _flat(_rectangular(each), f"{name}/#{at}")
    else:
        yield name, np.asarray(math.nan if value is None else value)


_NESTED = (np.ndarray, list, tuple, Mapping)


def _rectangular(value: Any) -> Any:
    """Nested lists of numbers as an array, if they are one."""
    if not isinstance(value, list | tuple):
        return value
    try:
        found = np.asarray(value)
    except ValueError:
        return value
    return value if found.dtype == object else found


def _nested(arrays: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in arrays.files:
        *parents, last = path.split("/")
        here = found
        for each in parents:
            here = here.setdefault(each, {})
        here[last] = arrays[path]
    return {name: _sequences(value) for name, value in found.items()}


def _sequences(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    inner = {key: _sequences(each) for key, each in value.items()}
    if inner and all(key.startswith("#") for key in inner):
        return tuple(inner[f"#{at}"] for at in range(len(inner)))
    return inner


def _spelled(value: Any) -> Any:
    """With words for numbers that JSON has not."""
    if isinstance(value, Mapping):
        return {str(key): _spelled(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_spelled(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _read(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _read(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_read(each) for each in value]
    return WORDS.get(value, value) if isinstance(value, str) else value
