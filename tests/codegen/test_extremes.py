"""Extremes: sums beyond half precision's range, entries that are not finite, damaged files."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import tnconv.functional as T
from tests.strategies import ZOO, Case, geometries, operands_for
from tnconv import compile, diagrams
from tnconv.codegen.prices import calibration, store
from tnconv.codegen.programs import tuning

few = settings(max_examples=settings.default.max_examples // 4 + 1)
MEANS: dict[str, Callable[[Tensor], Tensor]] = {
    "kfac_expand": lambda x: T.kfac_expand(x, 3, padding=1),
    "kfac_expand, stride": lambda x: T.kfac_expand(x, 2, stride=2),
    "kfac_reduce": lambda x: T.kfac_reduce(x, 3, padding=1),
    "mean_patches": lambda x: T.mean_patches(x, 3, padding=1),
    "avg_pool": lambda x: T.avg_pool(x, 16),
    "grad_expand": lambda x: T.grad_expand(x),
    "grad_reduce": lambda x: T.grad_reduce(x),
}


@few
@given(
    name=st.sampled_from(sorted(MEANS)),
    samples=st.sampled_from((1, 3, 40)),
    channels=st.sampled_from((1, 4)),
    size=st.sampled_from((16, 47, 128)),
    level=st.sampled_from((0.1, 1.0, 6.0)),
)
def test_half_precision_is_rounded_once(name, samples, channels, size, level) -> None:
    """What float16 can hold comes out right, whatever its sums were before they were scaled."""
    generator = torch.Generator().manual_seed(0)
    x = (level + torch.rand(samples, channels, size, size, generator=generator)).half()
    try:
        expected = MEANS[name](x.double())
    except ValueError:
        return
    found = MEANS[name](x)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found, expected.half(), rtol=2e-3, atol=1e-4)


def test_the_examples_of_half_precision() -> None:
    x = torch.ones(32, 3, 64, 64).half()
    assert T.kfac_expand(x, 3, padding=1).max() == 1
    assert T.kfac_expand(x, 3, padding=1, scale=1 / 32).max() == 4096
    x = torch.ones(1, 1, 300, 300).half()
    assert T.avg_pool(x, 300) == T.mean_patches(x, 1) == T.kfac_reduce(x, 1) == 1


def test_half_precision_under_transforms() -> None:
    """Gradients, vmap and joint programs take the wide way as well."""
    network = diagrams.kfac_reduce((2, 1, 40, 40), 1)
    both = compile([network, diagrams.mean_patches((2, 1, 40, 40), 1)])
    x = torch.full((3, 2, 1, 40, 40), 8.0).half()
    (dx,) = torch.autograd.grad(compile(network)(x=(y := x[0].requires_grad_())).sum(), y)
    torch.testing.assert_close(dx, torch.full_like(dx, 2 * 8 / 3200), rtol=2e-3, atol=0)
    found = torch.func.vmap(lambda each: both(x=each))(x.detach())
    assert [each.dtype for each in found] == [torch.float16] * 2
    assert (found[0] == 64).all() and (found[1] == 8).all()
    with torch.autocast("cpu", dtype=torch.float16):
        assert compile(network)(x=x[0].detach().float()) == 64


def unread(case: Case) -> Tensor:
    """Where no window of a convolution looks."""
    image = torch.zeros(1, 1, *case.input_shape[2:], requires_grad=True)
    conv = getattr(F, f"conv{case.dims}d")
    padded = F.pad(image, [side for pair in reversed(case.pads) for side in pair])
    kernel = torch.ones(1, 1, *case.kernel_size)
    y = conv(padded, kernel, stride=case.strides, dilation=case.dilations)
    return torch.autograd.grad(y.sum(), image)[0][0, 0] == 0


OF_INPUTS = ("conv", "unfold", "kfac_expand", "kfac_reduce", "weight_vjp", "per_sample")


@given(case=geometries(max_dims=2), name=st.sampled_from(OF_INPUTS))
def test_what_no_patch_reads_does_not_matter(case, name) -> None:
    where = unread(case)
    network = ZOO[name](case)
    operands = operands_for(network)
    expected = compile(network)(**operands)
    operands["x"] = operands["x"].masked_fill(where, float("nan"))
    torch.testing.assert_close(compile(network)(**operands), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2])
def test_nothing_is_read_at_all(size: int) -> None:
    x, weight = torch.full((2, 4, size), float("nan")).requires_grad_(), torch.randn(6, 4, 1)
    y = T.conv(x, weight, padding=3, stride=2 * size, dilation=2)
    if not unread(Case((2, 4, size), (6, 4, 1), 2 * size, 3, 2)).all():
        return
    assert (y == 0).all() and y.requires_grad
    assert (torch.autograd.grad(y.sum(), x)[0] == 0).all()
    assert (T.unfold(x, 1, 2, 3, 2 * size) == 0).all()


DAMAGES: dict[str, Callable[[str], str]] = {
    "deep": lambda text: "[" * 100_000,
    "deep objects": lambda text: '{"a":' * 100_000,
    "infinite": lambda text: _with_number(text, "Infinity"),
    "not a number": lambda text: _with_number(text, "NaN"),
    "too small": lambda text: _with_number(text, "5e-324"),
    "too large": lambda text: _with_number(text, "1e308"),
    "overflow": lambda text: _with_number(text, "1e999"),
    "long number": lambda text: _with_number(text, "9" * 10_000),
    "cut": lambda text: text[: len(text) // 2],
    "nothing": lambda text: "",
}


def _with_number(text: str, number: str) -> str:
    entry = json.loads(text)
    names = list(entry["value"])
    entry["value"][names[0]] = "HERE"
    return json.dumps(entry).replace('"HERE"', number)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(store.VARIABLE, str(tmp_path))
    store._warn.cache_clear()
    return tmp_path


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", [tuning.KIND, calibration.KIND])
def test_damaged_files(folder: Path, damage: str, kind: str) -> None:
    """A warning, and it counts as missing, for every kind of file alike."""
    key: dict[str, store.Json] = {"device": "some"}
    store.save(kind, key, {"a": 1.5, "b": 2.5})
    (file,) = (folder / kind).iterdir()
    file.write_text(DAMAGES[damage](file.read_text()))
    with pytest.warns(RuntimeWarning, match="is ignored"):
        assert store.load(kind, key) is None


@settings(few, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_files_of_any_text(folder: Path, data: st.DataObject) -> None:
    """Never an error: what is no entry is missing, and numbers are such as can be measured."""
    key: dict[str, store.Json] = {"device": "some"}
    store.save(tuning.KIND, key, {"a": 1.5, "b": 2.5})
    (file,) = (folder / tuning.KIND).iterdir()
    text = file.read_text()
    start = data.draw(st.integers(0, len(text)))
    stop = data.draw(st.integers(start, min(len(text), start + 8)))
    piece = data.draw(
        st.text(max_size=6) | st.from_regex(r"-?\d{1,3}(e-?\d{1,4})?", fullmatch=True)
    )
    file.write_text(text[:start] + piece + text[stop:], encoding="utf-8", errors="replace")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = store.load(tuning.KIND, key)
    for number in value.values() if isinstance(value, dict) else ():
        if isinstance(number, float) and number:
            assert store.SMALLEST < abs(number) < 1 / store.SMALLEST


def test_a_network_compiles_beside_a_damaged_file(folder: Path) -> None:
    network = diagrams.kfac_reduce((2, 3, 12, 12), 3)
    source = compile(network, tune=True).source
    (file,) = (folder / tuning.KIND).iterdir()
    file.write_text("[" * 100_000)
    with pytest.warns(RuntimeWarning, match="is ignored: RecursionError"):
        assert compile(network, tune=True).source
    assert source


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_limit_is_in_bytes_of_the_dtype(dtype: torch.dtype) -> None:
    """Whatever is chosen stays below it, as predicted in that dtype, or is refused."""
    network = diagrams.kfac_expand((4, 3, 12, 12), 3, padding=1)
    most = compile(network).peak_memory(dtype)
    chosen = set()
    for limit in (most, 3 * most // 4, most // 2, most // 3):
        try:
            program = compile(network, memory_limit=limit, dtype=dtype)
        except ValueError as error:
            assert "memory_limit" in str(error)
            continue
        assert program.peak_memory(dtype) <= limit
        chosen.add(program.source)
    assert len(chosen) > 1
