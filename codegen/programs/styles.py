"""Styles: the ways in which the steps of a program can be printed."""

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from tnconv.codegen.lowering.schedule import Schedule
from tnconv.codegen.programs import einsum_style, source
from tnconv.codegen.programs.source import Function


class Printer(Protocol):
    """Functions that run the steps of a schedule: see `source.definition`."""

    def __call__(
        self,
        name: str,
        arguments: Sequence[str],
        indices: Collection[str],
        schedule: Schedule,
        several: bool,
        spare: int,
    ) -> list[Function]: ...


STYLES: Mapping[str, Printer] = {
    "torch": source.definition,
    "einsum": einsum_style.definition,
}
