"""How a Gram matrix is computed: in which order, in one call or in tiles, by the least price."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from tnconv.codegen import Program
from tnconv.codegen.baseline import baseline
from tnconv.codegen.planner import ROUTES
from tnconv.codegen.tiers import is_first
from tnconv.diagrams import (
    Expression,
    TensorNetwork,
    View,
    combined_gradients,
    gradient_dots,
    ntk_block,
)
from tnconv.diagrams.errors import TooLittleMemory
from tnconv.models.layers import Operation, explicit, known
from tnconv.operators.low_rank.orders import Order, nest, worth_trying
from tnconv.operators.low_rank.tiles import Tiled, block_rows, samples_of, squares, tiled

Limit = tuple[int, torch.dtype] | None
QUICK = 1e-4  # seconds that are not worth a search for a better order
BLOCK_ROWS = 4  # of the upper triangle: finer ones save little more, and are as many programs
FORMED = 1.1  # explicit rows, which later products are made of, may take this much longer
PRODUCTS = ("window", "pixel gram", "taps")
JOINED = 1.2  # native weight gradients of single samples are as much slower than predicted
KEPT = 4  # explicit rows are kept that are at most this many times as large as the operands ...
SMALL = 2**23  # ... or have at most this many entries
BESIDE = 2**22  # bytes beside explicit rows while they are formed ...
IN_PIECES = 1.05  # ... unless that takes longer by more than this
LATER = 2  # products that usually follow: the gradient and a step
MUCH = 2**25  # bytes that are worth smaller tiles


def _baseline(network: Expression, routes: Sequence[str], **options: Any) -> Program:
    """Whatever routes the baseline takes."""
    found: Program = baseline(network, **options)
    return found


@dataclass(frozen=True)
class Settings:
    """How plans are searched for: a compiler, a device, an order, and bytes of items of a dtype."""

    compiled: Callable[..., Program[Any]]
    device: str
    order: Order
    limit: Limit

    def compile(
        self, network: Expression, order: Order | None, limited: bool = False, **options: Any
    ) -> Program:
        """A program by an order, or by the planner's own.

        One that serves other batches, too, has the price and the peak of the batch that it was
        searched for, and ways are compared by these: with routes given, there is none (0022).
        """
        options = {"device": self.device, "routes": tuple(ROUTES)} | options
        if order is not None:
            options["order"] = nest(network, order)
        if self.limit is not None:
            options["dtype"] = self.limit[1]
            options |= {"memory_limit": self.limit[0]} if limited else {}
        return self.compiled(network, **options)

    def check(self, entries: int) -> None:
        """Raise if a result alone is more than there is room for.

        Raises:
            TooLittleMemory: it is.
        """
        if self.limit is not None and (least := entries * self.limit[1].itemsize) > self.limit[0]:
            raise TooLittleMemory(
                f"memory_limit is {self.limit[0]} bytes; the Gram matrix alone takes {least} bytes",
                least,
            )

    def fits(self, way: "Program | Tiled") -> bool:
        return self.limit is None or self.peak(way) <= self.limit[0]

    def peak(self, way: "Program | Tiled") -> int:
        """The bytes that a way holds at most."""
        dtype = torch.float32 if self.limit is None else self.limit[1]
        return way.peak(dtype.itemsize) if isinstance(way, Tiled) else way.peak_memory(dtype)

    @property
    def simple(self) -> "Settings":
        """Programs without a search."""
        return replace(self, compiled=_baseline)


@dataclass(frozen=True)
class GramPlan:
    """A Gram matrix in one call or in tiles, and a program for explicit rows where that is as good.

    ``form`` gives rows ``(n, m, *parameter)``.
    """

    way: "Program | Tiled"
    form: Program | None = None

    @property
    def operands(self) -> Mapping[str, tuple[int, ...]]:
        return self.way.operands

    @property
    def kept(self) -> int:
        """The entries of explicit rows, if they are made."""
        return 0 if self.form is None else sum(prod(net.shape) for net in self.form.networks)

    def run(self, *given: Tensor) -> Tensor:
        """The Gram matrix, from the operands by position."""
        found: Tensor = self.way.run(*given)
        return found


@dataclass(frozen=True)
class Products:
    """Products that explicit rows would be read by: a Gram matrix, and later ones.

    A later one, the gradient or a combination of rows, otherwise takes as long as a ``gradient``.

    Args:
        rows: The network of all rows, ``(m, n, *parameter)``.
        gradient: That of their sum for one vector.
    """

    rows: TensorNetwork
    gradient: Expression

    def by_rows(self, columns: int) -> tuple[Expression, Expression]:
        """The Gram matrix with some vectors, and a combination, from explicit rows."""
        vectors, samples, *shape = self.rows.shape
        layer, other = (
            Operation(explicit, (count, samples, tuple(shape), True)).networks["parameter"]
            for count in (vectors, columns)
        )
        if columns == vectors:
            gram: Expression = known(gradient_dots(layer, "parameter", vectors))
        else:
            both = ntk_block(layer, other, "parameter", vectors, columns)
            gram = known(known(both), "other_grad_output")
        return gram, known(combined_gradients(layer, "parameter", vectors))


def planned(
    settings: Settings,
    network: Expression,
    pair: TensorNetwork | None = None,
    rows: TensorNetwork | None = None,
    products: "Products | None" = None,
) -> GramPlan:
    """The cheapest way that fits.

    Args:
        settings: How it is searched for.
        network: The Gram network.
        pair: It between two batches, to be cut into tiles, if it can be.
        rows: The network of the rows, if both sides are the same.
        products: What explicit rows are worth it for, if they may be kept.

    Raises:
        TooLittleMemory: a memory limit below what is needed.
    """
    settings.check(prod(network.shape))
    if is_first(settings.compiled) and (first_call := _unsearched(settings, network, pair, rows)):
        return GramPlan(first_call)
    given = _forced(settings)
    first = settings.compile(network, given)
    ways: dict[Order | None, Program] = {}
    if given is None and (first.seconds > QUICK or not settings.fits(first)):
        ways |= {order: settings.compile(network, order) for order in worth_trying(network)}
    ways[given] = first
    fitting: list[Program | Tiled] = [way for way in ways.values() if settings.fits(way)]
    lean: list[Program | Tiled] = [*ways.values()]
    if pair is not None and min(samples_of(pair)) > 1:
        mirrored = rows is not None
        least = min(way.seconds for way in ways.values())
        others = [order for order in ways if order not in (given, "parameter_space")]
        best = [given, *sorted(others, key=lambda order: ways[order].seconds)[:1]]
        for order in best if mirrored and first.seconds > QUICK else ():
            if order != "parameter_space" and ways[order].seconds < 2 * least:  # half is left
                fitting += _triangle(settings, pair, order)
        for order, way in ways.items():
            if not settings.fits(way):
                lean += (tiles := [*_tiles(settings, pair, mirrored, order)])
                fitting += filter(settings.fits, tiles)
    if not fitting and (simple := _unsearched(settings.simple, network, pair, rows)) is not None:
        fitting.append(simple)  # which the first call of a size ran
    if not fitting and given is not None:
        return GramPlan(settings.compile(network, given, limited=True))
    if not fitting:
        raise _least(settings, lean)
    cheapest = min(fitting, key=lambda way: way.seconds)
    if isinstance(cheapest, Program) and cheapest.has_native_kernels:
        order = next((order for order, way in ways.items() if way is cheapest), given)
        cheapest = _of_products(settings, network, order, cheapest)
    form = None if products is None else _form(settings, network, products, cheapest.seconds)
    return GramPlan(cheapest, form)


def _unsearched(
    settings: Settings, network: Expression, pair: TensorNetwork | None, rows: TensorNetwork | None
) -> "Program | Tiled | None":
    """What the first call of a size runs: in tiles where it would hold much at a time."""
    first = settings.compile(network, _forced(settings))
    if settings.limit is not None:
        return first if settings.fits(first) else None
    careful = replace(settings, limit=(MUCH, torch.float32))
    if careful.fits(first) or pair is None or min(samples_of(pair)) < 2:
        return first
    tiles = _tiles(careful, pair, rows is not None, _forced(settings))
    return next((way for way in tiles if careful.fits(way)), first)


def _least(settings: Settings, ways: Iterable["Program | Tiled"]) -> TooLittleMemory:
    """What to raise where no way fits, naming what the leanest one holds."""
    assert settings.limit is not None
    least = min(map(settings.peak, ways))
    return TooLittleMemory(
        f"memory_limit is {settings.limit[0]} bytes; the least that would do is {least} bytes",
        least,
    )


def _of_products(
    settings: Settings, network: Expression, order: Order | None, free: Program
) -> Program:
    """Matrix products instead of native kernels, unless these are predicted to be clearly faster.

    Weight gradients of many vectors are, for native kernels, a group for each sample.
    """
    products = settings.compile(network, order, routes=PRODUCTS)
    better = products.seconds <= JOINED * free.seconds and settings.fits(products)
    return products if better else free


def _forced(settings: Settings) -> Order | None:
    return None if settings.order == "auto" else settings.order


def _triangle(
    settings: Settings, pair: TensorNetwork, order: Order | None
) -> Iterator["Program | Tiled"]:
    """Block rows of the upper triangle, if they fit."""
    rows, _ = samples_of(pair)
    build = partial(settings.compile, order=order)
    count = BLOCK_ROWS
    found = tiled(pair, True, block_rows(rows, count), build)
    while found.peak(torch.float32.itemsize) > MUCH and count < rows:
        count *= 2
        found = tiled(pair, True, block_rows(rows, count), build)
    if settings.fits(found):
        yield found


def _tiles(
    settings: Settings, pair: TensorNetwork, mirrored: bool, order: Order | None
) -> Iterator["Program | Tiled"]:
    """More and more square tiles, up to the fewest that fit."""
    build = partial(settings.compile, order=order)
    rows, columns = samples_of(pair)
    count, fits = 1, False
    while not fits and count < max(rows, columns):
        count = min(2 * count, max(rows, columns))
        found = tiled(pair, mirrored, squares(rows, columns, count, mirrored), build)
        yield found
        fits = settings.fits(found)


def _form(
    settings: Settings, network: Expression, products: Products, seconds: float
) -> Program | None:
    """A program for explicit rows, if products by them take about as long and they are few."""
    operands = sum(map(prod, network.operands.values()))
    rows, size = products.rows, prod(products.rows.shape)
    if settings.limit is not None or size > max(SMALL, KEPT * operands):
        return None
    if settings.order not in ("auto", "parameter_space") or len(rows.operands) < 2:
        return None
    if len(network.shape) < 4 or seconds < QUICK or not worth_trying(network):
        return None
    build = partial(settings.compile, order=None)
    vectors, samples, *shape = rows.shape
    m, n, *rest = rows.result.axes
    turned = rows.with_(result=View((samples, vectors, *shape), (n, m, *rest)))
    form = _lean(settings, turned, _of_products(settings, turned, None, build(turned)))
    gram, later = (build(each).seconds for each in products.by_rows(network.shape[2]))
    without = FORMED * seconds + LATER * build(products.gradient).seconds
    return form if form.seconds + gram + LATER * later <= without else None


def _lean(settings: Settings, rows: TensorNetwork, whole: Program) -> Program:
    """A program for rows in pieces, each put into its place, where that takes hardly longer."""
    room = prod(rows.shape) * torch.float32.itemsize + BESIDE
    try:
        pieces = settings.compile(rows, None, memory_limit=room, routes=PRODUCTS)
    except TooLittleMemory:
        return whole
    return pieces if pieces.seconds <= IN_PIECES * whole.seconds else whole
