import json
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, repeat
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from tests.strategies import assert_close, operands_for, shipped
from tnconv import compile
from tnconv.codegen.prices import store, timing
from tnconv.codegen.programs import tuning
from tnconv.diagrams import Expression, TensorNetwork, conv, kfac_expand, with_bias

FACTOR = kfac_expand((4, 32, 16, 16), 3, padding=1)
LAYER = conv((4, 32, 16, 16), (6, 32, 3, 3), padding=1)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(store.VARIABLE, str(tmp_path))
    store._warn.cache_clear()
    return tmp_path


def no_measuring(*_: object) -> list[float]:
    raise AssertionError("measured again")


def times(monkeypatch: pytest.MonkeyPatch, fastest: int, again: bool = True) -> None:
    """Pretend that this one of the candidates is the fastest, ``again`` beside the first alone."""
    winners = chain([fastest], repeat(int(again)))

    def seconds_of(calls: Sequence[object], *_: object) -> list[float]:
        winner = next(winners)
        return [1.0 if at == winner else 2.0 for at in range(len(calls))]

    monkeypatch.setattr(timing, "seconds_of", seconds_of)


@settings(max_examples=8, suppress_health_check=list(HealthCheck))
@given(network=shipped(max_dims=2, empty=False))
def test_tuned_programs_give_the_value(network: TensorNetwork) -> None:
    program = compile(network, tune=True, dtype=torch.float64)
    operands = operands_for(network)
    assert_close(program(**operands), network.reference(**operands), 1e-10)


@pytest.mark.parametrize(
    "network", [FACTOR, with_bias(LAYER), [LAYER, LAYER.vjp("weight"), FACTOR]]
)
def test_every_candidate_gives_the_value(network: Expression | list[Expression]) -> None:
    program = compile(network)
    ways = tuning.candidates(program)
    assert 1 < len(ways) <= tuning.MOST_MEASURED
    assert ways[0].steps == program.steps
    assert len({tuning._digest(way) for way in ways}) == len(ways)
    operands = {n: torch.randn(s, dtype=torch.float64) for n, s in program.operands.items()}
    for way in ways:
        torch.testing.assert_close(way(**operands), program(**operands), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("fastest", [0, 1, 2])
def test_the_winner_is_remembered(monkeypatch: pytest.MonkeyPatch, fastest: int) -> None:
    times(monkeypatch, fastest)
    first = compile(FACTOR, tune=True)
    assert first.source == tuning.candidates(compile(FACTOR))[fastest].source
    monkeypatch.setattr(timing, "seconds_of", no_measuring)
    assert compile(FACTOR, tune=True).source == first.source
    with pytest.raises(AssertionError, match="measured again"):
        compile(FACTOR, tune=True, dtype=torch.float64)
    with pytest.raises(AssertionError, match="measured again"):
        compile(FACTOR, tune=True, memory_limit=10**9)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        with pytest.raises(AssertionError, match="measured again"):
            compile(FACTOR, tune=True)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("fastest", [0, 1, 2])
def test_a_winner_by_chance_is_not_taken(monkeypatch: pytest.MonkeyPatch, fastest: int) -> None:
    times(monkeypatch, fastest, again=False)
    planned = compile(FACTOR)
    assert compile(FACTOR, tune=True).source == planned.source
    monkeypatch.setattr(timing, "seconds_of", no_measuring)
    assert compile(FACTOR, tune=True).source == planned.source


@pytest.mark.parametrize("first", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("other", [torch.float16, torch.bfloat16, torch.float64])
def test_times_of_one_dtype_say_nothing_of_another(
    monkeypatch: pytest.MonkeyPatch, first: torch.dtype, other: torch.dtype
) -> None:
    """Also where their entries are of one size."""
    times(monkeypatch, 0)
    compile(FACTOR, tune=True, dtype=first)
    monkeypatch.setattr(timing, "seconds_of", no_measuring)
    compile(FACTOR, tune=True, dtype=first)
    if other != first:
        with pytest.raises(AssertionError, match="measured again"):
            compile(FACTOR, tune=True, dtype=other)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "\x00", '{"key": 1, "value": {}}', "null", "wrong value"]
)
def test_foreign_files_are_ignored_with_one_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    times(monkeypatch, 1)
    first = compile(FACTOR, tune=True)
    (file,) = (folder / tuning.KIND).iterdir()
    if text == "wrong value":
        text = json.dumps({**json.loads(file.read_text()), "value": {"a": "b"}})
    file.write_text(text)
    with pytest.warns(RuntimeWarning, match="is ignored") as caught:
        assert compile(FACTOR, tune=True).source == first.source
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compile(FACTOR, tune=True).source == first.source  # it was written again


def test_a_folder_that_cannot_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "file").write_text("")
    monkeypatch.setenv(store.VARIABLE, str(folder / "file"))
    with pytest.warns(RuntimeWarning) as caught:
        compile(FACTOR, tune=True)
    assert "is ignored" in str(caught[0].message)
    assert "cannot be written" in str(caught[1].message)
    assert len(caught) == 2


def test_programs_within_a_limit() -> None:
    free = compile(FACTOR)
    peaks = sorted(way.peak_memory() for way in tuning.candidates(free))
    for way in tuning.candidates(free, peaks[-1] - 1)[1:]:
        assert way.peak_memory() < peaks[-1]
    assert compile(FACTOR, tune=True, memory_limit=peaks[0]).peak_memory() <= peaks[0]


def test_what_fails_is_never_chosen() -> None:
    def fails() -> None:
        raise RuntimeError("not implemented for this dtype")

    seconds = timing.seconds_of([fails, lambda: None], CPU, 0.01)
    assert seconds[0] == float("inf") and seconds[1] < 1


def test_measuring_is_apart_from_transforms_and_modes() -> None:
    def seen() -> tuple[bool, bool, torch.Tensor]:
        return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.ones(2)

    with torch.autocast("cpu"), torch.device("meta"):
        grad, cast, array = timing.aside(seen)
    assert not grad and not cast and array.device == CPU


def test_threads_write_at_the_same_time(folder: Path) -> None:
    key: dict[str, store.Json] = {"a": 1}
    value: store.Json = list(range(2000))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: store.save("kind", key, value), range(64)))
        found = list(pool.map(lambda _: store.load("kind", key), range(64)))
    assert all(each == value for each in found)
    assert [path.suffix for path in (folder / "kind").iterdir()] == [".json"]


def test_where_files_are(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert store.directory() == folder
    monkeypatch.delenv(store.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "caches"))
    assert store.directory() == folder / "caches" / "tnconv"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert store.directory() == Path.home() / ".cache" / "tnconv"
