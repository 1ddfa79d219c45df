import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import tnconv
from tnconv import functional
from tnconv.codegen import tiers
from tnconv.codegen.lowering import paths
from tnconv.codegen.lowering.contraction import contraction_path
from tnconv.codegen.prices import store
from tnconv.diagrams import conv

CHAIN = [(f"a{at}", f"a{at + 1}", f"b{at % 3}") for at in range(paths.ON_DISK_FROM)]
SIZES = {leg: 2 + len(leg) + int(leg[1:]) % 4 for legs in CHAIN for leg in legs}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(store.VARIABLE, str(tmp_path))
    store._warn.cache_clear()
    paths.searched.cache_clear()
    return tmp_path


def test_one_table_of_programs_counts() -> None:
    tnconv.cache_clear()
    assert tnconv.cache_info().currsize == 0
    weight = torch.randn(2, 3, 3)
    for batch in (1, 2, 3, 2, 1):
        functional.conv(torch.randn(batch, 3, 8), weight)
    info = tnconv.cache_info()
    assert (info.misses, info.hits, info.currsize) == (3, 2, 3)
    assert info.maxsize == tiers.MOST_PROGRAMS
    net = conv((4, 3, 8), (2, 3, 3))
    for _ in range(2):
        tnconv.contract(net, x=torch.randn(4, 3, 8), weight=weight)
    assert tnconv.cache_info().currsize == 4


def test_programs_of_the_table_in_threads_and_as_copies() -> None:
    tnconv.cache_clear()
    net = conv((4, 3, 8), (2, 3, 3))
    x, weight = torch.randn(4, 3, 8), torch.randn(2, 3, 3)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: tnconv.contract(net, x=x, weight=weight), range(32)))
    program = tnconv.compile(net, tune=True)
    copies = [pickle.loads(pickle.dumps(program)), copy.deepcopy(program)]
    expected = torch.nn.functional.conv1d(x, weight)
    for result in (*results, *(each(x=x, weight=weight) for each in copies)):
        torch.testing.assert_close(result, expected)


def test_paths_are_stored_and_do_not_depend_on_names_or_the_store(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = contraction_path(CHAIN, ("a0",), SIZES)
    assert len(list((folder / paths.KIND).iterdir())) == 1
    paths.searched.cache_clear()
    monkeypatch.setattr(paths, "_search", lambda *_: pytest.fail("searched again"))
    renamed = [tuple(f"z{leg}" for leg in legs) for legs in CHAIN]
    sizes = {f"z{leg}": size for leg, size in SIZES.items()}
    assert contraction_path(renamed, ("za0",), sizes) == first


@pytest.mark.parametrize("value", ["[]", "[[0, 0]]", "[[0, 99]]", '"path"', "[[0.5, 1]]"])
def test_paths_that_are_none_are_searched_for_again(folder: Path, value: str) -> None:
    first = contraction_path(CHAIN, ("a0",), SIZES)
    (file,) = (folder / paths.KIND).iterdir()
    text = file.read_text()
    file.write_text(text[: text.index('"value"')] + f'"value": {value}}}')
    paths.searched.cache_clear()
    with pytest.warns(RuntimeWarning, match="is ignored"):
        assert contraction_path(CHAIN, ("a0",), SIZES) == first


def test_short_searches_leave_no_files(folder: Path) -> None:
    contraction_path(CHAIN[:4], ("a0",), SIZES)
    assert not list(folder.iterdir())
