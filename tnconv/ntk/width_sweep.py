"""Quantities of networks against their width: a table, and slopes on logarithmic axes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import log, pi, sqrt, tan
from pathlib import Path
from statistics import NormalDist

import torch
from torch import nn

from tnconv.displays import Shown

Factory = Callable[[int], nn.Module]
Probe = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Slope:
    """The exponent b of ``value ~ widthᵇ`` with a confidence interval."""

    exponent: float
    lower: float
    upper: float


@dataclass(frozen=True)
class Row:
    """One measurement."""

    width: int
    seed: int
    probe: str
    value: float


@dataclass(frozen=True, repr=False)
class WidthTable:
    """All measurements of a sweep, one row for each."""

    rows: tuple[Row, ...]

    def __repr__(self) -> str:
        found = {name: sorted({getattr(row, name) for row in self}) for name in ("probe", "width")}
        probes, widths = (", ".join(map(str, values)) for values in found.values())
        return f"<WidthTable of {len(self.rows)} values: {probes}; widths {widths}>"

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def slope(self, probe: str, confidence: float = 0.95) -> Slope:
        """The least-squares slope of ``log value`` over ``log width``, with a confidence interval.

        The interval is Student's, with as many degrees of freedom as measurements less two.

        Raises:
            ValueError: a probe that there is not, fewer than three values or two widths, values
                that are not positive, or a confidence outside (0, 1).
        """
        own = [row for row in self.rows if row.probe == probe]
        if len(own) < 3 or len({row.width for row in own}) < 2:
            raise ValueError(
                f"there are {len(own)} values of probe {probe!r}; expected three or more, at two "
                "widths or more"
            )
        if min(row.value for row in own) <= 0:
            raise ValueError(f"values of probe {probe!r} are not positive; they have no logarithm")
        if not 0 < confidence < 1:
            raise ValueError(f"confidence is {confidence}; expected a number between 0 and 1")
        x, y = [log(row.width) for row in own], [log(row.value) for row in own]
        mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
        spread = sum((a - mean_x) ** 2 for a in x)
        b = sum((a - mean_x) * (c - mean_y) for a, c in zip(x, y, strict=True)) / spread
        left = sum((c - mean_y - b * (a - mean_x)) ** 2 for a, c in zip(x, y, strict=True))
        error = sqrt(left / (len(own) - 2) / spread)
        half = student_quantile((1 + confidence) / 2, len(own) - 2) * error
        return Slope(b, b - half, b + half)

    def plot(self, path: str | Path) -> None:
        """A picture with logarithmic axes: means over seeds, all values, and slopes.

        Raises:
            ImportError: matplotlib is missing.
        """
        import matplotlib.pyplot as plt

        probes = list(dict.fromkeys(row.probe for row in self.rows))
        figure, axes = plt.subplots(1, len(probes), figsize=(4 * len(probes), 3.2), squeeze=False)
        for axis, probe in zip(axes[0], probes, strict=True):
            own = [row for row in self.rows if row.probe == probe]
            widths = sorted({row.width for row in own})
            means = [_mean([r.value for r in own if r.width == width]) for width in widths]
            axis.loglog([r.width for r in own], [r.value for r in own], ".", alpha=0.4)
            axis.loglog(widths, means, "-o", markersize=4)
            axis.set(title=probe, xlabel="width")
            if len(own) > 2 and len(widths) > 1 and min(r.value for r in own) > 0:
                slope = self.slope(probe)
                axis.set_title(f"{probe}\nslope {slope.exponent:.2f} "
                               f"[{slope.lower:.2f}, {slope.upper:.2f}]", fontsize=9)  # fmt: skip
        figure.tight_layout()
        figure.savefig(path, dpi=120)
        plt.close(figure)


@dataclass(frozen=True, repr=False)
class WidthSweep(Shown):
    """A factory over widths and seeds, with probes of every network that it makes.

    Attributes:
        factory: From a width to a network; torch's seed is set before.
        widths: The widths.
        seeds: The seeds, of which each makes one network at every width.
        probes: Functions of a network by name; they may train it, in the order given.

    >>> sweep = WidthSweep(
    ...     lambda width: nn.Linear(width, 1), (8, 32, 128), range(3),
    ...     {"parameters": lambda net: sum(p.numel() for p in net.parameters()) - 1},
    ... )
    >>> round(sweep.run().slope("parameters").exponent, 6)
    1.0
    """

    factory: Factory
    widths: Sequence[int]
    seeds: Sequence[int]
    probes: Mapping[str, Probe]

    def run(self) -> WidthTable:
        """All measurements; torch's generator is as it was afterwards.

        Raises:
            ValueError: no widths, seeds or probes.
        """
        if not (len(self.widths) and len(self.seeds) and self.probes):
            raise ValueError("widths, seeds and probes are empty; expected one or more of each")
        rows = []
        with torch.random.fork_rng():
            for width in self.widths:
                for seed in self.seeds:
                    torch.manual_seed(seed)
                    network = self.factory(width)
                    for name, probe in self.probes.items():
                        rows.append(Row(width, seed, name, float(probe(network))))
        return WidthTable(tuple(rows))


def student_quantile(p: float, freedom: int) -> float:
    """Student's quantile: exact for one and two degrees of freedom, else by Hill's expansion.

    Source: Hill 1970, algorithm 396 of the ACM, as the Cornish-Fisher series in 1/freedom.
    """
    if freedom == 1:
        return tan(pi * (p - 0.5))
    if freedom == 2:
        return (2 * p - 1) / sqrt(2 * p * (1 - p))
    z = NormalDist().inv_cdf(p)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return float(sum(term / freedom**at for at, term in enumerate(terms)))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
