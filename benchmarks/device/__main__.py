"""Everything that an accelerator has to show, in one command and a few minutes.

``python -m benchmarks.device --seconds 420 --out results`` writes ``results/device.json`` after
each section. Sections start no new row when their share of the time is over. ``--tiny`` runs a
small part of each, on a processor in less than a minute.
"""

import argparse
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.device.decompositions import decompositions
from benchmarks.device.facts import facts
from benchmarks.device.graphs import graphs
from benchmarks.device.kernel_prices import kernel_prices
from benchmarks.device.model_values import model_values
from benchmarks.device.network_times import compiled_gradients, network_times
from benchmarks.device.operation_values import operation_values
from benchmarks.device.own_kernels import own_kernels
from benchmarks.device.plan_choices import plan_choices
from benchmarks.device.precision_layouts import precision_layouts
from benchmarks.device.sections import Report, Section, Setting
from tnconv.codegen.prices.store import VARIABLE

SECTIONS: Mapping[str, tuple[Section, float]] = {
    "facts": (facts, 0.12),
    "kernel prices": (kernel_prices, 0.15),
    "own kernels": (own_kernels, 0.12),
    "plan choices": (plan_choices, 0.27),
    "network times": (network_times, 0.24),
    "model values": (model_values, 0.09),
    "graphs": (graphs, 0.07),
    "precision and layouts": (precision_layouts, 0.06),
    "decompositions": (decompositions, 0.03),
    "operation values": (operation_values, 0.12),
    "compiled gradients": (compiled_gradients, 0.05),
}
"""What runs, in this order, and its share of the time."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all sections, or those that are named; the number of failed rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device", description=__doc__)
    parser.add_argument("--seconds", type=float, default=420.0, help="for all sections together")
    parser.add_argument("--out", type=Path, default=Path("device-results"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a small part of each, as a test")
    parser.add_argument("--section", action="append", choices=SECTIONS, help="repeatable")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    report = Report(Setting(device, options.tiny), options.out)
    chosen = options.section or list(SECTIONS)
    whole = sum(SECTIONS[name][1] for name in chosen)
    with tempfile.TemporaryDirectory() as folder:  # no earlier calibration counts
        before = os.environ.get(VARIABLE)
        os.environ[VARIABLE] = folder
        try:
            for name in chosen:
                section, share = SECTIONS[name]
                report.run(name, section, options.seconds * share / whole)
        finally:
            os.environ.pop(VARIABLE)
            if before is not None:
                os.environ[VARIABLE] = before
    print(f"{len(report.failures)} rows failed")
    return len(report.failures)


if __name__ == "__main__":
    main()
