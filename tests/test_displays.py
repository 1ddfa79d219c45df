"""What results say of themselves: names, quantities, shapes, and never what tensors hold."""

import copy
import importlib
import inspect
import pkgutil
import re
from dataclasses import fields, is_dataclass

import torch
from torch import nn

import tnconv
import tnconv.ntk
from tnconv import diagrams, quantities
from tnconv.displays import MANY, html_table, text_table
from tnconv.models import Result
from tnconv.ntk.drift import Moved
from tnconv.ntk.seeds import Seeds
from tnconv.ntk.sides import Side
from tnconv.simplify import simplify

X, Y = torch.linspace(0, 1, 15).reshape(5, 3).sin(), torch.tensor([0, 1, 0, 1, 1])
HEAVY = re.compile(r"torch\.Tensor|\bTensor\b|\bModule\b|ndarray")
MODEL = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
LOSS = nn.CrossEntropyLoss()


def test_results_are_tables():
    asked = [quantities.Variance(), quantities.SquaredNorms(), quantities.KFAC("reduce")]
    result = tnconv.compute(MODEL, LOSS, X, Y, asked)
    title, head, *rows = repr(result).splitlines()
    assert title == "Result of 5 samples: Variance, SquaredNorms, KFAC"
    assert head.split() == ["parameter", "Variance", "SquaredNorms", "KFAC"]
    assert rows[0].split()[:3] == ["0.weight", "(4,", "3)"] and len(rows) == 4
    assert "(1, 3, 3), (1, 4, 4)" in rows[0]
    page = result._repr_html_()
    assert page.count("<tr>") == 5 and "<td>(4, 3)</td>" in page
    assert repr(Result({}, 5)) == "Result of 5 samples: nothing"


def shown():
    ggn = tnconv.low_rank_ggn(MODEL, LOSS, X, Y)
    kernel = tnconv.ntk.empirical_ntk(MODEL, X)
    predicted = tnconv.ntk.ntk_predict(
        kernel, kernel, torch.rand(5, 2), torch.rand(5, 2), ridge=1.0
    )
    side = Side(MODEL, X, Seeds("all"), ("0.weight",))
    return [
        side,
        Moved(side, side),
        tnconv.compute(MODEL, LOSS, X, Y, [quantities.Variance()]),
        tnconv.GGNOperator(MODEL, LOSS, [(X, Y)]),
        tnconv.ntk.NTKOperator(MODEL, [X]),
        ggn,
        ggn.eigh(2),
        ggn.directional_derivatives(k=1),
        predicted,
        tnconv.compile(diagrams.linear((5, 3), (4, 3))),
        simplify(diagrams.linear((5, 3), (4, 3))),
    ]


def test_what_is_shown_is_short_and_has_no_contents():
    for value in shown():
        text = repr(value)
        assert len(text) < 400 and type(value).__name__ in text
        assert "tensor(" not in text and not re.search(r"0\.\d{4}", text)
        if hasattr(value, "shape"):
            assert str(tuple(value.shape)) in text
        assert "tensor(" not in getattr(value, "_repr_html_", lambda: "")()


def public_classes():
    """Every class that a package of the library exports."""
    packages = [tnconv]
    for found in pkgutil.walk_packages(tnconv.__path__, "tnconv."):
        if found.ispkg:
            packages.append(importlib.import_module(found.name))
    named = (
        getattr(package, name) for package in packages for name in getattr(package, "__all__", ())
    )
    return {each for each in named if inspect.isclass(each) and "tnconv" in each.__module__}


def shows_fields_whole(kind):
    """Whether ``dataclass`` or ``NamedTuple`` made its ``__repr__``, of all that it holds."""
    code = getattr(inspect.unwrap(kind.__repr__), "__code__", None)
    return code is not None and (
        "<string>" in code.co_filename or "collections" in code.co_filename
    )


def test_every_public_class_says_what_it_is():
    """None shows an address for its name, nor whole what holds tensors or models."""
    classes = public_classes()
    assert len(classes) > 100
    for kind in classes:
        assert inspect.isabstract(kind) or kind.__repr__ is not object.__repr__, kind
        if shows_fields_whole(kind):
            holds = fields(kind) if is_dataclass(kind) else ()
            types = [str(each.type) for each in holds] or map(str, kind.__annotations__.values())
            assert not any(HEAVY.search(each) for each in types), kind


def test_numbers_are_shown_in_short():
    model, x = copy.deepcopy(MODEL).double(), X.double()
    before = {"0.weight": torch.zeros(4, 3, dtype=x.dtype)}
    drift = tnconv.ntk.jacobian_drift(model, x, before)
    title, head, *rows = repr(drift).splitlines()
    assert title == "Drift of a Jacobian" and head.split() == ["parameter", *vars(drift)][:3]
    assert [row.split()[0] for row in rows] == ["all", *drift.layers]
    assert rows[0].split()[1:] == [f"{drift.spectral:.4g}", f"{drift.frobenius:.4g}"]
    assert drift._repr_html_().count("<tr>") == len(rows) + 1
    stable = tnconv.ntk.stable_jacobian(model, x, torch.rand(5, 2).double(), before)
    assert f"constant {stable.constant:.4g}; verdict {stable.verdict}>" in repr(stable)


def test_operators_say_of_what_they_are():
    text = repr(tnconv.HessianOperator(MODEL, LOSS, [(X, Y)]))
    assert text == "<HessianOperator of shape (26, 26) of a Sequential, torch.float32, cpu>"


def test_long_tables_are_cut_and_say_so():
    rows = [("name", "shape"), *((f"p{at}", "<1>") for at in range(MANY + 3))]
    assert text_table(rows).splitlines()[-1] == "3 more"
    assert "<td>3 more</td>" in html_table("many", rows) and "&lt;1&gt;" in html_table("", rows)


def test_steps_of_simplification_are_a_figure():
    picture = simplify(diagrams.kfac_reduce((2, 3, 8, 8), 2, stride=2)).draw()
    assert picture.graph.source.count("subgraph") > 2 and "as given" in picture.text
