"""Where the parameters that learn began, through freezing, renaming and moving."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tnconv.monitor.subject import copies

Named = Sequence[tuple[str, nn.Parameter]]


class Origins:
    """Copies of the parameters at the reference point.

    A parameter keeps its copy under another name and after it was frozen. One that takes the place
    of another, as wrappers do, gets the copy of what had its name and shape.

    Args:
        named: the parameters that learn.
        values: their values; none where no copies are needed.
    """

    def __init__(self, named: Named, values: Sequence[Tensor] = ()) -> None:
        self.start = copies(values)
        self.former: dict[str, Tensor] = {}  # of parameters that do not learn now
        self._known = {p: (name, p.shape) for name, p in named}
        self._of: dict[Tensor, Tensor] = {}

    def stay(self, named: Named) -> bool:
        """Whether the same parameters learn; those that take another's place are noted."""
        known = {p: (name, p.shape) for name, p in named}
        moved = any(self._known.get(p, each) != each for p, each in known.items())
        if moved or [*self._known.values()] != [*known.values()]:
            return False
        self._known = known
        return True

    def follow(self, named: Named, values: Sequence[Tensor]) -> None:
        """Look the copies up of those that learn now; ``values`` are where new ones begin."""
        before, self._known = self._known, {p: (name, p.shape) for name, p in named}
        if not self.start:
            return
        self.former |= dict(zip((name for name, _ in before.values()), self.start, strict=False))
        self._of |= dict(zip(before, self.start, strict=False))
        gone = {name for p, (name, _) in before.items() if p not in self._known}
        gone |= self.former.keys() - {name for name, _ in before.values()}
        known = zip(self._known.items(), copies(values), strict=True)
        self.start = [self._origin(p, *each, now, gone) for (p, each), now in known]

    def _origin(
        self, parameter: Tensor, name: str, shape: torch.Size, now: Tensor, gone: set[str]
    ) -> Tensor:
        if parameter in self._of:
            return self._of[parameter]
        found = self.former.get(name) if name in gone else None
        return now if found is None or found.shape != shape else found

    def state(self) -> dict[str, Any]:
        """Tensors by what they are of."""
        former = {name: each.clone() for name, each in self.former.items()}
        return {"start": copies(self.start), "former": former}

    def load(self, state: Mapping[str, Any], parameters: Sequence[Tensor]) -> None:
        """Take a state over, onto the parameters' devices."""
        pairs = zip(state["start"], parameters, strict=False)
        self.start = [each.to(p.device, copy=True) for each, p in pairs]
        self.former = {name: each.clone() for name, each in state.get("former", {}).items()}
        self._of.clear()
