"""Checks of a call's operands, written out for each program: loops take as long as kernels."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from tnconv.codegen.programs.batches import Batches

Shapes = Mapping[str, tuple[int, ...]]
_AUTOCAST_DEVICES = frozenset(
    device for device in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(device)
)
_BY_POSITION = """
def by_position(program, {given}):
    try:
        fits = {fits}
    except (AttributeError, IndexError):
        fits = False
    if not fits:
        check({given})
    if {casts}:
        return program.run_cast({given})
    return contraction({given})
"""
_BY_NAME = """
def by_name(program, given):
    if len(given) != {count}{missing}:
        check(given)
    return by_position(program, {given})
"""


def by_position(
    contraction: Callable[..., Any],
    shapes: Shapes,
    indices: Collection[str],
    casts: Sequence[str] = (),
    batches: Batches | None = None,
) -> Callable[..., Any]:
    """A function of a program and its operands that checks them and calls ``contraction``.

    Args:
        contraction: The program's function.
        shapes: The shapes of the operands by name.
        indices: The operands that are integers.
        casts: Conditions on the first operand, as source that follows its name (again for ``{}``),
            under which the program's ``run_cast`` is called instead, as it is under autocast.
        batches: The sizes for which the program runs, if it runs for several.
    """
    variables = {name: f"operand_{at}" for at, name in enumerate(shapes)}
    first, *others = [variables[name] for name in shapes if name not in indices] or ["operand_0"]
    fits = [f"isinstance({first}, Tensor)"] if shapes else []
    shape = "shape_{}" if batches is None else "shapes[{}]"
    if batches is not None:
        operand, dim = batches.place
        size = f"{variables[operand]}.shape[{dim}]"
        fits.append(f"(shapes := known.get({size})) is not None")
    fits += [f"{variables[name]}.shape == {shape.format(at)}" for at, name in enumerate(shapes)]
    fits += [f"{other}.dtype is {first}.dtype" for other in others]
    fits += [f"{variables[name]}.dtype is int64" for name in shapes if name in indices]
    fits += _on_one_device(first, [each for each in variables.values() if each != first])
    asked = " or ".join(f"{first}.{question.format(first)}" for question in casts if shapes)
    words = {
        "given": ", ".join(variables.values()),
        "fits": " and ".join(fits) or "True",
        "casts": "autocasts()" + (f" or {first}.dtype is not float32 and ({asked})" * bool(asked)),
    }
    seen: dict[int, tuple[tuple[int, ...], ...]] = {}

    def explain(*given: Tensor) -> None:
        named = dict(zip(shapes, given, strict=True))
        check(shapes if batches is None else batches.shapes_for(named), named, indices)
        if batches is not None:
            seen[given[list(shapes).index(operand)].shape[dim]] = tuple(
                tuple(array.shape) for array in given
            )

    known = {"contraction": contraction, "check": explain, "Tensor": Tensor, "known": seen}
    dtypes = {str(each)[6:]: each for each in (torch.int64, torch.float16, torch.float32)}
    sizes = {f"shape_{at}": tuple(shape) for at, shape in enumerate(shapes.values())}
    autocasts = torch._C._is_any_autocast_enabled
    return _defined(
        "by_position", _BY_POSITION.format(**words), **known, **dtypes, **sizes, autocasts=autocasts
    )


def _on_one_device(first: str, others: Sequence[str]) -> list[str]:
    """A condition on the operands' devices: they take 0.4 us to compare, so processors go first."""
    if not others:
        return []
    all_on_processors = " and ".join(f"{each}.is_cpu" for each in (first, *others))
    all_alike = " and ".join(f"{other}.device == {first}.device" for other in others)
    return [f"({all_on_processors} or {all_alike})"]


def by_name(
    by_position: Callable[..., Any],
    shapes: Shapes,
    indices: Collection[str],
    batches: Batches | None = None,
) -> Callable[..., Any]:
    """A function of a program and a dictionary of its operands, which calls ``by_position``."""
    text = _BY_NAME.format(
        count=len(shapes),
        missing="".join(f" or {name!r} not in given" for name in shapes),
        given=", ".join(f"given[{name!r}]" for name in shapes),
    )

    def explain(given: Mapping[str, Tensor]) -> None:
        check(shapes if batches is None else batches.shapes_for(given), given, indices)

    return _defined("by_name", text, by_position=by_position, check=explain)


def _defined(name: str, text: str, **known: Any) -> Callable[..., Any]:
    exec(_code(text), known)
    function: Callable[..., Any] = known[name]
    return function


@lru_cache(maxsize=256)
def _code(text: str) -> CodeType:
    """The compiled text. Programs that differ in sizes only have the same checks."""
    return compile(text, "<checks of a tnconv program>", "exec")


def check(
    expected: Shapes,
    given: Mapping[str, Tensor],
    indices: Collection[str] = (),
) -> None:
    """Raise unless ``given`` are tensors of the expected names and shapes, one dtype and device.

    Those that ``indices`` names are int64.

    Raises:
        ValueError: an operand is missing, unknown, or of another shape, dtype or device.
        TypeError: an operand is not a tensor.
    """
    from tnconv.diagrams.reference import check_operands

    check_operands(expected, given, indices)
    values = [(name, array) for name, array in given.items() if name not in indices]
    first = values[0] if values else next(iter(given.items()), None)
    for name, array in given.items():
        assert first is not None
        if array.device != first[1].device:
            raise ValueError(
                f"operand {name!r} is on {array.device} and {first[0]!r} on {first[1].device}; "
                "expected one device"
            )
        if name not in indices and after_autocast(array) != after_autocast(first[1]):
            raise ValueError(
                f"operand {name!r} has dtype {array.dtype} and {first[0]!r} {first[1].dtype}; "
                "expected one dtype"
            )


def after_autocast(array: Tensor) -> torch.dtype:
    """The dtype in which torch's own convolutions would take a tensor, here and now."""
    device = array.device.type
    if array.is_floating_point() and array.dtype != torch.float64 and device in _AUTOCAST_DEVICES:
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
    return array.dtype
