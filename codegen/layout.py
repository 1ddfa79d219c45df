"""Layout: statements that are too long for a line, broken as formatters of Python do it."""

import ast
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

WIDTH = 100
STEP = " " * 4
_SIGNS: dict[type[ast.operator], str] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
    ast.MatMult: "@",
}


def laid_out(line: str, indent: str = STEP) -> str:
    """A statement and its comment, in as many lines as they need.

    >>> shifts = [f"x.roll({at}, 0)" for at in range(5)]
    >>> print(laid_out(f"t1 = torch.stack([{', '.join(shifts[:4])}], 1)  # shifts in dimension 0"))
        # shifts in dimension 0
        t1 = torch.stack([x.roll(0, 0), x.roll(1, 0), x.roll(2, 0), x.roll(3, 0)], 1)
    >>> print(laid_out(f"t1 = torch.stack([{', '.join(shifts)}], 1).reshape(3, 8)"))
        t1 = torch.stack(
            [x.roll(0, 0), x.roll(1, 0), x.roll(2, 0), x.roll(3, 0), x.roll(4, 0)], 1
        ).reshape(3, 8)
    """
    if len(indent + line) <= WIDTH:
        return indent + line
    code, _, comment = line.partition("  # ")
    above = [f"{indent}# {comment}"] if comment else []
    (statement,) = ast.parse(code).body
    if len(indent + code) <= WIDTH or not isinstance(statement, ast.Assign | ast.Return):
        return "\n".join([*above, indent + code])
    assert statement.value is not None
    head = "return " if isinstance(statement, ast.Return) else code.partition(" = ")[0] + " = "
    return "\n".join([*above, *_assigned(indent + head, statement.value, indent)])


def signature(name: str, arguments: Sequence[str]) -> str:
    """The first line of a function, or its first lines."""
    if len(line := f"def {name}({', '.join(arguments)}):") <= WIDTH:
        return line
    brackets = _Brackets("(", tuple(map(ast.Name, arguments)), ")")
    return "\n".join([*brackets.broken(f"def {name}", ""), "):"])


@dataclass(frozen=True)
class _Brackets:
    """Brackets that can be broken, and what is in them."""

    left: str
    items: tuple[ast.AST, ...]
    right: str
    between: str = ", "

    @property
    def flat(self) -> str:
        return self.left + self.between.join(map(_flat, self.items)) + self.right

    def broken(self, before: str, indent: str) -> list[str]:
        """All lines but the last, which is the closing bracket."""
        inner, comma = indent + STEP, self.between.strip()
        together = inner + self.between.join(map(_flat, self.items))
        if self.left == "(" and comma and len(together) <= WIDTH:
            return [before + self.left, together]
        if self.left == "(" and len(self.items) == 1:
            comma = ""
        parts = [line for item in self.items for line in _inside(inner, item, comma, inner)]
        return [before + self.left, *parts]


Piece = str | _Brackets


def _assigned(head: str, node: ast.expr, indent: str) -> list[str]:
    """In parentheses, unless breaking brackets of the expression is preferred."""
    if isinstance(node, ast.Tuple):
        lines = _Brackets("[", tuple(node.elts), "]").broken("", indent)
        return [f"{head}(", *lines[1:], f"{indent})"]
    if not _wants_parentheses(node):
        return _flowing(head, _pieces(node), "", indent)
    return [f"{head}(", *_inside(indent + STEP, node, "", indent + STEP), f"{indent})"]


def _wants_parentheses(node: ast.expr) -> bool:
    if isinstance(node, ast.BinOp):
        return isinstance(node.left, ast.BinOp) or not _ends_in_brackets(node.right)
    return _links(node) > 1 or (_links(node) == 1 and not _ends_in_brackets(node))


def _ends_in_brackets(node: ast.expr) -> bool:
    match node:
        case ast.Call(_, arguments, keywords):
            return bool(arguments or keywords)
    return isinstance(node, ast.List | ast.ListComp)


def _links(node: ast.expr) -> int:
    """How many attributes are taken of what ends in brackets."""
    match node:
        case ast.Attribute(value, _):
            return _links(value) + isinstance(value, ast.Call | ast.Subscript)
        case ast.Call(value) | ast.Subscript(value):
            return _links(value)
    return 0


def _inside(head: str, node: ast.AST, tail: str, indent: str) -> list[str]:
    """The lines of an expression inside of brackets: split between operands or calls first."""
    match node:
        case ast.keyword(str(name), value):
            return _inside(f"{head}{name}=", value, tail, indent)
        case ast.comprehension(target, iterable):
            names = _flat(target).removeprefix("(").removesuffix(")")
            return _inside(f"{head}for {names} in ", iterable, tail, indent)
    if len(head + _flat(node) + tail) <= WIDTH:
        return [head + _flat(node) + tail]
    assert isinstance(node, ast.expr)
    if isinstance(node, ast.BinOp):
        first, *others = _operands(node, type(node.op))
        lines = _inside(head, first, "", indent)
        for other in others:
            lines += _inside(f"{indent}{_SIGNS[type(node.op)]} ", other, "", indent)
        return [*lines[:-1], lines[-1] + tail]
    if _links(node) > 1:
        first_link, *links = _chain(node)
        lines = _flowing(head, first_link, "", indent)
        for link in links:
            lines += _flowing(indent, link, "", indent)
        return [*lines[:-1], lines[-1] + tail]
    return _flowing(head, _pieces(node), tail, indent)


def _operands(node: ast.expr, sign: type[ast.operator]) -> Iterator[ast.expr]:
    if isinstance(node, ast.BinOp) and type(node.op) is sign:
        yield from _operands(node.left, sign)
        yield node.right
    else:
        yield node


def _chain(node: ast.expr) -> list[list[Piece]]:
    """The pieces of a chain of calls, split before each attribute of what ends in brackets."""
    links: list[list[Piece]] = [[]]
    for piece in _pieces(node):
        if isinstance(piece, str) and links[-1] and isinstance(links[-1][-1], _Brackets):
            links.append([])
        links[-1].append(piece)
    return links


def _flowing(head: str, parts: Iterable[Piece], tail: str, indent: str) -> list[str]:
    """From left to right, brackets are broken if the next ones would begin too far right."""
    lines, line = [], head
    pieces = [*parts, tail]
    for at, piece in enumerate(pieces):
        if isinstance(piece, str):
            line += piece
        elif not piece.items or len(line + piece.flat + _until_brackets(pieces[at + 1 :])) <= WIDTH:
            line += piece.flat
        else:
            lines += piece.broken(line, indent)
            line = indent + piece.right
    return [*lines, line]


def _until_brackets(pieces: Sequence[Piece]) -> str:
    text = ""
    for piece in pieces:
        if isinstance(piece, _Brackets) and piece.items:
            return text + piece.left
        text += piece if isinstance(piece, str) else piece.flat
    return text


def _pieces(node: ast.expr) -> Iterator[Piece]:
    """Texts and brackets one after another."""
    match node:
        case ast.BinOp(left, sign, right):
            yield from _operand(left, node)
            yield f" {_SIGNS[type(sign)]} "
            yield from _operand(right, node)
        case ast.Attribute(value, name):
            yield from _pieces(value)
            yield f".{name}"
        case ast.Subscript(value, index):
            yield from _pieces(value)
            items = index.elts if isinstance(index, ast.Tuple) and index.elts else [index]
            yield _Brackets("[", tuple(items), "]")
        case ast.Call(function, [ast.GeneratorExp(element, clauses)]):
            yield from _pieces(function)
            yield _Brackets("(", (element, *clauses), ")", " ")
        case ast.Call(function, arguments, keywords):
            yield from _pieces(function)
            yield _Brackets("(", (*arguments, *keywords), ")")
        case ast.ListComp(element, clauses):
            yield _Brackets("[", (element, *clauses), "]", " ")
        case ast.List(items) if items:
            yield _Brackets("[", tuple(items), "]")
        case _:
            yield _flat(node)


def _operand(node: ast.expr, outer: ast.BinOp) -> Iterator[Piece]:
    """In parentheses where it needs them."""
    if isinstance(node, ast.BinOp) and type(node.op) is not type(outer.op):
        yield _Brackets("(", (node,), ")", " ")
    else:
        yield from _pieces(node)


def _flat(node: ast.AST) -> str:
    return ast.unparse(node).strip()
