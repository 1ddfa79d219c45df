"""Styles: the ways in which the steps of a program can be printed."""

from collections.abc import Callable, Mapping

from tnconv.codegen.programs import einsum_style, source
from tnconv.codegen.programs.source import Definition, Function

STYLES: Mapping[str, Callable[[Definition], list[Function]]] = {
    "torch": source.printed,
    "einsum": einsum_style.printed,
}
