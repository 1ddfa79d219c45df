"""How results show themselves: names, quantities and shapes, and never a tensor's contents."""

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

MANY = 60
"""Rows of a table that are shown; how many are left is said."""
FEW = 8
"""Fields of a line that are shown, and entries of a sequence."""


def described(value: object) -> str:
    """A tensor's shape, the shapes of several, or the type of something else.

    >>> import torch
    >>> described(torch.rand(3, 4)), described((torch.rand(2), None)), described(0.5)
    ('(3, 4)', '(2,), None', '0.5')
    """
    if isinstance(value, Tensor):
        return str(tuple(value.shape))
    if value is None or isinstance(value, bool | int | str):
        return str(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return f"{len(value)} entries by name" if value else "nothing"
    if isinstance(value, tuple | list) and len(value) <= FEW:
        return ", ".join(map(described, value)) or "nothing"
    if isinstance(value, tuple | list | set | frozenset):
        return f"{len(value)} entries"
    return str(getattr(value, "__name__", type(value).__name__))


def text_table(rows: Iterable[Sequence[str]]) -> str:
    """Columns that are as wide as they need to be; the first row is the head."""
    shown = _shortened([*rows])
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    lines = ("  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)) for row in shown)
    return "\n".join(line.rstrip() for line in lines)


def html_table(title: str, rows: Iterable[Sequence[str]]) -> str:
    """The same as notebooks show it."""
    head, *body = _shortened([*rows])

    def line(cells: Sequence[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

    lines = "".join(line(cells, "td") for cells in body)
    caption = f"<caption>{html.escape(title)}</caption>"
    return f"<table>{caption}<thead>{line(head, 'th')}</thead><tbody>{lines}</tbody></table>"


def _shortened(rows: list[Sequence[str]]) -> list[Sequence[str]]:
    left = len(rows) - 1 - MANY
    if left <= 0:
        return rows
    return [*rows[: MANY + 1], (f"{left} more", *[""] * (len(rows[0]) - 1))]


class Shown:
    """One line with the shape of each field or public attribute, and a table in notebooks.

    A dataclass that inherits it says ``repr=False``.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return line_of(type(self).__name__, self._fields())

    def _repr_html_(self) -> str:
        rows = [(name, described(value)) for name, value in self._fields()]
        return html_table(type(self).__name__, [("name", "shape or value"), *rows])

    def _fields(self) -> list[tuple[str, Any]]:
        if is_dataclass(self):
            return [(each.name, getattr(self, each.name)) for each in fields(self)]
        return [(name, value) for name, value in vars(self).items() if not name.startswith("_")]


def line_of(title: str, named: Sequence[tuple[str, Any]]) -> str:
    """A title, and a few names with what they hold.

    >>> import torch
    >>> line_of("Flow", [("gradient", None), ("diagonal", torch.rand(2, 3))])
    '<Flow: gradient None; diagonal (2, 3)>'
    """
    parts = [f"{name} {described(value)}" for name, value in named[:FEW]]
    parts += [f"{len(named) - FEW} more"] * (len(named) > FEW)
    return f"<{title}: {'; '.join(parts)}>" if parts else f"<{title}>"


def shown_tuple(self: Any) -> str:
    """The ``__repr__`` of named tuples of tensors, which can inherit nothing."""
    return line_of(type(self).__name__, [*self._asdict().items()])


def matrix_over(title: str, space: Mapping[str, Tensor]) -> str:
    """A square matrix over all entries of some parameters, by its shape.

    >>> import torch
    >>> matrix_over("Euclidean", {"weight": torch.rand(2, 3), "bias": torch.rand(2)})
    '<Euclidean of shape (8, 8) over 2 parameters, torch.float32, cpu>'
    """
    size = sum(part.numel() for part in space.values())
    first = next(iter(space.values()))
    many = f"{len(space)} parameter{'s' * (len(space) != 1)}"
    return f"<{title} of shape {(size, size)} over {many}, {first.dtype}, {first.device}>"
