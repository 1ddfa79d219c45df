"""One self-contained HTML file of accounts: pictures, rules, kernels, source and times."""

import html
import re
from collections.abc import Iterable, Sequence

from tnconv.commands.accounts import Account
from tnconv.diagrams.drawing import Picture

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1100px; padding: 0 1rem;
  color: #222; background: #fff }}
pre {{ background: #f6f7f9; padding: .8rem; overflow-x: auto; font-size: 13px }}
table {{ border-collapse: collapse; font-size: 13px }}
td, th {{ padding: .2rem .8rem; border-bottom: 1px solid #ddd; text-align: right }}
td:first-child, th:first-child {{ text-align: left }}
figure {{ margin: 1rem 0; overflow-x: auto }} figcaption {{ color: #666; font-size: 13px }}
svg {{ max-width: 100%; height: auto }}
</style></head><body><h1>{title}</h1>
{body}
</body></html>
"""


def report(title: str, accounts: Sequence[Account], others: Iterable[str] = ()) -> str:
    """The page; ``others`` are layers that no diagram describes."""
    parts = [f"<ul>{''.join(map(_entry, enumerate(accounts)))}</ul>"] if len(accounts) > 1 else []
    parts += [_section(at, each) for at, each in enumerate(accounts)]
    if left := list(others):
        listed = "".join(f"<li>{html.escape(name)}</li>" for name in left)
        parts.append(f"<h2>Layers without a diagram</h2><ul>{listed}</ul>")
    return _PAGE.format(title=html.escape(title), body="\n".join(parts))


def _entry(numbered: tuple[int, Account]) -> str:
    at, each = numbered
    return f'<li><a href="#account{at}">{html.escape(each.title)}</a></li>'


def _section(at: int, each: Account) -> str:
    told = each.json
    parts = [f'<h2 id="account{at}">{html.escape(each.title)}</h2>', _code(told["equation"])]
    parts.append(_figure(each.network.draw(), "the network as given"))
    rules = "".join(f"<li>{html.escape(rule)}</li>" for rule in told["rules"])
    parts.append(f"<h3>Rules that fired</h3><ol>{rules}</ol>" if rules else "")
    parts += [_code(told["simplified"]), _figure(each.simplified.views.draw(), "simplified")]
    if not each.program.chunks:
        parts.append(_figure(each.program.draw(), "the program: kernels along the path"))
        parts.append(_steps(told["steps"]))
    parts += ["<h3>Source</h3>", _code(told["source"])]
    if each.seconds:
        rows = "".join(
            f"<tr><td>{n}</td><td>{1e6 * s:,.0f} us</td></tr>" for n, s in each.seconds.items()
        )
        parts.append(f"<h3>Measured</h3><table>{rows}</table>")
    return "\n".join(parts)


def _steps(steps: Sequence[dict[str, object]]) -> str:
    names = ("kernel", "shape", "flops", "bytes")
    head = "".join(f"<th>{name}</th>" for name in names)
    rows = [
        "".join(f"<td>{html.escape(_shown(step[name]))}</td>" for name in names) for step in steps
    ]
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def _shown(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _code(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"


def _figure(picture: Picture, caption: str) -> str:
    svg = picture.svg
    if svg is None:
        return _code(picture.graph.source)
    drawn = re.sub(r"^.*?(?=<svg)", "", svg, flags=re.DOTALL)
    return f"<figure>{drawn}<figcaption>{caption}</figcaption></figure>"
