"""All results of convolutions in ``benchmarks/results``: measured, or gone on with, and rendered.

Run as ``python -m benchmarks.all``, or with the names of some files; ``--device cuda`` measures
those of a GPU. A run that was interrupted goes on; to measure anew, delete its JSON file.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
LAYERS, OVERHEAD = "benchmarks.layers", "benchmarks.overhead"
BATCH, ONE, TWO = ("--batch", "8"), ("--cpu-time",), ("--threads", "2")
ALL, OWN = (LAYERS, "--cases", "cnn", *BATCH), (LAYERS, "--cases", "own", *BATCH)
KERNELS = ("forward", "weight_vjp", "input_vjp", "kfac_reduce", "kfac_expand")
AS_RUN = (
    *(LAYERS, "--quick", *BATCH, "--threads", "1", "--seconds", "0.1", "--peer", "torch"),
    *(word for name in KERNELS for word in ("--operation", name)),
)
FURTHER = ("--quick", "--further", "--seconds", "0.1")
RUNS = {
    "overhead-cpu": (OVERHEAD,),
    "layers-cpu-one-thread": (*ALL, *ONE, "--memory", "--seconds", "0.35"),
    "layers-cpu-two-threads": (*ALL, *TWO, "--seconds", "0.4"),
    "quick-cpu-two-threads": (LAYERS, "--quick", *BATCH, *TWO, "--seconds", "0.2"),
    "quick-cpu-bfloat16": (*AS_RUN, "--dtype", "bfloat16"),
    "quick-cpu-channels-last": (*AS_RUN, "--channels-last"),
    "quick-cpu-bfloat16-channels-last": (*AS_RUN, "--dtype", "bfloat16", "--channels-last"),
    "own-cpu-one-thread": (*OWN, *ONE, "--memory", "--seconds", "0.35"),
    "own-cpu-two-threads": (*OWN, *TWO, "--seconds", "0.15"),
    "further-cpu-one-thread": (LAYERS, *FURTHER, *BATCH, *ONE),
    "self-check-cpu-one-thread": (LAYERS, "--quick", "--self-check", *BATCH, *ONE),
}
ON_GPU = {
    "layers-gpu": (LAYERS, "--cases", "cnn", "--batch", "32", "--device", "cuda", "--memory"),
    "own-gpu": (LAYERS, "--cases", "own", "--batch", "32", "--device", "cuda", "--memory"),
}


def commands(name: str) -> list[list[str]]:
    """What measures and what renders a file."""
    file = str(RESULTS / f"{name}.json")
    python, (module, *arguments) = [sys.executable, "-m"], (RUNS | ON_GPU)[name]
    measured = [*python, module, *arguments, "--json", file]
    return [measured, [*python, "benchmarks.report", file]]


def main(arguments: Sequence[str]) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.all", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(RUNS | ON_GPU)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - {*RUNS, *ON_GPU}:
        parser.error(f"no file {', '.join(sorted(unknown))}; expected some of {[*RUNS, *ON_GPU]}")
    for name in options.names or (RUNS if options.device == "cpu" else ON_GPU):
        for command in commands(name):
            print(*command[1:], flush=True)
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
