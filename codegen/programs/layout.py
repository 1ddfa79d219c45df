"""Layout: long lines of a program are broken at brackets, operators and dots, as black does.

Programs are statements of one line each, so that no parser is needed: a scanner of brackets and
strings finds where a line may end.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

WIDTH, INDENT = 100, " " * 4
OPENING, CLOSING = "([{", ")]}"
OPERATORS = ((" or ", " and "), (" + ", " - "), (" @ ", " * ", " / ", " // "))
"""By priority: a line ends before those that bind least."""


def laid_out(text: str) -> str:
    """The text of a module with its long lines broken; it means the same.

    >>> print(laid_out("t1 = torch.cat([" + ", ".join(f"operand_{i}" for i in range(8)) + "])"))
    t1 = torch.cat(
        [operand_0, operand_1, operand_2, operand_3, operand_4, operand_5, operand_6, operand_7]
    )
    <BLANKLINE>
    """
    lines: list[str] = []
    string = False  # inside a docstring, whose lines are taken as they are
    for line in text.splitlines():
        fixed = string or '"""' in line
        string ^= line.count('"""') % 2 == 1
        lines += [line] if fixed or len(line) <= WIDTH else _broken(line)
    return "\n".join(lines) + "\n"


def _broken(line: str) -> list[str]:
    indent = line[: len(line) - len(line.lstrip())]
    code, comment = _comment(line.strip())
    if not code:
        return [line]
    start = _start(code)
    *lines, last = _expression(code[:start], code[start:], "", indent)
    if not comment:
        return [*lines, last]
    beside = f"{last}  {comment}"
    if len(beside) <= WIDTH:
        return [*lines, beside]
    return [f"{indent}{comment}", *lines, last]


def _start(code: str) -> int:
    """Where the expression of an assignment, a return or a deletion begins."""
    for word in ("return ", "del "):
        if code.startswith(word):
            return len(word)
    outside = (at for at, depth in _depths(code) if not depth)
    equals = next((at for at in outside if code.startswith(" = ", at)), None)
    return 0 if equals is None else equals + len(" = ")


def _expression(before: str, code: str, after: str, indent: str) -> list[str]:
    """Lines of ``before code after``; the line breaks are in the code."""
    if len(indent + before + code + after) <= WIDTH:
        return [indent + before + code + after]
    inner = indent + INDENT
    if len(items := _items(code)) > 1:
        lines = [line for item in items for line in _expression("", item, ",", inner)]
        return [f"{indent}{before}(", *lines, f"{indent}){after}"]
    if parts := _at_operators(code):
        one = _last_call(code, len(indent + before)) if before and len(parts) == 2 else None
        return (
            _opened(one, before, code, after, indent)
            if one
            else _wrapped(before, parts, after, indent)
        )
    if len(parts := _at_dots(code)) > 2:
        if before:
            return _wrapped(before, parts, after, indent)
        *firsts, end = parts  # in brackets already
        return [*(indent + part for part in firsts), indent + end + after]
    return _at_bracket(before, code, after, indent)


def _at_bracket(before: str, code: str, after: str, indent: str) -> list[str]:
    """The last bracket that a line can reach is opened, then the next in what follows it."""
    if len(indent + before + code + after) <= WIDTH:
        return [indent + before + code + after]
    fitting = [b for b in _brackets(code) if len(indent + before) + b.opens < WIDTH]
    if not fitting:
        return [indent + before + code + after]
    return _opened(fitting[-1], before, code, after, indent)


def _opened(bracket: "Bracket", before: str, code: str, after: str, indent: str) -> list[str]:
    """What a pair of brackets holds on lines of its own."""
    inner = indent + INDENT
    head, body, tail = bracket.split(code)
    one = [inner + body] if len(inner + body) <= WIDTH else None
    parts = _clauses(body) or _items(body)
    end = "," if len(parts) > 1 and not _clauses(body) else ""
    ended = [line for part in parts for line in _expression("", part, end, inner)]
    rest = _at_bracket(tail[0], tail[1:], after, indent)
    return [indent + before + head, *(one or ended), *rest]


def _last_call(code: str, before: int) -> "Bracket | None":
    """Of the calls with which the code ends, the last one up to which a line can go.

    An expression with one operator that ends so needs no brackets of its own.
    """
    if not code.endswith(")"):
        return None
    end = len(code)
    for bracket in reversed(list(_brackets(code))):
        between = code[bracket.closes + 1 : end]
        if (between and not between.startswith(".")) or " " in between:
            return None
        if before + bracket.opens + 1 <= WIDTH:
            return bracket
        end = bracket.opens
    return None


def _wrapped(before: str, parts: Sequence[str], after: str, indent: str) -> list[str]:
    """Parts in brackets of their own; those that are brackets already lose nothing by it."""
    inner = indent + INDENT
    joined = inner + "".join(parts)
    if len(joined) <= WIDTH and before:
        return [f"{indent}{before}(", joined, f"{indent}){after}"]
    lines = [line for part in parts for line in _expression("", part.strip(), "", inner)]
    return [f"{indent}{before}(", *lines, f"{indent}){after}"]


@dataclass(frozen=True)
class Bracket:
    """A pair of brackets: where it opens and where it closes."""

    opens: int
    closes: int

    def split(self, code: str) -> tuple[str, str, str]:
        inside = code[self.opens + 1 : self.closes].strip()
        return code[: self.opens + 1], inside.removesuffix(","), code[self.closes :]


def _depths(code: str) -> Iterator[tuple[int, int]]:
    """Every position outside strings, with the number of brackets around it."""
    depth, quote = 0, ""
    for at, letter in enumerate(code):
        if quote:
            quote = "" if letter == quote else quote
            continue
        if letter in "'\"":
            quote = letter
        depth -= letter in CLOSING
        yield at, depth
        depth += letter in OPENING


def _comment(code: str) -> tuple[str, str]:
    at = next((at for at, _ in _depths(code) if at and code[at] == "#"), len(code))
    return code[:at].rstrip(), code[at:]


def _at_operators(code: str) -> list[str]:
    """The operands of the operators that bind least, each after the first with its operator."""
    outside = [at for at, depth in _depths(code) if not depth]
    for operators in OPERATORS:
        if cuts := [at for at in outside if any(code.startswith(o, at) for o in operators)]:
            return _cut(code, cuts)
    return []


def _at_dots(code: str) -> list[str]:
    """The calls of a chain of methods, each with the attributes before it."""
    cuts: list[int] = []
    for at, depth in _depths(code):
        since = code[cuts[-1] if cuts else 0 : at]
        if not depth and code[at] == "." and ("(" in since or "[" in since):
            cuts.append(at)
    return _cut(code, cuts)


def _items(code: str) -> list[str]:
    """What commas separate."""
    loops = [(at, code.index(" in ", at)) for at in _loops(code)]
    cuts = [
        at
        for at, depth in _depths(code)
        if not depth and code[at] == "," and not any(start < at < stop for start, stop in loops)
    ]
    return [part.lstrip(",").strip() for part in _cut(code, cuts)]


def _clauses(code: str) -> list[str]:
    """The element of a comprehension and its loops, if it is one."""
    loops = [at for at in _loops(code) if at]
    return [part.strip() for part in _cut(code, loops)] if loops else []


def _loops(code: str) -> list[int]:
    """Where loops of a comprehension begin, each of which ends its variables with ``in``."""
    outside = [at for at, depth in _depths(code) if not depth and code.startswith("for ", at)]
    return [at for at in outside if not at or code[at - 1] == " "]


def _cut(code: str, cuts: Sequence[int]) -> list[str]:
    ends = [*cuts, len(code)]
    return [code[start:end] for start, end in zip([0, *cuts], ends, strict=True)]


def _brackets(code: str) -> Iterator[Bracket]:
    """The outer pairs of brackets with something in them."""
    opens = 0
    for at, depth in _depths(code):
        if not depth and code[at] in OPENING:
            opens = at
        elif not depth and code[at] in CLOSING and at > opens + 1:
            yield Bracket(opens, at)
