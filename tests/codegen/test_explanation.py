"""What `explain` tells: diagram, rules, equation, order, kernels, costs, and what was rejected."""

import re

import pytest

from tnconv import Program, compile
from tnconv.codegen.lowering.strided import LIKE, ONE
from tnconv.diagrams import Expression, conv, gradient_norms, kfac_expand, kfac_reduce, with_bias

LAYER = conv((8, 16, 24, 24), (32, 16, 3, 3), stride=2, padding=1)
NETWORKS: dict[str, Expression | list[Expression]] = {
    "kfac_expand": kfac_expand((8, 16, 24, 24), 3, padding=1),
    "kfac_reduce": kfac_reduce((8, 16, 24, 24), 3, stride=2),
    "per sample": LAYER.vjp("weight", per_sample=True),
    "norms": gradient_norms(LAYER),
    "sum": with_bias(LAYER),
    "several": [LAYER, LAYER.vjp("weight")],
}


def section(text: str, title: str) -> list[str]:
    """The indented lines below a title, wherever it is."""
    rows: list[str] = []
    inside = False
    for line in text.splitlines():
        inside = line.startswith(title) or (inside and line.startswith("  "))
        rows += [line.strip()] * (inside and line.startswith("  "))
    return rows


@pytest.fixture(params=sorted(NETWORKS))
def program(request: pytest.FixtureRequest) -> Program:
    return compile(NETWORKS[request.param])  # type: ignore[arg-type, return-value]


def test_diagrams_operands_and_rules(program: Program) -> None:
    text = program.explain()
    equations = [line.strip() for net in program.networks for line in str(net).splitlines()]
    assert section(text, "network") == equations
    assert section(text, "operands") == [f"{n} {s}" for n, s in program.operands.items()]
    rules = section(text, "rules that fired")
    assert len(rules) == len(program.firings)
    for row, firing in zip(rules, program.firings, strict=True):
        assert row.startswith(f"{firing};") and row.endswith("flop")


def test_the_equation_of_each_plan(program: Program) -> None:
    rows = section(program.explain(), "plan, from the network ")
    chosen = [plans[0] for plans in program.terms]
    assert len(rows) == len(chosen)
    for row, plan in zip(rows, chosen, strict=True):
        # Legs of size one are gone from both forms; here g is the only one.
        assert ("(g " in row or "[g" in row) == (plan.form == "as given")


def test_steps_in_order_with_their_costs(program: Program) -> None:
    _, *rows, count, seconds = section(program.explain(), "steps, in order")
    assert len(rows) == len(program.steps)
    made = set(program.operands)
    for at, (row, step) in enumerate(zip(rows, program.steps, strict=True), 1):
        name, _, rest = row.partition(" ")
        of, _, _ = f" {rest.strip()}".partition(f" {step.kernel.kind} ")
        read = {*step.value.reads} - {LIKE, ONE}  # constants are made of nothing else
        assert name == f"t{at}" and bool(of.strip()) == bool(read)
        assert not read or set(of.replace(" ", "").split(",")) <= made
        costs = f"{step.kernel.flops:,}", f"{step.kernel.bytes:,}", step.comment
        assert str(step.shape) in row and all(cost in row for cost in costs)
        made.add(name)
    flops = sum(step.kernel.flops for step in program.steps)
    assert count.startswith(f"{len(rows)} step") and f"{flops:,} flop" in count
    assert seconds == f"predicted time {program.schedule.seconds * 1e6:,.0f} us"


def test_rejected_alternatives_with_their_costs(program: Program) -> None:
    rows = section(program.explain(), "alternatives to ")
    wanted = {
        (f"{plan.seconds * 1e6:,.0f}", f"{plan.peak:,}", plan.routes)
        for chosen, *others in program.terms
        for plan in others
        if (plan.routes, len(plan.steps)) != (chosen.routes, len(chosen.steps))
    }
    told = [re.fullmatch(r"([\d,]+) us +([\d,]+) B  [\w ]+: (.*?); .*?; (.*)", row) for row in rows]
    assert all(told)
    found = {(each[1], each[2], tuple(each[3].split(" + "))) for each in told if each}
    assert wanted <= {(us, peak, () if r == ("matrix products",) else r) for us, peak, r in found}
    assert len(set(rows)) == len(rows)


def test_why_the_native_kernel_stays() -> None:
    program = compile(LAYER.vjp("weight", per_sample=True))
    chosen, *others = program.terms[0]
    ratio = next(p.seconds for p in others if p.routes != chosen.routes) / chosen.seconds
    assert f"{ratio:.2f} times the time" in program.explain()
    stays = compile(conv((8, 3, 64, 64), (64, 3, 11, 11), stride=4, padding=2))
    assert stays.terms[0][0].is_torchs
    if any(plan.seconds < stays.terms[0][0].seconds for plan in stays.terms[0]):
        assert "times as fast as torch's own kernel" in stays.explain()


def test_chunks_and_their_parts() -> None:
    network = kfac_expand((8, 16, 24, 24), 3, padding=1)
    program = compile(network, memory_limit=500_000)
    (chunk,) = program.chunks
    text = program.explain()
    assert str(chunk) in text and "chunks over leg" in text
    for number, part in enumerate(chunk.parts, 1):
        times = chunk.calls_of(number - 1)
        assert f"part {number}, called {'once' if times == 1 else f'{times} times'}" in text
        assert str(part.network) in text
    assert f"predicted peak memory {program.peak_memory():,} B" in text
    assert program.source.rstrip().splitlines()[-1] in text
