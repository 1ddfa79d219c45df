"""Blocks of parameters: all, by layer, each by itself, or as a user names them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

Groups = Literal["network", "layer", "parameter"] | Mapping[str, Sequence[str]]
"""One block for the whole network, for each layer, for each parameter, or names by block."""


def partition(learned: Sequence[str], groups: Groups) -> dict[str, list[str]]:
    """The parameters of each block, of those that learn.

    Raises:
        ValueError: another word, or names that are repeated, foreign or frozen.
    """
    if groups == "network":
        return {"network": [*learned]}
    if groups == "parameter":
        return {name: [name] for name in learned}
    if groups == "layer":
        found: dict[str, list[str]] = {}
        for name in learned:
            found.setdefault(name.rpartition(".")[0], []).append(name)
        return found
    if isinstance(groups, str):
        raise ValueError(f"groups is {groups!r}; expected 'network', 'layer' or 'parameter'")
    found = {name: list(own) for name, own in groups.items()}
    if empty := [name for name, own in found.items() if not own]:
        raise ValueError(f"groups: block {empty[0]!r} has no names; expected at least one")
    _check_partition([name for own in found.values() for name in own], learned)
    return found


def _check_partition(named: Iterable[str], learned: Sequence[str]) -> None:
    given = list(named)
    foreign = sorted(set(given) - set(learned))
    repeated = sorted({name for name in given if given.count(name) > 1})
    if foreign or repeated or not given:
        wrong = f"no parameters that learn are called {', '.join(foreign)}" if foreign else ""
        wrong = wrong or (f"{', '.join(repeated)} repeated" if repeated else "no names")
        raise ValueError(f"groups: {wrong}; expected the model's own names, each once")
