"""What "economy" costs if it is written by hand for one network, in turns with the monitor.

Run as ``python -m benchmarks.monitor_by_hand --json results.json``; ``--help`` lists the options.
The code here knows that the network is 3C3D without padding modes or groups, that the loss is a
mean, and that nothing goes wrong: forward hooks keep what layers read, tensor hooks the gradients
after them, and after the step gradients of samples are contracted layer by layer from windows that
are copied out. Buffers are allocated once. Histograms are counted by the library's own functions.
What this takes is close to what any implementation in calls of torch takes. A number is the median
of the ratios of rounds, in which all three are timed one after the other.
"""

import argparse
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import measure, monitor
from benchmarks.models import PROBLEMS
from tnconv.monitor.histograms import Binning, counted
from tnconv.monitor.histograms_of_products import counted_products
from tnconv.monitor.needs import Bins

ROWS = {"economy without histogram": (None, False), "economy, 8 samples": (8, True)}
PART = 2**20  # entries of gradients at a time


class ByHand:
    """Loss, norms, projections, distances and histograms of one network's steps."""

    def __init__(self, model: nn.Module, batch: int, samples: int | None, counts: bool) -> None:
        self.batch, self.samples, self.counts = batch, samples, counts
        self.layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        self.parameters = list(model.parameters())
        self.start, self.before, self.g, self.update, self.last, self.space = (
            [p.detach().clone() for p in self.parameters] for _ in range(6)
        )
        self.generator = torch.Generator().manual_seed(0)
        self.binning = Binning(Bins(100, -2.0, 2.0), float(batch))
        self.found: dict[str, Any] = {}

    @torch.no_grad()
    def begin(self) -> None:
        """Hooks, the samples, and the parameters before the step."""
        self.seen: list[tuple[nn.Module, Tensor]] = []
        self.after: dict[int, Tensor] = {}
        drawn = torch.randperm(self.batch, generator=self.generator)
        self.index = None if self.samples is None else drawn[: self.samples].sort().values
        self.hooks = [m.register_forward_hook(self._read) for m in self.layers]
        torch._foreach_copy_(self.before, self.parameters)

    def _rows(self, x: Tensor) -> Tensor:
        return x.detach() if self.index is None else x.detach().index_select(0, self.index)

    def _read(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        at = len(self.seen)
        self.seen.append((module, self._rows(args[0])))

        def arrived(v: Tensor) -> None:
            self.after[at] = self._rows(v)

        output.register_hook(arrived)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def backward_is_over(self) -> None:
        """Norms and copies of the gradients."""
        given = [p.grad for p in self.parameters if p.grad is not None]
        self.norms = torch._foreach_norm(given)
        torch._foreach_copy_(self.g, given)

    @torch.no_grad()
    def end(self) -> None:
        """Everything else."""
        for hook in self.hooks:
            hook.remove()
        self.last, self.update = self.update, self.last
        torch._foreach_copy_(self.update, self.parameters)
        torch._foreach_sub_(self.update, self.before)
        updates = torch._foreach_norm(self.update)
        torch._foreach_copy_(self.space, self.before)
        torch._foreach_sub_(self.space, self.start)
        distances = torch._foreach_norm(self.space)
        n = len(self.after[0])
        self.squares, self.projections = torch.zeros(n), torch.zeros(3, n)
        self.histogram = torch.zeros(100, dtype=torch.int64)
        for at, (module, x) in enumerate(self.seen):
            sources = self.g, self.update, self.last
            pairs = [(each[2 * at], each[2 * at + 1]) for each in sources]
            work = self._convolution if isinstance(module, nn.Conv2d) else self._linear
            work(module, x, self.after[at], pairs)
        lists = torch.stack(self.norms), torch.stack(updates), torch.stack(distances)
        for name, each in zip(("norms", "updates", "distances"), lists, strict=True):
            self.found[name] = each.tolist()
        for name in ("squares", "projections", "histogram"):
            self.found[name] = getattr(self, name).tolist()

    def _linear(self, module: Any, x: Tensor, v: Tensor, pairs: Any) -> None:
        self.squares += v.square().sum(1) * (x.square().sum(1) + 1)
        for k, (weight, bias) in enumerate(pairs):
            self.projections[k] += (v * (x @ weight.T)).sum(1) + v @ bias
        if self.counts:
            self.histogram += counted_products(v, x, self.binning) + counted(v, self.binning)

    def _convolution(self, module: Any, x: Tensor, v: Tensor, pairs: Any) -> None:
        (k, _), (p, _), (h, w) = module.kernel_size, module.padding, v.shape[2:]
        flat = v.sum((2, 3))
        self.squares += flat.square().sum(1)
        for at, (_, bias) in enumerate(pairs):
            self.projections[at] += flat @ bias
        if self.counts:
            self.histogram += counted(flat, self.binning)
        padded = F.pad(x, (p,) * 4) if p else x
        size = max(1, PART // module.weight.numel())
        for first in range(0, len(x), size):
            some = slice(first, first + size)
            windows = padded[some].unfold(2, h, 1).unfold(3, w, 1)
            columns = windows.reshape(len(windows), x.shape[1] * k * k, h * w)
            each = (v[some].flatten(2) @ columns.mT).flatten(1)
            self.squares[some] += torch.linalg.vector_norm(each, dim=1).square_()
            for at, (weight, _) in enumerate(pairs):
                self.projections[at, some] += each @ weight.reshape(-1)
            if self.counts:
                self.histogram += counted(each, self.binning)


def ratios(name: str, options: argparse.Namespace) -> dict[str, object]:
    """One row: the run alone, by hand, and with the monitor, in turns."""
    samples, counts = ROWS[name]
    make = lambda: PROBLEMS["3c3d"].model().train()  # noqa: E731
    alone = monitor.run(None, options.batch, False, make)
    watched = monitor.run(monitor.ROWS[name], options.batch, False, make)
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(10, 3, 32, 32, generator=generator)
    hand = ByHand(model, options.batch, samples, counts)

    def by_hand() -> None:
        hand.begin()
        y = torch.randint(10, (options.batch,), generator=generator)
        x = centres[y] + torch.randn(options.batch, 3, 32, 32, generator=generator)
        optimizer.zero_grad()
        losses = F.cross_entropy(model(x), y, reduction="none")
        losses.mean().backward()
        hand.backward_is_over()
        optimizer.step()
        hand.end()
        hand.found["losses"] = losses.tolist()

    steps = (alone.step, by_hand, watched.step)
    for _ in range(5):
        for step in steps:
            step()
    if samples is None:
        _expect_agreement(hand, watched)
    times: list[list[float]] = [[], [], []]
    for _ in range(options.rounds):
        for at in random.sample(range(3), 3):
            begin = time.process_time()
            steps[at]()
            times[at].append(time.process_time() - begin)
    by, ours = (median(b / a for a, b in zip(times[0], each, strict=True)) for each in times[1:])
    least = [min(each) for each in times]
    found: dict[str, object] = {"row": name, "by hand": by, "monitor": ours}
    found |= {"minima by hand": least[1] / least[0], "minima monitor": least[2] / least[0]}
    found |= {"alone_ms": 1e3 * median(times[0]), "rounds": options.rounds}
    print(found, flush=True)
    return found


def _expect_agreement(hand: ByHand, watched: monitor.Run) -> None:
    """Both runs had the same batches: check that they measured the same."""
    assert watched.monitor is not None
    record, b = watched.monitor.records[-1], hand.batch
    mean = sum(norm**2 for norm in hand.found["norms"])
    total = b**2 * sum(hand.found["squares"])  # of gradients of the samples' own losses
    test = ((total - b * mean) / (b * (b - 1) * mean)) ** 0.5
    assert abs(test / record["NormTest"] - 1) < 1e-3, (test, record["NormTest"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = [ratios(name, options) for name in ROWS]
    if options.json is not None:
        measure.write_results(options.json, "cpu", rows)


if __name__ == "__main__":
    measure.with_allocator("benchmarks.monitor_by_hand", sys.argv[1:])
    main()
