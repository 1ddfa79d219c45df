"""Pictures in LaTeX: the layout of Graphviz, drawn by TikZ with the document's own letters."""

import html
import re
import unicodedata
from collections.abc import Iterator

_INCHES = 2.54  # the unit of the layout, in centimetres
_HEAD = r"""\IfFileExists{standalone.cls}{\documentclass[tikz,border=2pt]{standalone}}
  {\documentclass{article}\usepackage{tikz}\pagestyle{empty}}
\usetikzlibrary{shapes.geometric}
\begin{document}
\begin{tikzpicture}[
  tensor/.style={draw=blue!50!black,fill=blue!8,rounded corners=2pt,minimum height=5mm,
    minimum width=8mm},
  pattern/.style={draw=orange!70!black,fill=orange!12,ellipse,inner sep=1pt,align=center,
    font=\scriptsize},
  port/.style={draw=gray!60,fill=gray!10,inner sep=1.5pt,font=\scriptsize},
  loose/.style={inner sep=1pt,font=\small},
  dot/.style={circle,fill=black,inner sep=0pt,minimum size=1.2mm},
  mark/.style={draw=red!75!black,very thick},
  wire/.style={gray,thin},
  leg/.style={font=\scriptsize,fill=white,fill opacity=.8,text opacity=1,inner sep=.6pt}]
"""
_TAIL = "\\end{tikzpicture}\n\\end{document}\n"
_KINDS = {"box": "tensor", "ellipse": "pattern", "point": "dot", "plaintext": "loose"}
_SIGNS = {
    "≤": r"$\le$",
    "∈": r"$\in$",
    "·": r"$\cdot$",
    "×": r"$\times$",
    "→": r"$\to$",
    "′": r"$'$",
    "−": "$-$",
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
} | {letter: f"\\{letter}" for letter in "#$%&_{}"}
_ACCENTS = dict(zip("\u0300\u0301\u0302\u0303\u0308\u030a\u0327\u030c", "`'^~\"rcv", strict=True))
_CAPITALS = dict(
    zip(
        *(
            "alpha beta epsilon zeta eta iota kappa mu nu omicron rho tau chi".split(),
            "ABEZHIKMNOPTX",
        ),
        strict=True,
    )
)


def tikz(layout: str) -> str:
    r"""A LaTeX document of what ``dot -Tplain`` has placed; needs nothing but TikZ.

    >>> layout = "graph 1 1 1\nnode a 0.5 0.5 1 1 <x> filled,rounded box black white\nstop\n"
    >>> print(tikz(layout).splitlines()[-3])
    \node[tensor] (a) at (1.27,1.27) {x};
    """
    lines = [_words(line) for line in layout.replace("\\\n", "").splitlines()]
    nodes = [_node(line) for line in lines if line[:1] == ["node"]]
    edges = [text for line in lines if line[:1] == ["edge"] for text in _edge(line)]
    return _HEAD + "\n".join([*edges, *nodes]) + "\n" + _TAIL


def _words(line: str) -> list[str]:
    """The words of a line: HTML-like labels, which hold brackets and quotes, are one each."""
    words, at = [], 0
    while at < len(line):
        start = at
        if line[at] == "<":
            depth = 0
            while depth or at == start:
                depth += {"<": 1, ">": -1}.get(line[at], 0)
                at += 1
        elif line[at] == '"':
            at += 1
            while line[at] != '"':
                at += 2 if line[at] == "\\" else 1
            at += 1
        else:
            while at < len(line) and line[at] != " ":
                at += 1
        word = line[start:at]
        words.append(word[1:-1].replace('\\"', '"') if word[:1] == '"' else word)
        at += 1
    return words


def _node(line: list[str]) -> str:
    _, name, x, y, _, _, label, style, shape, *_ = line
    kind = "loose" if style == "invis" else _KINDS.get(shape, "loose")
    kind = "port" if kind == "tensor" and "rounded" not in style else kind
    text = "" if kind == "dot" else _tex(label)
    return f"\\node[{kind}] ({_safe(name)}) at ({_at(x)},{_at(y)}) {{{text}}};"


def _edge(line: list[str]) -> Iterator[str]:
    count = int(line[3])
    points, rest = line[4 : 4 + 2 * count], line[4 + 2 * count :]
    if "invis" in rest:
        return
    places = [f"({_at(x)},{_at(y)})" for x, y in zip(points[::2], points[1::2], strict=True)]
    path = places[0]
    for at in range(1, count, 3):
        first, second, end = places[at : at + 3]
        path += f" .. controls {first} and {second} .. {end}"
    yield f"\\draw[wire] {path};"
    if len(rest) >= 5:
        yield f"\\node[leg] at ({_at(rest[1])},{_at(rest[2])}) {{{_tex(rest[0])}}};"


def _at(number: str) -> str:
    return f"{float(number) * _INCHES:.4g}"


def _safe(name: str) -> str:
    return name.replace("_", "-")


def _tex(label: str) -> str:
    """HTML-like text of a label as LaTeX: subscripts, breaks, and sizes in small letters."""
    text = re.sub(r"^<(.*)>$", r"\1", label, flags=re.DOTALL)
    text = re.sub(r'<BR/><FONT POINT-SIZE="3"> </FONT>', "", text)
    parts = re.split(r"(<SUB>.*?</SUB>|<FONT POINT-SIZE=\"7\"[^>]*>.*?</FONT>|<BR/>)", text)
    return "".join(map(_part, parts))


def _part(text: str) -> str:
    inside = html.unescape(re.sub(r"<[^>]*>", "", text))
    inside = "".join(map(_letter, inside))
    if text.startswith("<SUB>"):
        return rf"\textsubscript{{{inside}}}"
    if text.startswith("<BR/>"):
        return r"\\"
    return rf"{{\tiny {inside}}}" if text.startswith('<FONT POINT-SIZE="7"') else inside


def _letter(letter: str) -> str:
    r"""A letter of a name; what plain LaTeX has no letter for is written as its code point.

    >>> _letter("λ"), _letter("é"), _letter("Π"), _letter("层")
    ('$\\lambda$', "\\'{e}", '$\\Pi$', '[U+5C42]')
    """
    if letter in _SIGNS or letter.isascii():
        return _SIGNS.get(letter, letter if letter.isprintable() else " ")
    name = unicodedata.name(letter, "").split()
    if name[:1] == ["GREEK"] and name[2:3] == ["LETTER"] and len(name) == 4:
        greek = {"LAMDA": "lambda"}.get(name[3], name[3].lower())
        shown = greek if name[1] == "SMALL" else _CAPITALS.get(greek, greek.capitalize())
        return "o" if shown == "omicron" else f"$\\{shown}$" if len(shown) > 1 else shown
    base, *marks = list(unicodedata.normalize("NFD", letter))
    if base.isascii() and len(marks) == 1 and marks[0] in _ACCENTS:
        return f"\\{_ACCENTS[marks[0]]}{{{base}}}"
    return f"[U+{ord(letter):04X}]"
