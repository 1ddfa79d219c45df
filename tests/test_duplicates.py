"""No more than six lines of code are written twice in different files.

Signatures do not count. Functions of layers have torch's keywords with their types at the public
surface, so that type checkers and editors see them (a shared `**options` would hide them, and
generated signatures would hide them from readers); optimizers have torch's overloads of ``step``.
What is behind a signature is written once.
"""

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("diagrams", "simplify", "codegen", "tnconv")
MOST = 6  # lines that may be alike


def lines_of(path: Path) -> list[tuple[int, str]]:
    """The lines of code with their numbers, without imports, texts, comments and signatures."""
    text = path.read_text(encoding="utf-8")
    tree, skipped = ast.parse(text), set[int]()
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        named = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        if is_text or named or isinstance(node, ast.Import | ast.ImportFrom):
            skipped.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        if isinstance(node, ast.FunctionDef):
            first = min(line.lineno for line in (node, *node.decorator_list))
            skipped.update(range(first, node.body[0].lineno))
            if ast.unparse(node.body[0]) == "...":  # an overload
                skipped.update(range(first, node.body[0].lineno + 1))
    every = ((at, line.strip()) for at, line in enumerate(text.splitlines(), 1))
    return [
        (at, line) for at, line in every if line and not line.startswith("#") and at not in skipped
    ]


def duplicates(paths: list[Path]) -> dict[frozenset[str], list[str]]:
    """For each pair of files the places of windows of lines that both have."""
    places: dict[tuple[str, ...], list[tuple[str, int]]] = defaultdict(list)
    for path in paths:
        lines = lines_of(path)
        for at in range(len(lines) - MOST):
            window = tuple(line for _, line in lines[at : at + MOST + 1])
            places[window].append((str(path.relative_to(ROOT)), lines[at][0]))
    found: dict[frozenset[str], list[str]] = defaultdict(list)
    for where in places.values():
        files = sorted({name for name, _ in where})
        for i, one in enumerate(files):
            for other in files[i + 1 :]:
                lines = ", ".join(f"{name}:{at}" for name, at in where if name in (one, other))
                found[frozenset((one, other))].append(lines)
    return found


def test_long_passages_are_written_once() -> None:
    paths = [
        path
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path.resolve() == path
    ]
    found = duplicates(paths)
    new = sorted(places[0] for places in found.values())
    assert not new, "written twice:\n" + "\n".join(new)


def test_passages_that_are_written_twice_are_found(tmp_path: Path) -> None:
    body = "".join(f"    x{at} = {at}\n" for at in range(MOST))
    for name, text in (
        ("one", f"{body}    print()\n"),
        ("two", f"{body}    print()\n    return 1\n"),
    ):
        (tmp_path / f"{name}.py").write_text(f'"""Doc."""\nimport {name}\ndef f():\n{text}')
    global ROOT
    before, ROOT = ROOT, tmp_path
    try:
        assert len(duplicates(sorted(tmp_path.iterdir()))) == 1
    finally:
        ROOT = before
