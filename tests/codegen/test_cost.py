import threading
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnconv import compile
from tnconv.codegen.lowering.layouts import innermost
from tnconv.codegen.lowering.matrices import BLOCKS
from tnconv.codegen.prices import cost
from tnconv.codegen.prices.accelerators import H100, precision
from tnconv.codegen.prices.fitting import visible
from tnconv.codegen.prices.kinds import KINDS, Kind, Probe, coefficient, every_coefficient
from tnconv.codegen.prices.movement import Calls, Copy
from tnconv.codegen.prices.products import Gram, Product
from tnconv.codegen.prices.shipped import BY_THREADS, on_threads, shipped
from tnconv.codegen.prices.tables import ACCELERATOR, X86, Table
from tnconv.diagrams import conv

NEW_PAGES = Table({}, replace(X86, fresh_from=2**25))  # whatever the benchmarks' settings say
DECISIONS = Path(__file__).parents[2] / "docs" / "decisions"
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def faults(kind: type[Kind]) -> list[str]:
    """What a kind of kernel lacks, each with its name."""
    name, found = kind.__name__, []
    if not (kind.__doc__ or "").startswith("``t = "):
        found.append(f"{name} has no formula: its docstring has to begin with ``t = ...``")
    if not (kind.coefficients() or kind.checks):
        found.append(f"{name} has no probe: neither a coefficient nor a check")
    if not kind.decisions:
        found.append(f"{name} has no decision")
    for number in kind.decisions:
        if not list(DECISIONS.glob(f"{number}-*.md")):
            found.append(f"{name} cites decision {number}, which is not in docs/decisions")
    for one in kind.coefficients():
        low, high = one.bounds
        if not low < one.shipped < high:
            found.append(f"{one.name} is {one.shipped}; expected a value within {one.bounds}")
        if not any(visible(table, one) for table in (NEW_PAGES, Table({}, ACCELERATOR))):
            found.append(f"the probe of {one.name} does not depend on it")
    return found


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.__name__)
def test_kinds_have_a_formula_probes_and_a_decision(kind: type[Kind]) -> None:
    assert not faults(kind)


def test_kinds_without_them_are_named() -> None:
    @dataclass(frozen=True)
    class Bare(Kind, registered=False):
        """Something."""

    assert [fault.split()[:3] for fault in faults(Bare)] == [["Bare", "has", "no"]] * 3

    @dataclass(frozen=True)
    class Unrelated(Kind, registered=False):
        """``t = work``."""

        decisions: ClassVar = ("9999",)
        work: float = coefficient(1e-9, "s/call", Probe(lambda random: random, lambda table: 1.0))

    messages = faults(Unrelated)
    assert "9999" in messages[0] and "expected a value within" in messages[1]
    assert "does not depend" in messages[2]


def test_a_kernel_brings_its_price_along(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kind that is defined anywhere is in tables and among the probes, and can use others."""
    monkeypatch.setattr("tnconv.codegen.prices.kinds.KINDS", {**KINDS})

    @dataclass(frozen=True)
    class Sorting(Kind):
        """``t = launch + n entry``: sort n entries."""

        calls: Calls
        entry: float = coefficient(
            1e-8,
            "s/entry",
            Probe(
                lambda random: random(10**5).sort,
                lambda table: table[Sorting].seconds(10**5),
            ),
        )

        def seconds(self, entries: int) -> float:
            return self.calls.launch + entries * self.entry

    assert "Sorting.entry" in [one.name for one in every_coefficient()]
    table = Table({"Sorting.entry": 2e-8, "Calls.launch": 1e-3})
    assert table[Sorting].seconds(1000) == 1e-3 + 1000 * 2e-8


PINNED: list[tuple[str, tuple[Any, ...], str]] = [
    ("matmul", (1, 768, 768, 768), "0x1.300e4614dbd8bp-7"),
    ("matmul", (8, 64, 784, 576), "0x1.6e08dbc193500p-8"),
    ("matmul", (1, 2048, 2048, 8, True), "0x1.d4d246c665675p-10"),
    ("matmul", (512, 4, 4, 512, False, True), "0x1.e0b88e92af8e9p-12"),
    ("matmul", (8, 1024, 64, 256, False, False, True), "0x1.2c56e96cc5327p-8"),
    ("matmul", (8, 64, 5329, 80), "0x1.1d05fe4b49409p-7"),
    ("gram", (2, 256, 784, 4), "0x1.ccf988a7c66aap-10"),
    ("copy", (100352, 28, 2, 28), "0x1.2342ec43af3fdp-14"),
    ("copy", (5000, 5000), "0x1.6603bd21055b6p-18"),
    ("copy", (9000, 3, 1, 3, 1, 12000), "0x1.3081a80b4c646p-15"),
    ("elementwise", (8, 16), "0x1.0ca673cb12885p-18"),
    ("reduction", (655360, 131072, 5), "0x1.0d0df60602d8bp-10"),
    ("reduction", (16810000, 32832, 513, 1, True), "0x1.7ecd2e4a198b2p-8"),
    ("reduction", (4000, 40, 100, 3), "0x1.db7d198bf2edap-18"),
    ("fold", (3612672, 401408), "0x1.da0b5febb429ep-9"),
    ("shifted", (903168, 107648, 9, 28, 2, 28), "0x1.b41539492671cp-10"),
]
"""Seconds by the shipped table, to the last bit: plans of all results were chosen by them."""
LAYERS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, int], tuple[str, ...]]] = {
    "dense": (
        (8, 64, 28, 28),
        (128, 64, 3, 3),
        {"padding": 1},
        ("0x1.fe1a1f6920126p-8", "0x1.2fa57c544e05ep-7", "0x1.fe1a1f6920126p-8"),
    ),
    "first": (
        (8, 3, 32, 32),
        (16, 3, 5, 5),
        {"stride": 2},
        ("0x1.6fb63ad98f478p-14", "0x1.8ccbfc352f6e6p-14", "0x1.1cc1ad9db6dd2p-12"),
    ),
    "apart": (
        (8, 32, 27, 27),
        (32, 32, 2, 2),
        {"stride": 3},
        ("0x1.2b97036db92e6p-13", "0x1.4524cb1e5d724p-13", "0x1.ad031e9a39b4cp-13"),
    ),
    "grouped": (
        (4, 48, 14, 14),
        (48, 6, 3, 3),
        {"groups": 8, "padding": 1},
        ("0x1.551797ad6f58cp-12", "0x1.57cf608fa97dbp-12", "0x1.ca2bdb48731a3p-12"),
    ),
    "depthwise": (
        (8, 96, 56, 56),
        (96, 1, 3, 3),
        {"groups": 96, "padding": 1},
        ("0x1.2f9dcef3c8ae1p-8", "0x1.14556e21d0cb1p-8", "0x1.2fe53a32d50a2p-8"),
    ),
    "large depthwise": (
        (8, 32, 28, 28),
        (32, 1, 7, 7),
        {"groups": 32, "padding": 3},
        ("0x1.e16a0664b9342p-12", "0x1.ec795a72dee30p-12", "0x1.e6131f4539009p-12"),
    ),
    "pointwise": (
        (8, 256, 14, 14),
        (64, 256, 1, 1),
        {},
        ("0x1.b5f311274cd6dp-11", "0x1.a45711bfbea13p-11", "0x1.fdace943bbca0p-11"),
    ),
    "one sample": (
        (1, 8, 20, 20),
        (8, 8, 3, 3),
        {"padding": 1},
        ("0x1.c635ef997c6cfp-16", "0x1.9424c595d80a3p-16", "0x1.c635ef997c6cfp-16"),
    ),
    "more taps than outputs": (
        (8, 16, 14, 14),
        (16, 16, 12, 12),
        {},
        ("0x1.2c2b4e1c08964p-13", "0x1.1935727d3d3a4p-13", "0x1.71d98bd0cab86p-13"),
    ),
}


@pytest.mark.parametrize(("name", "sizes", "seconds"), PINNED)
def test_shipped_prices_are_pinned(name: str, sizes: tuple[Any, ...], seconds: str) -> None:
    assert getattr(cost, name)(*sizes).seconds.hex() == seconds


@pytest.mark.parametrize("name", LAYERS)
def test_shipped_prices_of_native_kernels_are_pinned(name: str) -> None:
    """Forward, weight gradient and input gradient."""
    x, weight, options, seconds = LAYERS[name]
    layer = conv(x, weight, **options)
    for net, expected in zip((layer, layer.vjp("weight"), layer.vjp("x")), seconds, strict=True):
        program = compile(net, routes=("native",), simplify=False)
        assert program.schedule.seconds.hex() == expected


def test_the_table_is_the_one_in_use() -> None:
    gemm = cost.SHIPPED.value("Product.gemm")
    slow = cost.SHIPPED.changed({"Product.gemm": gemm / 10})
    assert slow != cost.SHIPPED and slow == Table({"Product.gemm": gemm / 10})
    usual = cost.matmul(1, 512, 512, 512).seconds
    with cost.using(slow):
        assert cost.in_use() is slow
        assert cost.matmul(1, 512, 512, 512).seconds > 5 * usual
        seen: list[Table] = []
        thread = threading.Thread(target=lambda: seen.append(cost.in_use()))
        thread.start()
        thread.join()
        assert seen == [cost.SHIPPED]
    assert cost.matmul(1, 512, 512, 512).seconds == usual


@pytest.mark.parametrize("columns", [1, 2, 8])
def test_products_of_few_columns_wait_for_memory(columns: int) -> None:
    """They read a matrix once, whatever the speed of their arithmetic."""
    fast = cost.SHIPPED.changed({"Product.gemm": cost.SHIPPED.value("Product.gemm") * 1e4})
    bandwidth = cost.SHIPPED.value("Calls.bandwidth")
    with cost.using(fast):
        read = cost.bytes_per_entry() * 4096 * 4096 / bandwidth
        assert read < cost.matmul(1, 4096, columns, 4096).seconds < 1.5 * read


@pytest.mark.parametrize("columns", [5329, 5330, 5331])
def test_products_pay_for_rows_that_are_no_whole_vectors(columns: int) -> None:
    """Measured on 64 to 80 channels: 6.5 to 10 ms, and 5.7 to 6 for 5328, 5332 and 5336."""
    odd, whole = (cost.matmul(8, 64, n, 80).seconds for n in (columns, 5332))
    assert odd > 1.1 * whole
    assert cost.matmul(8, 1, columns, 80).seconds < 1.01 * cost.matmul(8, 1, 5332, 80).seconds


def test_copies_pay_for_steps_that_conflict_in_caches() -> None:
    """Columns of 64 entries, 4096 bytes apart, take four times as long as others."""
    loops = [innermost((16, width, 64), (64 * width, 1, width)) for width in (1024, 1040)]
    assert loops == [(64, 1024, 1024, 64), (64, 1040, 1040, 1)]
    times = [cost.copy(2**20, *inner).seconds for inner in loops]
    assert times[0] > 2 * times[1]


def test_conflicts_are_counted_over_dimensions() -> None:
    """7 x 7 entries, all at multiples of 4096 bytes, are read before the next of a line is."""
    assert innermost((1024, 7, 7), (1, 7 * 1024, 1024)) == (49, 1024, 1024, 49)
    assert innermost((1024, 7, 7), (1, 8 * 1024, 1024)) == (7, 1024, 7, 49)


def test_input_gradients_of_one_small_sample_cost_about_what_forward_does() -> None:
    """Torch unfolds both. Measured on 64 channels, 3x3 on 14x14: 430 and 377 us."""
    layer = conv((1, 64, 14, 14), (64, 64, 3, 3), padding=1)
    forward, gradient = (
        compile(net, routes=("native",), simplify=False).schedule.seconds
        for net in (layer, layer.vjp("x"))
    )
    assert 0.5 * forward < gradient < 2 * forward


def test_shipped_tables_of_processors_start_from_one_thread() -> None:
    assert shipped(CPU, torch.float32, 1) == cost.SHIPPED
    assert not BY_THREADS[1]
    assert shipped(CPU, torch.float64, 1) == cost.SHIPPED, "float32 serves all dtypes"
    assert shipped(CPU, torch.float32, 3).threads == 3


@pytest.mark.parametrize("threads", BY_THREADS)
def test_shipped_coefficients_are_known_and_possible(threads: int) -> None:
    bounds = {one.name: one.bounds for one in every_coefficient()}
    for name, value in BY_THREADS[threads].items():
        least, most = bounds[name]
        assert least <= value <= most, name


names = st.sampled_from([one.name for one in every_coefficient()])


@given(name=names, few=st.integers(1, 8), many=st.integers(9, 64), threads=st.integers(1, 128))
def test_numbers_of_threads_are_interpolated(name: str, few: int, many: int, threads: int) -> None:
    """Along a power law; beyond what was measured, the nearest table is used as it is."""
    value = cost.SHIPPED.value(name)
    tables = {few: {name: value}, many: {name: value * many / few}}
    found = cost.SHIPPED.changed(on_threads(threads, tables)).value(name)
    assert found == pytest.approx(value * min(max(threads, few), many) / few)


@given(
    sizes=st.tuples(*(st.integers(16, 2048) for _ in range(3))),
    batch=st.integers(2, 64),
    threads=st.integers(2, 64),
)
def test_two_threads_divide_the_rows_of_a_single_product(
    sizes: tuple[int, int, int], batch: int, threads: int
) -> None:
    """Half of the rows determine the efficiency of a single product; of a batch, all of them."""
    machine, values = replace(X86, fresh_from=inf), {"Calls.bandwidth": inf}
    one, several = (Table(values, machine, count)[Product] for count in (1, threads))
    (m, n, k), alone = sizes, one.calls.launch + one.member
    half, whole = one.price(1, m, n, k).seconds, several.price(1, 2 * m, n, k).seconds
    assert whole - alone == pytest.approx(2 * (half - alone))
    assert several.price(batch, m, n, k).seconds == one.price(batch, m, n, k).seconds


@given(k=st.integers(256, 1024), blocks=st.sampled_from(BLOCKS))
def test_symmetric_products_go_by_block_columns(k: int, blocks: int) -> None:
    """Measured for 512 rows on two threads: four columns take 0.85 to 0.95 of the time of rows."""
    table, width = shipped(CPU, torch.float32, 2), 512 // blocks
    rest = range(512, 0, -width)
    product, gram = table[Product], table[Gram]
    rows = sum(product.price(1, width, left, k).seconds for left in rest)
    columns = sum(product.price(1, left, width, k).seconds for left in rest)
    assert columns < rows
    twice = sum(product.price(1, left, width, 2 * k).seconds for left in rest)
    copies = gram.price(1, 512, k, blocks).seconds - columns
    assert gram.price(1, 512, 2 * k, blocks).seconds == pytest.approx(twice + copies)


@pytest.mark.parametrize("name", H100)
def test_accelerators_have_every_coefficient(name: str) -> None:
    """Assumed, within physical bounds; new pages are nothing that they know."""
    bounds = {one.name: one.bounds for one in every_coefficient() if one.name != "Calls.fresh"}
    assert H100[name].keys() == bounds.keys()
    assert all(low <= H100[name][key] <= high for key, (low, high) in bounds.items())


def test_precisions_have_tables_of_their_own() -> None:
    assert [precision(d) for d in (torch.float64, torch.float32)] == ["float64", "float32"]
    assert precision(torch.bfloat16) == precision(torch.float16) == "half"
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert precision(torch.float32) == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)
    half, single = (shipped(GPU, dtype, 1) for dtype in (torch.float16, torch.float32))
    assert (half.machine.entry, single.machine.entry) == (2, 4)
    seconds = []
    for table in (half, single):
        with cost.using(table):
            seconds.append(cost.matmul(1, 4096, 4096, 4096).seconds)
    assert seconds[0] < seconds[1] / 4


def test_calls_and_kernels_of_accelerators_overlap() -> None:
    """A call takes the longer of its launch and its kernel; of a processor's it takes both."""
    for machine, overlap in ((ACCELERATOR, True), (X86, False)):
        table = Table({"Calls.launch": 1e-5, "Calls.bandwidth": 1e12}, machine)
        small, large = (table[Copy].price(n, n).seconds for n in (10, 10**8))
        assert small == pytest.approx(1e-5, rel=1e-2)
        moving = table[Copy].price(10**8, 10**8).bytes / 1e12
        assert large > moving if overlap else large > 1e-5 + moving
        assert (large < 1e-5 + moving + 10**8 * 1e-9) or not overlap
