"""Two checkouts of tnconv in turns: quantities of whole networks, and steps of KFAC.

Run as ``python -m benchmarks.against_steps OTHER``, with OTHER another checkout of this repository,
such as a worktree of an earlier commit; ``--help`` lists the options. As in `benchmarks.against`
each checkout has a process of its own, the two are timed in turns by the processes' own clocks, and
a ratio is the other's time over ours, so above 1 is a gain. Processes differ by where their memory
lies, so that each pair is started ``--starts`` times, the other first every second time. A row's
ratios are that of the least times of all rounds and starts, and the median of the rounds' own.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from statistics import geometric_mean, median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.against import Checkout

ROOT = Path(__file__).resolve().parents[1]
NEVER = 10**9
KINDS = {"plain": (NEVER, NEVER), "factors": (1, NEVER), "inverses": (1, 1)}
"""Steps of KFAC: every how many of them collect factors, and invert them."""
Options = argparse.Namespace


def work(threads: int) -> None:
    """Answer lines: ``make KIND NAME...`` prepares a step, and ``run N`` times it N times."""
    sys.path.insert(0, str(Path.cwd()))
    import torch

    from benchmarks import measure

    torch.set_num_threads(threads)
    measure.touch_pages()
    step: Callable[[], object] | None = None
    for line in sys.stdin:
        word, *given = line.split()
        if word == "make":
            step = (_network if given[0] == "network" else _kfac)(*given[1:])
        assert step is not None
        count = int(given[0]) if word == "run" else 1
        for _ in range(4 if word == "make" else 0):  # sizes that return are searched for
            step()
        started = time.process_time()
        for _ in range(count):
            step()
        print((time.process_time() - started) / count, flush=True)


def _network(problem: str, batch: str, number: str) -> Callable[[], object]:
    """A gradient with a quantity, by its number in `benchmarks.networks`.

    The network is the one that this file's checkout describes, as others may lack it.
    """
    from benchmarks import networks

    spec = spec_from_file_location("models_to_be_timed", ROOT / "benchmarks" / "models.py")
    assert spec is not None and spec.loader is not None
    sys.modules[spec.name] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
    given = module.PROBLEMS[problem]
    quantities = networks.QUANTITIES | {"nothing else": ()}
    networks.QUANTITIES = quantities
    return networks.ours(given.model(), *given.data(int(batch)), list(quantities)[int(number)])


def _kfac(network: str, batch: str, flavour: str, kind: str) -> Callable[[], object]:
    """A training step with KFAC."""
    import torch
    from torch import nn

    from benchmarks.kfac_step import NETWORKS, step_of
    from tnconv.optim import KFAC

    torch.manual_seed(0)
    model, loss_fn = NETWORKS[network](10), nn.CrossEntropyLoss()
    x, y = torch.rand(int(batch), 3, 32, 32), torch.randint(10, (int(batch),))
    factors, inverses = KINDS[kind]
    optimizer = KFAC(
        model,
        lr=1e-3,
        flavour=flavour,  # type: ignore[arg-type]
        fisher="mc",
        loss_fn=loss_fn,
        update_factors_every=factors,
        update_inverses_every=inverses,
    )
    return step_of(model, optimizer, loss_fn, x, y)


def rows(options: Options) -> Iterator[tuple[str, tuple[object, ...]]]:
    """What is compared, with the line that prepares it."""
    from benchmarks import networks

    for network in options.network:
        problem, batch = network.split(":")
        for number, quantity in enumerate(networks.QUANTITIES):
            if options.quantity and quantity not in options.quantity:
                continue
            yield f"{problem} {batch}, {quantity}", ("network", problem, batch, number)
    for size in options.kfac:
        network, batch = size.split(":")
        for flavour in ("expand", "reduce"):
            for kind in KINDS:
                if options.kind and kind not in options.kind:
                    continue
                name = f"KFAC-{flavour} on {network} {batch}, {kind}"
                yield name, ("kfac", network, batch, flavour, kind)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="python -m benchmarks.against_steps", description=__doc__)
    result.add_argument("other", type=Path, nargs="?", help="the folder of the other checkout")
    result.add_argument("--network", nargs="*", default=["3c3d:32"], help="problem:batch (3c3d:32)")
    result.add_argument(
        "--kfac", nargs="*", default=["resnet20:64"], help="network:batch (resnet20:64)"
    )
    result.add_argument("--quantity", action="append", help="repeatable; all by default")
    result.add_argument("--kind", action="append", choices=KINDS, help="repeatable")
    result.add_argument("--rounds", type=int, default=11, help="rounds of each pair (11)")
    result.add_argument("--starts", type=int, default=4, help="pairs of processes (4)")
    result.add_argument("--threads", type=int, default=1)
    result.add_argument("--json", type=Path, help="add results to this file")
    result.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return result


def main(arguments: Sequence[str]) -> None:
    """Run what the command line asks for."""
    options = parser().parse_args(arguments)
    if options.worker:
        work(options.threads)
        return
    from benchmarks import against, measure

    measure.with_allocator("benchmarks.against_steps", arguments)
    if options.other is None or not (options.other / "benchmarks" / "networks.py").is_file():
        raise SystemExit(f"other is {options.other}; expected the folder of another checkout")
    taken: dict[str, list[tuple[float, float]]] = {}
    for start in range(options.starts):
        folders = ROOT, options.other
        made = [
            against.Checkout(folder, options.threads, __file__)
            for folder in folders[:: -1 if start % 2 else 1]
        ]
        pair = made[:: -1 if start % 2 else 1]
        for name, prepare in rows(options):
            taken.setdefault(name, []).extend(timed(pair, prepare, options.rounds))
        for each in pair:
            each.close()
    found = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    for name, times in taken.items():
        ours, others = zip(*times, strict=True)
        least, middle = min(others) / min(ours), median(b / a for a, b in times)
        found[name] = {"least": least, "median": middle, "rounds": len(times)}
        print(f"{least:.3f} {middle:.3f} {name}", flush=True)
    for kind in ("least", "median"):
        ratios = [found[name][kind] for name in taken]
        print(f"{geometric_mean(ratios):.3f} of all by {kind}; worst {min(ratios):.3f}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def timed(
    pair: Sequence["Checkout"], prepare: Sequence[object], rounds: int
) -> Iterator[tuple[float, float]]:
    """Seconds that a step takes here and in the other checkout, in turns."""
    for each in pair:
        each.ask("make", *prepare)
    for turn in range(rounds):
        taken = {at: pair[at].ask("run", 1) for at in ((0, 1) if turn % 2 else (1, 0))}
        yield taken[0], taken[1]


if __name__ == "__main__":
    main(sys.argv[1:])
