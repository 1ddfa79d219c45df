"""Drawing networks to files and notebooks: Graphviz, or pygraphviz where its program is missing."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import graphviz

from tnconv.diagrams.expression import Expression
from tnconv.diagrams.network import TensorNetwork
from tnconv.diagrams.notation import equation
from tnconv.diagrams.sketch import dot, dot_steps

FORMATS = ("svg", "pdf", "png", "dot")


def draw(network: Expression, path: str | Path) -> Path:
    """Write a picture; the suffix of ``path`` gives the format: .svg, .pdf, .png or .dot.

    Draws with Graphviz, else with pygraphviz; without both, warns and writes a ``.dot`` file.

    >>> from tnconv.diagrams import linear
    >>> draw(linear((8, 3), (4, 3)), getfixture("tmp_path") / "linear.dot").name
    'linear.dot'

    Raises:
        ValueError: another suffix, or a folder that there is not.
    """
    return _write(path, lambda: dot(network))


def draw_steps(steps: Sequence[tuple[str, TensorNetwork]], path: str | Path) -> Path:
    """Write the picture `dot_steps`, with the formats and the errors of `draw`."""
    return _write(path, lambda: dot_steps(steps))


def mimebundle(network: Expression) -> dict[str, str]:
    """What a notebook shows: the equation and, where something can draw it, the picture.

    >>> from tnconv.diagrams import linear
    >>> mimebundle(linear((8, 3), (4, 3)))["text/plain"]
    '[n, d] = Σ_{c} x[n, c] · weight[d, c]'
    """
    svg = _render(dot(network), "svg")
    picture = {} if svg is None else {"image/svg+xml": svg.decode()}
    return {"text/plain": equation(network)} | picture


def _write(path: str | Path, build: Callable[[], graphviz.Graph]) -> Path:
    path = Path(path)
    if path.suffix[1:] not in FORMATS:
        allowed = ", ".join(f".{known}" for known in FORMATS)
        raise ValueError(f"cannot draw to {str(path)!r}; expected a suffix among {allowed}")
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"cannot draw to {str(path)!r}; expected a file in a folder that exists")
    graph = build()
    picture = _render(graph, path.suffix[1:])
    if picture is None:
        wanted, path = path, path.with_suffix(".dot")
        picture = graph.source.encode()
        warnings.warn(
            f"cannot draw {wanted.name}, wrote {path.name} instead; install Graphviz or "
            "pip install 'tnconv[draw]'",
            stacklevel=3,
        )
    path.write_bytes(picture)
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
