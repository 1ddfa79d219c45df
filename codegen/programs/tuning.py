"""Tuning: the best few programs of a network are measured, and the winner is remembered."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, product

import torch

from tnconv.codegen.lowering.plans import Plan
from tnconv.codegen.prices import store, timing
from tnconv.codegen.prices.store import Json
from tnconv.codegen.programs.names import Names
from tnconv.codegen.programs.program import Program
from tnconv.diagrams.expression import Expression
from tnconv.diagrams.network import TensorNetwork
from tnconv.simplify import simplify

KIND = "tuning"
MOST_MEASURED = 6  # programs (0023)
MOST_COMBINED = 64  # combinations of the plans of several terms that are considered (0023)
PLAUSIBLE = 4.0  # predicted time relative to the best above which a program is not measured (0023)
BUDGET = 0.3  # seconds for measuring all programs of a network (0023)
FAILED = 1e9  # seconds that JSON can hold, where a program could not run
FASTER = 0.97  # share of the planner's time below which another program replaces its choice (0023)


def tuned(
    program: Program,
    device: torch.device,
    dtype: torch.dtype,
    options: Mapping[str, Json],
    limit: int | None = None,
) -> Program:
    """The fastest of the best few programs as measured, now or in an earlier process.

    Remembered times are used only if there is one for each of these programs. Another version of
    the compiler, or other options, can lead to other programs, which are then measured.

    Args:
        program: The planner's program.
        device: Where it is measured.
        dtype: The dtype of the operands.
        options: The options of the search, as part of the key on disk.
        limit: The bytes that a call may hold.
    """
    found = {_digest(way): way for way in candidates(program, limit, dtype.itemsize)}
    if len(found) == 1:
        return program
    key: dict[str, Json] = {
        **store.circumstances(device),
        "dtype": str(dtype),
        "networks": [_described(net) for net in program.networks],
        "options": dict(options),
    }
    seconds = _remembered(key, list(found))
    if seconds is None:
        seconds = timing.aside(lambda: _measured(found, device, dtype))
        store.save(KIND, key, {name: min(taken, FAILED) for name, taken in seconds.items()})
    return found[_fastest({name: seconds[name] for name in found}, next(iter(found)))]


def candidates(program: Program, limit: int | None = None, item: int = 4) -> list[Program]:
    """The program, then others with different code, the fastest by prediction first.

    Of plans by the same routes only the best is measured, so that the few candidates differ in
    kind.
    """
    lists = [_distinct(plans) for plans in program.terms]
    ways = [program, *(program.taking(way) for way in islice(product(*lists), MOST_COMBINED))]
    fitting = [way for way in ways if limit is None or _held(way, item) <= limit]
    bound = PLAUSIBLE * min((way.schedule.seconds for way in fitting), default=0.0)
    others = sorted(
        (way for way in fitting if way.schedule.seconds <= bound),
        key=lambda way: way.schedule.seconds,
    )
    different: dict[str, Program] = {}
    for way in (program, *others):
        different.setdefault(_digest(way), way)
    return list(different.values())[:MOST_MEASURED]


def _held(way: Program, item: int) -> int:
    return way.schedule.held(item, way.spare_memory)


def _distinct(plans: Sequence[Plan]) -> list[Plan]:
    """The best plan by each set of routes; torch's own kernel counts as a set of its own."""
    best: dict[object, Plan] = {}
    for plan in plans:
        best.setdefault((plan.is_torchs, frozenset(plan.routes)), plan)
    return list(best.values())


def _digest(program: Program) -> str:
    """A hash of a program's calls, without their comments."""
    schedule = program.schedule
    names = Names.of([f"operand_{at}" for at in range(len(program.operands))], schedule.steps)
    codes = [f"{names.text(step.value)} = {names.call(step.value)}" for step in schedule.steps]
    text = "\n".join([*codes, *map(names.text, schedule.outputs)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _described(network: Expression) -> Json:
    """Text that is the same for networks that are equal up to the names of legs, and no others."""
    return [
        f"{t.nodes} {t.result} {sorted(t.sizes.items())} {t.scale}" for t in _canonical(network)
    ]


def _canonical(network: Expression) -> Iterator[TensorNetwork]:
    for term in network.terms:
        form = simplify(term).normal
        assert isinstance(form, TensorNetwork)
        yield form.canonical


def _remembered(key: Mapping[str, Json], names: Sequence[str]) -> dict[str, float] | None:
    """Seconds of each of the programs, if all are known."""
    value = store.load(KIND, key)
    if value is None:
        return None
    if not isinstance(value, dict) or not all(
        isinstance(taken, float) and taken > 0 for taken in value.values()
    ):
        store.ignored(KIND, key)
        return None
    seconds = {name: taken for name, taken in value.items() if isinstance(taken, float)}
    return seconds if seconds.keys() >= set(names) else None


def _measured(
    programs: Mapping[str, Program], device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Seconds of each program, the planner's first; what replaces that one has won two contests.

    Each contest takes samples in turns. Of several threads another process disturbs some programs
    more than others, so that the winner of one contest may be the slower program without it.
    """
    planned, *_ = programs
    seconds = _contest(programs, device, dtype)
    while (first := _fastest(seconds, planned)) != planned:
        pair = {name: programs[name] for name in (planned, first)}
        if _fastest(_contest(pair, device, dtype), planned) == first:
            break
        seconds[first] = seconds[planned]
    return seconds


def _fastest(seconds: Mapping[str, float], planned: str) -> str:
    """The fastest program, but the planner's if no other is clearly faster."""
    fastest = min(seconds, key=lambda name: seconds[name])
    return fastest if seconds[fastest] < FASTER * seconds[planned] else planned


def _contest(
    programs: Mapping[str, Program], device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    program = next(iter(programs.values()))
    operands = [
        torch.randn(shape, device=device, dtype=dtype) for shape in program.operands.values()
    ]
    for at, name in enumerate(program.operands):
        if name in program.channels_last:
            operands[at] = operands[at].movedim(1, -1).contiguous().movedim(-1, 1)
    calls = [lambda run=program.run: run(*operands) for program in programs.values()]
    return dict(zip(programs, timing.seconds_of(calls, device, BUDGET), strict=True))
