"""Random models that put their samples in random places: folded, first, last, sorted, shared.

A model is a list of blocks. A block brings activations ``(n, t, d)`` into a layout of its own, runs
layers there, and brings them back, so that blocks follow each other in any order. What a model is
for one sample does not depend on the others, unless it has a block of ``MIXING``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

D = 4
WORDS = 7
Module = Callable[[], nn.Module]


class Block(nn.Module):
    """``forward(x)`` of activations ``(n, t, d)``."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(D, D), nn.LayerNorm(D)
        self.weight, self.shift = nn.Parameter(torch.randn(D, D)), nn.Parameter(torch.randn(D))
        self.table = nn.Embedding(WORDS, D)
        self.conv = nn.Conv1d(1, 2, 3, padding=1)
        self.group = nn.GroupNorm(2, 2)
        self.register_buffer("bank", torch.randn(3, D))


class Plain(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.layer(x)))


class TimeFirst(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.layer(x.transpose(0, 1)))).transpose(0, 1)


class Last(Block):
    """The samples are the last dimension but one of four."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.movedim(0, 1)[:, None]
        return torch.tanh(self.layer(y))[:, 0].movedim(1, 0)


class FoldedNT(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x.flatten(0, 1))).unflatten(0, x.shape[:2])


class FoldedTN(Block):
    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        y = torch.tanh(self.norm(self.layer(x.transpose(0, 1).reshape(n * t, D))))
        return y.unflatten(0, (t, n)).transpose(0, 1)


class Siamese(Block):
    def forward(self, x: Tensor) -> Tensor:
        first, second = torch.tanh(self.layer(torch.cat([x, x.sin()]))).chunk(2)
        return first * second


class Frames(Block):
    """A convolution and a group normalisation of folded rows."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.group(self.conv(x.flatten(0, 1)[:, None]))
        return torch.tanh(y.mean(1)).unflatten(0, x.shape[:2])


class FramesTN(Block):
    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        y = self.conv(x.transpose(0, 1).flatten(0, 1)[:, None])
        return torch.tanh(y.mean(1)).unflatten(0, (t, n)).transpose(0, 1)


class Sorted(Block):
    def forward(self, x: Tensor) -> Tensor:
        order = x.detach().sum((1, 2)).argsort()
        return torch.tanh(self.layer(x[order]))[order.argsort()]


class Routed(Block):
    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        chosen = rows.detach().sum(1) > 0
        out = torch.sin(rows)
        if bool(chosen.any()):
            at = chosen.nonzero()[:, 0]
            out = out.index_add(0, at, self.layer(rows[at]))
        return out.view_as(x)


class Packed(Block):
    """Some rows of each sample, of one more than of another."""

    def forward(self, x: Tensor) -> Tensor:
        keep = x.detach().sum(-1) > 0
        y = self.layer(x[keep])
        return torch.tanh(x).masked_scatter(keep[..., None].expand_as(x), y)


class Positions(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x + self.table(torch.arange(x.shape[1])))


class PositionsOfOneRow(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x * self.norm(self.table(torch.arange(x.shape[1])[None])))


class PositionsExpanded(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x + self.table(torch.arange(x.shape[1]).expand(x.shape[:2])))


class Bank(Block):
    """Learned features of a fixed set of rows, which can be as many as samples."""

    def forward(self, x: Tensor) -> Tensor:
        keys = torch.tanh(self.layer(self.bank))
        return (x @ keys.T).softmax(-1) @ keys + self.norm(x)


class Token(Block):
    def forward(self, x: Tensor) -> Tensor:
        token = self.shift.sin().expand(len(x), 1, -1)
        y = torch.cat([token, x], 1)
        return torch.tanh(self.layer(y)[:, 1:] + y[:, :1])


class Bare(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight.T + self.shift.exp())


class First(Block):
    """A weight on the left of the rows."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.weight @ x.flatten(0, 1).T
        return torch.tanh(y).T.unflatten(0, x.shape[:2])


class Attention(Block):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2, batch_first=batch_first)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.batch_first else x.transpose(0, 1)
        y = y + self.attention(y, y, y, need_weights=False)[0]
        return y if self.batch_first else y.transpose(0, 1)


class Recurrent(Block):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(D, D)

    def forward(self, x: Tensor) -> Tensor:
        state, states = x.new_zeros(len(x), D), []
        for step in x.unbind(1):
            state = self.cell(step, state)
            states.append(state)
        return torch.stack(states, 1)


class Activation(Block):
    def __init__(self) -> None:
        super().__init__()
        self.prelu = nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.prelu(x)


class Centred(Block):
    """Samples see each other's mean."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x) - x.mean(0))


class AcrossBatch(Block):
    """Attention whose batch is the wrong dimension."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.transpose(0, 1)
        return ((y @ y.mT).softmax(-1) @ self.layer(y)).transpose(0, 1)


SEPARATE: tuple[Module, ...] = (
    *(Plain, TimeFirst, Last, FoldedNT, FoldedTN, Siamese, Frames, FramesTN, Sorted, Routed),
    *(Packed, Positions, PositionsOfOneRow, PositionsExpanded, Bank, Token, Bare, First),
    *(lambda: Attention(True), lambda: Attention(False), Recurrent, Activation),
)
MIXING: tuple[Module, ...] = (Centred, AcrossBatch)


@dataclass(frozen=True)
class Input:
    """How samples enter a model, and what it does first."""

    words: bool
    changed: bool  # before any layer reads them
    batch_dim: int

    def draw(self, samples: int, steps: int) -> Tensor:
        shape = (samples, steps) if self.batch_dim == 0 else (steps, samples)
        return torch.randint(WORDS - 1, shape) if self.words else torch.randn(*shape, D)


class Model(nn.Module):
    """Blocks between an input and an output whose rows are somewhere."""

    def __init__(self, given: Input, blocks: list[Module], output: str) -> None:
        super().__init__()
        self.given, self.output = given, output
        self.words, self.read = nn.Embedding(WORDS, D), nn.Linear(D, D)
        self.blocks = nn.ModuleList(make() for make in blocks)
        self.head = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.given.changed:
            x = x + 1 if self.given.words else x * 2
        y = self.words(x) if self.given.words else torch.tanh(self.read(x))
        y = y.movedim(self.given.batch_dim, 0)
        for block in self.blocks:
            y = block(y)
        return OUTPUTS[self.output](self.head(y))


OUTPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda y: y.mean(1),
    "all": lambda y: y,
    "time first": lambda y: y.transpose(0, 1),
    "rows": lambda y: y.flatten(0, 1),
    "rows in turns": lambda y: y.transpose(0, 1).flatten(0, 1),
    "channels": lambda y: y.mT,
}


def error(output: Tensor, targets: Tensor) -> Tensor:
    """A loss that needs no targets of any shape: a sum of squares of every entry's own."""
    return (output - 0.3).square().sum() + 0 * targets.sum()


squared = nn.MSELoss(reduction="sum")
inputs = st.builds(Input, st.booleans(), st.booleans(), st.sampled_from([0, 0, 0, 1]))


@dataclass(frozen=True)
class Situation:
    """A model, and a batch of it."""

    model: Model
    x: Tensor
    samples: int
    mixes: bool

    def sample(self, n: int) -> Tensor:
        return self.x.narrow(self.model.given.batch_dim, n, 1)


@st.composite
def situations(draw: st.DrawFn) -> Situation:
    """Sizes are small and often equal, so that shapes tell nothing."""
    samples, steps = draw(st.sampled_from([2, 3, 4])), draw(st.sampled_from([2, 3, 4]))
    blocks = draw(st.lists(st.sampled_from(SEPARATE), max_size=3))
    mixes = draw(st.integers(0, 9)) == 0
    if mixes:
        blocks.insert(draw(st.integers(0, len(blocks))), draw(st.sampled_from(MIXING)))
    given, output = draw(inputs), draw(st.sampled_from([*OUTPUTS]))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    model = Model(given, blocks, output)
    return Situation(model, given.draw(samples, steps), samples, mixes)


def per_sample_gradients(situation: Situation) -> dict[str, Tensor]:
    """One sample at a time, by autograd alone."""
    named = dict(situation.model.named_parameters())
    rows = []
    for n in range(situation.samples):
        y = situation.model(situation.sample(n))
        rows.append(
            torch.autograd.grad(
                error(y, torch.zeros(1)), list(named.values()), materialize_grads=True
            )
        )
    return {
        name: torch.stack(each) for name, each in zip(named, zip(*rows, strict=True), strict=True)
    }


def ggn_diagonals(situation: Situation) -> dict[str, Tensor]:
    """``2 Σ_o (∂y[n, o] / ∂θ)²`` of each sample by itself: of a sum of squares."""
    named = dict(situation.model.named_parameters())
    found: dict[str, list[Tensor]] = {name: [] for name in named}
    for n in range(situation.samples):
        y = situation.model(situation.sample(n)).flatten()
        total = {name: torch.zeros_like(p) for name, p in named.items()}
        for entry in y:
            grads = torch.autograd.grad(
                entry, list(named.values()), retain_graph=True, materialize_grads=True
            )
            for name, g in zip(named, grads, strict=True):
                total[name] += 2 * g.square()
        for name, value in total.items():
            found[name].append(value)
    return {name: torch.stack(each) for name, each in found.items()}


__all__ = ["F", "Situation", "error", "ggn_diagonals", "per_sample_gradients", "situations"]
