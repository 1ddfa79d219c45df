"""The command line: explain, draw, save and measure the operations of layers; caches; the demo."""

import importlib
import importlib.util
import json
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tnconv.codegen import calibrate, compile
from tnconv.codegen.prices import store
from tnconv.commands.accounts import Account, account, fitted_to_terminal, measured
from tnconv.commands.asked_layers import OF_INPUT, OF_LAYER, add_layer, network, torchs
from tnconv.diagrams.look import DIRECTIONS, THEMES

__all__ = ["OF_INPUT", "OF_LAYER", "main", "network"]

FURTHER = ("tnconv.monitor.command",)
"""Modules that add commands of their own: ``add(commands)`` gets the subparsers."""
DEMO = ("rich", "sklearn")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, 2 with one line for arguments that do not fit, or 130.

    >>> main("explain linear --input 8 3 --weight 4 3".split())  # doctest: +ELLIPSIS
    network
      [n, d] = Σ_{c} x[n, c] · weight[d, c]
    ...
    0
    """
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        given.run(given)
    except (ValueError, TypeError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in DEMO:
            raise
        parser.exit(1, f"{parser.prog}: no module {error.name}; pip install 'tnconv[demo]'\n")
    return 0


def _explain(given: Namespace) -> None:
    if given.html is not None:
        _writable(given.html, ".html")
    accounts, others = _accounts(given)
    if given.html is not None:
        from tnconv.commands.html_report import report

        given.html.write_text(report(f"tnconv: {given.layer}", accounts, others), encoding="utf-8")
        print(given.html)
    elif given.json:
        told: Any = {"layers": [each.json for each in accounts], "without diagram": others}
        print(json.dumps(told if ":" in given.layer else accounts[0].json, indent=1))
    elif ":" in given.layer:
        for each in accounts:
            print(fitted_to_terminal(f"{each.title}\n{_indented(each.text)}\n"))
        print("without a diagram:", ", ".join(others) or "none")
    else:
        print(fitted_to_terminal(accounts[0].text))


def _accounts(given: Namespace) -> tuple[list[Account], list[str]]:
    if ":" not in given.layer:
        title = f"{given.operation} of {given.layer}"
        way = torchs(given) if given.measure else None
        return [account(title, network(given), way, given.measure)], []
    from tnconv.commands.model_accounts import loaded, model_accounts

    return model_accounts(loaded(given.layer), given.input, given.operation, given.measure)


def _draw(given: Namespace) -> None:
    from tnconv.simplify import simplify

    net = network(given)
    names = ("direction", "theme", "dpi", "ones", "sizes", "labels", "highlight")
    options = {name: value for name in names if (value := getattr(given, name)) is not None}
    if given.tree:
        print(compile(net).draw(given.output, **options))
        return
    if not (given.simplified or given.steps):
        print(net.draw(given.output, **options))
        return
    from tnconv.diagrams.drawing import draw_steps

    result = simplify(net)
    if len(net.terms) > 1:
        raise ValueError(f"the operation is a sum of {len(net.terms)} networks; draw it as given")
    (before,), (after,) = net.terms, result.views.terms
    pictures = result.steps if given.steps else [("as given", before), ("simplified", after)]
    print(draw_steps(pictures, given.output, **options))


def _source(given: Namespace) -> None:
    if given.output is not None:
        _writable(given.output, ".py")
    program = compile(network(given), style=given.style, tune=given.tune)
    print(program.source if given.output is None else program.save(given.output), end="")
    print(end="" if given.output is None else "\n")


def _bench(given: Namespace) -> None:
    way = torchs(given)
    seconds = measured(compile(network(given), tune=given.tune), way)
    for name, taken in seconds.items():
        print(f"{name:>8} {1e6 * taken:>12,.1f} us")
    if way is None:
        print(f"torch has no function for {given.operation} of {given.layer}")
    else:
        print(f"torch takes {seconds['torch'] / seconds['tnconv']:.2f} times as long")


def _tune(given: Namespace) -> None:
    program = compile(network(given), tune=True)
    chosen, *others = program.terms[0] if program.terms else (None,)
    label = "chunks" if chosen is None else chosen.label
    print(f"fastest: {label}; {len(others)} other plans; remembered in {store.directory()}")


def _calibrate(given: Namespace) -> None:
    calibrate(given.device, getattr(torch, given.dtype))
    print(f"measured {given.device} in {given.dtype}; kept in {store.directory()}")


def _cache(given: Namespace) -> None:
    folder = store.directory()
    files = sorted(folder.rglob("*.json")) if folder.is_dir() else []
    size = sum(file.stat().st_size for file in files)
    if given.clear:
        for file in files:
            file.unlink()
    done = "removed" if given.clear else "holds"
    print(f"{folder} {done} {len(files)} files, {size:,} bytes")


def _demo(given: Namespace) -> None:
    from tnconv import demo  # needs the packages of tnconv[demo]

    seeds = tuple(range(given.first_seed, given.first_seed + given.seeds))
    settings = demo.Settings(given.folder, given.epochs, seeds)
    demo.run(settings.quick if given.quick else settings)


def _parser() -> ArgumentParser:
    from tnconv import __version__

    parser = ArgumentParser("python -m tnconv", description="Tensor networks of convolutions.")
    parser.add_argument("--version", action="version", version=f"tnconv {__version__}")
    commands = parser.add_subparsers(title="commands", required=True)

    def add(name: str, run: Callable[[Namespace], None], help: str) -> ArgumentParser:
        command = commands.add_parser(name, help=help, description=f"{help.capitalize()}.")
        command.set_defaults(run=run)
        return command

    explain = add("explain", _explain, "how operations of a layer or a model are compiled")
    draw = add("draw", _draw, "a picture of an operation of a layer")
    source = add("source", _source, "the program of an operation as a file that needs torch alone")
    bench = add("bench", _bench, "the time of an operation beside torch's, on this machine")
    tune = add("tune", _tune, "measure the best plans of an operation and remember the fastest")
    for command in (explain, draw, source, bench, tune):
        add_layer(command)
    _add_explain(explain)
    _add_draw(draw)
    source.add_argument("--output", type=Path, help="a .py file; without it, print")
    source.add_argument("--style", choices=("torch", "einsum"), default="torch")
    for command in (source, bench):
        command.add_argument("--tune", action="store_true", help="measure the best plans first")
    calibrated = add("calibrate", _calibrate, "measure what this machine's kernels cost")
    calibrated.add_argument("--device", default="cpu")
    kinds = ("float32", "float64", "bfloat16", "float16")
    calibrated.add_argument("--dtype", choices=kinds, default="float32")
    cache = add("cache", _cache, "where measurements and searches are kept")
    cache.add_argument("--clear", action="store_true", help="remove them")
    _add_demo(add("demo", _demo, "KFAC beside SGD on handwritten digits, in a minute"))
    for name in FURTHER:
        if importlib.util.find_spec(name) is not None:
            importlib.import_module(name).add(commands)
    return parser


def _add_explain(command: ArgumentParser) -> None:
    how = command.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="print JSON")
    how.add_argument("--html", type=Path, help="write one file with pictures")
    command.add_argument("--measure", action="store_true", help="measure times, too")


def _add_draw(command: ArgumentParser) -> None:
    command.add_argument(
        "--output", type=Path, default=Path("diagram.svg"), help=".svg .pdf .png .dot .tex"
    )
    what = command.add_mutually_exclusive_group()
    what.add_argument("--simplified", action="store_true", help="draw it before and after")
    what.add_argument("--steps", action="store_true", help="draw it after every rule that fires")
    what.add_argument("--tree", action="store_true", help="draw the steps of its program")
    command.add_argument("--direction", choices=DIRECTIONS)
    command.add_argument("--theme", choices=tuple(THEMES))
    command.add_argument("--dpi", type=_positive, help="of a .png")
    command.add_argument("--ones", action="store_true", default=None, help="show legs of size one")
    command.add_argument("--no-sizes", dest="sizes", action="store_false", default=None)
    command.add_argument("--no-labels", dest="labels", action="store_false", default=None)
    command.add_argument("--highlight", nargs="+", metavar="NAME", help="operands and legs")


def _add_demo(demo: ArgumentParser) -> None:
    demo.add_argument("--folder", type=Path, default=Path("demo-output"), help="for the pictures")
    demo.add_argument("--epochs", type=_positive, default=3)
    demo.add_argument("--seeds", type=_positive, default=3, help="how many")
    demo.add_argument("--first-seed", type=int, default=0)
    demo.add_argument("--quick", action="store_true", help="one epoch, one seed, two grid points")


def _writable(path: Path, suffix: str) -> None:
    """Refuse before any work what could not be written after it."""
    if path.suffix != suffix:
        raise ValueError(f"cannot write {str(path)!r}; expected a name that ends in {suffix}")
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"cannot write {str(path)!r}; expected a file in a folder that exists")


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ArgumentTypeError(f"{number}; expected at least 1")
    return number
