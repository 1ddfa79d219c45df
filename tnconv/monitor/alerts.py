"""Rules that look at what was recorded, and say in a line what it means and what to try."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from statistics import median
from typing import Any

from tnconv.diagrams.notices import warn
from tnconv.displays import Shown
from tnconv.monitor.events import Alert, finite, total

__all__ = ["RULES", "Alert", "Alerts", "History", "Rule"]
ROW = 5  # values that have to agree before a rule speaks
QUIET = 100  # steps before a rule says the same again


@dataclass(repr=False)
class History(Shown):
    """All records so far, the names of parameters, and what was just recorded: ``fresh``.

    Args:
        records: one mapping of values for each step that was recorded.
        names: of the parameters, in the order of lists by parameter.
        fresh: names of what the last step recorded.
        samples: B of the last step.
        since: the step from which on these parameters learn, and no others.
    """

    records: Sequence[Mapping[str, Any]]
    names: Sequence[str]
    fresh: frozenset[str] = frozenset()
    samples: int = 0
    since: int = 0

    def last(self, name: str, count: int = 1, since: int = 0) -> list[Any]:
        """The last values of a quantity, at most so many, none if it is not fresh."""
        if name not in self.fresh:
            return []
        found: list[Any] = []
        for record in reversed(self.records):
            if len(found) == count or record.get("step", since) < since:
                break
            if name in record:
                found.append(record[name])
        return found[::-1]

    def rows(self, name: str, count: int = 1) -> list[Any]:
        """The last lists by parameter, of the parameters that learn now."""
        return self.last(name, count, self.since)


Rule = Callable[[History], Iterable[Alert]]


def not_finite(history: History) -> Iterator[Alert]:
    """A loss or gradient that is NaN or infinite, with the first layer that has it."""
    for norms in history.last("GradNorm"):
        bad = [name for name, x in zip(history.names, norms, strict=False) if not isfinite(x)]
        if bad:
            text = f"first in the gradient of {bad[0]!r}; lower the learning rate, clip gradients"
            yield Alert("error", "gradient is not finite", text, "not_finite")
            return
    for loss in history.last("Loss"):
        if not isfinite(loss):
            text = "the loss is NaN or infinite; look at the inputs, lower the learning rate"
            yield Alert("error", "loss is not finite", text, "not_finite")


def learning_rate(history: History) -> Iterator[Alert]:
    """Steps that end past, or hardly move towards, the minimum in their own direction."""
    alphas = [a for a in history.last("Alpha", 2 * ROW) if finite(a)]
    if len(alphas) < 2 * ROW:
        return
    middle = median(alphas)
    if middle > 0.5 or sum(a > 1 for a in alphas[-ROW:]) == ROW:
        text = f"median alpha {middle:.2f}: steps end far past the minimum in their direction; "
        text += "lower the learning rate"
        yield Alert("warning", "learning rate too large", text, "learning_rate")
    elif middle < -0.9:
        text = f"median alpha {middle:.2f} is below -0.9: steps hardly move; raise it"
        yield Alert("warning", "learning rate too small", text, "learning_rate")


def noisy_gradient(history: History) -> Iterator[Alert]:
    """Gradients smaller than their own noise."""
    tests = history.last("NormTest", ROW)
    if len(tests) == ROW and all(finite(t) and t > 1 for t in tests):
        text = f"NormTest {tests[-1]:.2f} is above 1: noise exceeds the gradient; larger batches"
        yield Alert("warning", "gradient within its noise", text, "noisy_gradient")


def batch_too_large(history: History) -> Iterator[Alert]:
    """Batches that average more than the noise asks for."""
    scales = [s for s in history.last("CriticalBatchSize", 2 * ROW) if finite(s)]
    if len(scales) == 2 * ROW and history.samples > 16 * median(scales):
        text = f"{history.samples} samples, noise scale {median(scales):.1f}; smaller batches learn"
        yield Alert("info", "batch above the noise scale", f"{text} as fast", "batch_too_large")


def vanishing_layers(history: History) -> Iterator[Alert]:
    """Layers whose gradient is nothing beside that of others."""
    rows = history.rows("GradNorm", ROW)
    if len(rows) < ROW or not all(isfinite(x) for row in rows for x in row):
        return
    for at, name in enumerate(history.names):
        if all(row[at] < 1e-4 * max(row) for row in rows):
            text = f"the gradient of {name!r} is below 1e-4 of the largest; other activations, "
            text += "normalisation or initialisation"
            yield Alert("warning", "vanishing gradient", text, f"vanishing_layers:{name}")
            return


def exploding_gradient(history: History) -> Iterator[Alert]:
    """A gradient that is far above what it used to be."""
    totals = [total("GradNorm", row) for row in history.last("GradNorm", 50)]
    known = [t for t in totals if t is not None and isfinite(t)]
    if len(known) >= 10 and known[-1] > 100 * median(known[:-1]):
        text = f"its norm {known[-1]:.2g} is 100 times the median before; clip, or lower the rate"
        yield Alert("warning", "exploding gradient", text, "exploding_gradient")


def badly_scaled_inputs(history: History) -> Iterator[Alert]:
    """A first layer whose weight learns from inputs of a large scale."""
    rows = history.rows("GradNorm", ROW)
    if len(rows) < ROW or len(history.names) < 3:
        return
    ratios = [row[0] / row[1] for row in rows if row[1] and isfinite(row[0])]
    paired = history.names[0].endswith("weight") and history.names[1].endswith("bias")
    if paired and len(ratios) == ROW and min(ratios) > 100:
        text = f"the gradient of {history.names[0]!r} is {median(ratios):.0f} times its bias': "
        yield Alert("warning", "inputs badly scaled", f"{text}normalise inputs", "badly_scaled")


def dead_units(history: History) -> Iterator[Alert]:
    """Rectifiers most of whose units give nothing."""
    for layers in history.last("DeadUnits"):
        name, most = max(layers.items(), key=lambda item: item[1], default=("", 0.0))
        if most > 0.5:
            text = (
                f"{most:.0%} of the units of {name!r} are dead; lower the rate, leaky activations"
            )
            yield Alert("warning", "dead units", text, f"dead_units:{name}")


def saturated_units(history: History) -> Iterator[Alert]:
    """Bounded activations at their limits."""
    for layers in history.last("SaturatedUnits"):
        name, most = max(layers.items(), key=lambda item: item[1], default=("", 0.0))
        if most > 0.5:
            text = f"{most:.0%} of the entries of {name!r} are at a limit; scale inputs or weights"
            yield Alert("warning", "saturated units", text, f"saturated_units:{name}")


def outlying_samples(history: History) -> Iterator[Alert]:
    """Few samples that make most of the gradient's noise: labels may be wrong."""
    shares = [s for s in history.last("LargestSample", 2 * ROW) if finite(s)]
    if len(shares) == 2 * ROW and median(shares) > 8:
        text = f"the largest squared gradient is {median(shares):.0f} times the mean; check labels"
        yield Alert("warning", "outlying samples", text, "outlying_samples")


def early_stopping(history: History) -> Iterator[Alert]:
    """The sign of the criterion of Mahsereci et al. 2017."""
    values = history.last("EarlyStopping", ROW)
    if len(values) == ROW and all(finite(v) and v > 0 for v in values):
        text = "the gradient is what noise alone would give; stop, or decay the learning rate"
        yield Alert("info", "nothing left to learn", text, "early_stopping")


def plateau(history: History, window: int = 50) -> Iterator[Alert]:
    """A loss that does not fall any more."""
    losses = [x for x in history.last("Loss", 2 * window) if finite(x)]
    if len(losses) == 2 * window:
        before, now = median(losses[:window]), median(losses[window:])
        if now > 0.995 * before:
            text = (
                f"median loss {now:.3g} after {before:.3g} {window} steps before; change the rate"
            )
            yield Alert("info", "plateau", text, "plateau")


RULES: tuple[Rule, ...] = (
    *(not_finite, learning_rate, noisy_gradient, batch_too_large, vanishing_layers),
    *(exploding_gradient, badly_scaled_inputs, dead_units, saturated_units, outlying_samples),
    *(early_stopping, plateau),
)


@dataclass
class Alerts:
    """Asks all rules, and holds back what was said not long ago."""

    rules: Sequence[Rule] = RULES
    said: dict[str, int] = field(default_factory=dict)

    def _asked(self, rule: Rule, history: History) -> list[Alert]:
        """What a rule says; one that raises is not asked again."""
        try:
            return [*rule(history)]
        except Exception as error:
            self.rules = [each for each in self.rules if each is not rule]
            name = getattr(rule, "__name__", type(rule).__name__)
            warn(f"the rule {name} raised and is left out: {error!r}")
            return []

    def of(self, step: int, history: History) -> list[Alert]:
        """The alerts of a step."""
        found = []
        for alert in (alert for rule in self.rules for alert in self._asked(rule, history)):
            key = alert.rule or alert.title
            if step - self.said.get(key, -QUIET) >= QUIET:
                self.said[key] = step
                found.append(alert)
        return found
