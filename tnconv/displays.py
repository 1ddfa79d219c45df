"""How results show themselves: names, quantities and shapes, and never a tensor's contents."""

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor

MANY = 60
"""Rows of a table that are shown; how many are left is said."""


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
    if isinstance(value, tuple | list):
        return ", ".join(map(described, value))
    return type(value).__name__


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
    """For dataclasses of tensors: one line with the shape of each field, and a table in notebooks.

    A dataclass that inherits it says ``repr=False``.
    """

    def __repr__(self) -> str:
        parts = (f"{name} {described(value)}" for name, value in self._fields())
        return f"<{type(self).__name__}: {'; '.join(parts)}>"

    def _repr_html_(self) -> str:
        rows = [(name, described(value)) for name, value in self._fields()]
        return html_table(type(self).__name__, [("name", "shape or value"), *rows])

    def _fields(self) -> list[tuple[str, Any]]:
        return [(each.name, getattr(self, each.name)) for each in fields(self)]  # type: ignore[arg-type]
