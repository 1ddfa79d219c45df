"""Drawing networks to files and notebooks: Graphviz, or pygraphviz where its program is missing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import graphviz

from tnconv.diagrams.expression import Expression
from tnconv.diagrams.look import Style
from tnconv.diagrams.network import TensorNetwork
from tnconv.diagrams.notation import equation
from tnconv.diagrams.notices import warn
from tnconv.diagrams.sketch import COLUMNS, dot, dot_steps
from tnconv.diagrams.tikz import tikz

FORMATS = ("svg", "pdf", "png", "dot", "tex")


@dataclass(frozen=True)
class Picture:
    """A picture that notebooks show and that can be saved."""

    graph: graphviz.Graph
    text: str
    dpi: int

    def save(self, path: str | Path) -> Path:
        """Write it; the suffix of ``path`` gives the format.

        Raises:
            ValueError: another suffix, or a folder that there is not.
        """
        return _write(path, lambda: self.graph, self.dpi)

    @property
    def svg(self) -> str | None:
        """The picture as SVG, or None where nothing can draw it."""
        drawn = _render(self.graph, "svg")
        return None if drawn is None else drawn.decode()

    def __repr__(self) -> str:
        return f"Picture of {self.text}"

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        svg = self.svg
        picture = {} if svg is None else {"image/svg+xml": svg}
        return {"text/plain": self.text} | picture


def draw(network: Expression, path: str | Path, **options: Any) -> Path:
    """Write a picture; the suffix of ``path`` gives the format: .svg, .pdf, .png, .dot or .tex.

    Draws with Graphviz, else with pygraphviz; without both, warns and writes a ``.dot`` file. The
    ``options`` are those of `Style`: direction, sizes, labels, ones, highlight, theme, dpi, font.

    >>> from tnconv.diagrams import linear
    >>> draw(linear((8, 3), (4, 3)), getfixture("tmp_path") / "linear.dot").name
    'linear.dot'

    Raises:
        ValueError: another suffix, a folder that there is not, or an option that does not fit.
    """
    style = Style(**options)
    return _write(path, lambda: dot(network, style), style.dpi)


def draw_steps(
    steps: Sequence[tuple[str, TensorNetwork]],
    path: str | Path,
    columns: int = COLUMNS,
    **options: Any,
) -> Path:
    """Write the grid `dot_steps`, with the formats, the options and the errors of `draw`."""
    style = Style(**options)
    return _write(path, lambda: dot_steps(steps, style, columns), style.dpi)


def picture_of_steps(
    steps: Sequence[tuple[str, TensorNetwork]], columns: int = COLUMNS, **options: Any
) -> Picture:
    """The grid of `draw_steps`, to be shown or saved."""
    style = Style(**options)
    text = "\n".join(f"{title}: {equation(network)}" for title, network in steps)
    return Picture(dot_steps(steps, style, columns), text, style.dpi)


def picture(network: Expression, **options: Any) -> Picture:
    """The picture of a network, with the options of `draw`, to be shown or saved."""
    style = Style(**options)
    return Picture(dot(network, style), equation(network), style.dpi)


def mimebundle(network: Expression) -> dict[str, str]:
    """What a notebook shows: the equation and, where something can draw it, the picture.

    >>> from tnconv.diagrams import linear
    >>> mimebundle(linear((8, 3), (4, 3)))["text/plain"]
    '[n, d] = Σ_{c} x[n, c] · weight[d, c]'
    """
    return picture(network)._repr_mimebundle_()


def _write(path: str | Path, build: Callable[[], graphviz.Graph], dpi: int) -> Path:
    path = Path(path)
    if path.suffix[1:] not in FORMATS:
        allowed = ", ".join(f".{known}" for known in FORMATS)
        raise ValueError(f"cannot draw to {str(path)!r}; expected a suffix among {allowed}")
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"cannot draw to {str(path)!r}; expected a file in a folder that exists")
    graph, format = build(), path.suffix[1:]
    if format == "png":
        graph.graph_attr["dpi"] = str(dpi)
    drawn = _render(graph, "plain" if format == "tex" else format)
    if drawn is None:
        wanted, path = path, path.with_suffix(".dot")
        graph.graph_attr.pop("dpi", None)
        drawn = graph.source.encode()
        warn(
            f"cannot draw {wanted.name}, wrote {path.name} instead; install Graphviz or "
            "pip install 'tnconv[draw]'"
        )
    elif format == "tex":
        drawn = tikz(drawn.decode()).encode()
    path.write_bytes(drawn)
    return path


def _render(graph: graphviz.Graph, format: str) -> bytes | None:
    """The picture by the ``dot`` program, else by pygraphviz, else None."""
    if format == "dot":
        return bytes(graph.source.encode())
    try:
        return bytes(graph.pipe(format=format, quiet=True))
    except graphviz.ExecutableNotFound:
        pass
    try:
        from pygraphviz import AGraph

        return bytes(AGraph(graph.source).draw(format=format, prog="dot"))
    except (ImportError, ValueError, TypeError):  # TypeError: pygraphviz on an unknown format
        return None
