"""The command line: explain, draw, save and measure the operations of layers; caches; the demo."""

import importlib
import importlib.util
import json
import os
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tnconv import interruption
from tnconv.codegen import calibrate, compile
from tnconv.codegen.prices import store
from tnconv.commands.accounts import Account, fitted_to_terminal
from tnconv.commands.asked_layers import OF_INPUT, OF_LAYER, OPTIONS, add_layer, network, option
from tnconv.commands.benching import progress, table, timed
from tnconv.commands.contestants import contestants
from tnconv.commands.model_accounts import ModelLayer, loaded, model_accounts, model_layers
from tnconv.diagrams.look import DIRECTIONS, THEMES

__all__ = ["OF_INPUT", "OF_LAYER", "main", "network"]

FURTHER = ("tnconv.monitor.command",)
"""Modules that add commands of their own: ``add(commands)`` gets the subparsers."""
DEMO = ("rich", "sklearn")
PROGRAM = "python -m tnconv"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, 2 with one line for arguments that do not fit, or 130.

    >>> main("explain linear --input 8 3 --weight 4 3".split())  # doctest: +ELLIPSIS
    network
      [n, d] = Σ_{c} x[n, c] · weight[d, c]
    ...
    0
    """
    try:
        parser = _parser()
        given = parser.parse_args(arguments)
        try:
            given.run(given)
        except (ValueError, TypeError) as error:
            parser.exit(2, f"{parser.prog}: {error}\n")
        except ModuleNotFoundError as error:
            if error.name is None or error.name.split(".")[0] not in DEMO:
                raise
            parser.exit(1, f"{parser.prog}: no module {error.name}; pip install 'tnconv[demo]'\n")
    except KeyboardInterrupt:
        interruption.say_so()
        return interruption.CODE
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
    return model_accounts(_layers(given), given.measure)


def _layers(given: Namespace) -> list[ModelLayer]:
    """The layer that the arguments describe, or those of a model."""
    if ":" in given.layer:
        refused = [name for name in OPTIONS if getattr(given, name) is not None]
        if refused:
            raise ValueError(f"a model has no {option(refused[0])}; its layers have their own")
        return model_layers(loaded(given.layer), given.input, given.operation)
    title = f"{given.operation} of {given.layer}"
    return [ModelLayer(title, network(given), contestants(given))]


def _draw(given: Namespace) -> None:
    from tnconv.diagrams.drawing import FORMATS
    from tnconv.simplify import simplify

    _writable(given.output, *(f".{format}" for format in FORMATS))
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
    layers = _layers(given)
    found = timed(layers, given.tune)
    if given.json:
        rows = [{"layer": row.title, "seconds": row.seconds} for row in found]
        print(json.dumps(rows, indent=1))
        return
    print(table(found))
    if left := [layer.title for layer in layers if layer.network is None]:
        print("without a diagram:", ", ".join(left))
    if not any("torch" in row.seconds for row in found):
        print(f"torch has no function for {given.operation} of {given.layer}")


def _tune(given: Namespace) -> None:
    layers = _layers(given)
    with progress(len(layers)) as at:
        for layer in layers:
            at(layer.title)
            if layer.network is not None:
                program = compile(layer.network, tune=True)
                chosen, *others = program.terms[0] if program.terms else (None,)
                label = "chunks" if chosen is None else chosen.label
                before = f"{layer.title}: " if len(layers) > 1 else ""
                print(f"{before}fastest: {label}; {len(others)} other plans")
            at(None)
    print(f"remembered in {store.directory()}")


def _calibrate(given: Namespace) -> None:
    try:
        torch.empty(0, device=given.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device is {given.device!r}: {reason}") from error
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
    if given.folder.is_file() or not given.folder.absolute().parent.is_dir():
        raise ValueError(f"--folder is {str(given.folder)!r}; expected a folder or a new one")
    from tnconv import demo  # needs the packages of tnconv[demo]

    seeds = tuple(range(given.first_seed, given.first_seed + given.seeds))
    settings = demo.Settings(given.folder, given.epochs, seeds)
    demo.run(settings.quick if given.quick else settings)


def _parser() -> ArgumentParser:
    from tnconv import __version__

    parser = ArgumentParser(PROGRAM, description="Tensor networks of convolutions.")
    parser.add_argument("--version", action="version", version=f"tnconv {__version__}")
    commands = parser.add_subparsers(title="commands", required=True)

    def add(name: str, run: Callable[[Namespace], None], help: str) -> ArgumentParser:
        command = commands.add_parser(name, help=help, description=f"{help.capitalize()}.")
        command.set_defaults(run=run)
        return command

    explain = add("explain", _explain, "how operations of a layer or a model are compiled")
    draw = add("draw", _draw, "a picture of an operation of a layer")
    source = add("source", _source, "the program of an operation as a file that needs torch alone")
    bench = add("bench", _bench, "times beside torch's and installed libraries', on this machine")
    tune = add("tune", _tune, "measure the best plans and remember the fastest")
    for command in (explain, draw, source, bench, tune):
        add_layer(command)
    _add_explain(explain)
    _add_draw(draw)
    source.add_argument("--output", type=Path, help="a .py file; without it, print")
    source.add_argument("--style", choices=("torch", "einsum"), default="torch")
    for command in (source, bench):
        command.add_argument("--tune", action="store_true", help="measure the best plans first")
    bench.add_argument("--json", action="store_true", help="print JSON")
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


def _writable(path: Path, *suffixes: str) -> None:
    """Refuse before any work what could not be written after it."""
    if path.suffix not in suffixes:
        ends = suffixes[0] if len(suffixes) == 1 else f"one of {', '.join(suffixes)}"
        raise ValueError(f"cannot write {str(path)!r}; expected a name that ends in {ends}")
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"cannot write {str(path)!r}; expected a file in a folder that exists")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"cannot write {str(path)!r}; expected a file or folder that is writable")


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ArgumentTypeError(f"{number}; expected at least 1")
    return number
