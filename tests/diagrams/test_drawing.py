"""How networks are drawn."""

import re
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import graphviz
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tnconv
from tests.strategies import ZOO, Case, assert_close, networks, operands_for
from tnconv.diagrams import (
    Axis,
    Pattern,
    Tensor,
    TensorNetwork,
    View,
    compose,
    conv,
    delta,
    drawing,
    kfac_expand,
    kfac_reduce,
    linear,
    mask,
    with_bias,
)
from tnconv.diagrams.drawing import FORMATS, dot, dot_steps, draw, draw_steps, mimebundle
from tnconv.diagrams.look import THEMES, Style
from tnconv.diagrams.notation import equation, form
from tnconv.diagrams.sketch import arrange, without_ones
from tnconv.simplify import simplify

CASE = Case((2, 4, 6, 5), (6, 2, 3, 2), stride=2, padding=1, groups=2)
ONES = Style(ones=True)
NET = conv((2, 4, 9), (6, 2, 3), stride=2, padding=1, groups=2)
MAGIC = {
    "svg": b"<?xml",
    "pdf": b"%PDF",
    "png": b"\x89PNG",
    "dot": b"graph",
    "tex": b"\\IfFileExists",
}

needs_dot = pytest.mark.skipif(shutil.which("dot") is None, reason="no dot program")


class Picture:
    """Nodes and wires, read back from the dot source."""

    def __init__(self, source):
        plain = re.sub(r"</?(SUB|FONT|BR/?)\b[^>]*>", "", source).replace("′", "'")
        plain = plain.replace("&lt;", "<").replace("&amp;", "&")
        self.nodes = {
            name: attributes for name, attributes in re.findall(r"^\t+(\w+) \[(.*)\]$", plain, re.M)
        }
        del self.nodes["node"], self.nodes["edge"]
        self.wires = [
            wire
            for wire in re.findall(r"^\t+(\w+) -- (\w+)(.*)$", plain, re.M)
            if "style=invis" not in wire[2]
        ]
        self.labels = [
            (quoted or bare or tagged).strip()
            for quoted, tagged, bare in re.findall(
                r'label=(?:"((?:[^"\\]|\\.)*)"|<(.*?)>(?=[ \]])|(\S+?)(?=[ \]]))', plain
            )
        ]

    def shaped(self, shape):
        return [name for name, attributes in self.nodes.items() if f"shape={shape}" in attributes]

    def degree(self, name):
        return sum((a == name) + (b == name) for a, b, _ in self.wires)


def ends(network):
    """How often each leg ends: at a pattern, at an axis of a tensor, or open."""
    views = [network.result, *(tensor.view for tensor in network.tensors)]
    forms = [axis.terms for view in views for axis in view.axes]
    forms += [pattern.terms for _, pattern in network.patterns]
    return {leg: sum(leg in dict(terms) for terms in forms) for leg in network.sizes}


def check_picture(network):
    picture = Picture(dot(network, ONES).source)
    count = ends(network)
    names = Counter(label for label in picture.labels if label in network.operands)
    assert names == Counter(tensor.name for tensor in network.tensors)
    assert len(picture.shaped("ellipse")) == len(list(network.patterns))
    for leg, size in network.sizes.items():
        assert f"{leg} {size}" in picture.labels
    dots = sorted(picture.degree(name) for name in picture.shaped("point"))
    assert dots == sorted(number for number in count.values() if number != 2)
    for at, node in enumerate(network.nodes):
        held = node.terms if isinstance(node, Pattern) else node.view.axes
        assert picture.degree(f"node{at}") == sum(axis != Axis(1) for axis in held)
    loose = [name for name in picture.shaped("plaintext") if "scale" not in name]
    assert len(loose) == sum(axis != Axis(1) for axis in network.result.axes)
    assert all(picture.degree(name) == 1 for name in loose)
    axes = [
        axis for view in (network.result, *(t.view for t in network.tensors)) for axis in view.axes
    ]
    odd = [axis for axis in axes if axis.plain(network.sizes) is None and axis != Axis(1)]
    ports = [f"{form(axis.terms, axis.offset).replace(' ', '')} {axis.size}" for axis in odd]
    assert not Counter(ports) - Counter(picture.labels)
    assert len(picture.wires) == len(odd) + sum(1 if n == 2 else n for n in count.values())


@pytest.mark.parametrize("name", sorted(ZOO))
def test_zoo(name):
    check_picture(ZOO[name](CASE))


@pytest.mark.parametrize("name", ["conv", "unfold", "kfac_expand", "kfac_reduce", "linear"])
@pytest.mark.parametrize("derivative", ["vjp", "jvp", "jacobian"])
def test_derivatives_of_the_zoo(name, derivative):
    for term in getattr(ZOO[name](CASE), derivative)("x").terms:
        check_picture(term)


@given(network=networks(selections=True))
def test_any_network(network):
    check_picture(network)


@needs_dot
@settings(max_examples=10)
@given(network=networks(selections=True))
def test_graphviz_reads_any_network(network):
    assert dot(network).pipe(format="plain").startswith(b"graph")


def test_hyper_edges_of_known_networks():
    def dots(network):
        return len(Picture(dot(network, ONES).source).shaped("point"))

    assert dots(linear((8, 3), (4, 3))) == 0
    assert dots(NET) == 1  # g, of x, weight and the result
    assert dots(kfac_expand((8, 4, 9), 3)) == 1  # g
    assert dots(kfac_reduce((8, 4, 9), 3)) == 3  # g, and both o end
    assert dots(NET.vjp("weight", per_sample=True)) == 2  # g and n


def test_wires_join_what_holds_their_leg():
    joined = {(frozenset((a, b)), label) for a, b, label in Picture(dot(NET).source).wires}
    x, pattern, weight = (f"node{at}" for at in range(3))
    (g,) = Picture(dot(NET).source).shaped("point")
    loose = {"n": ("open0", x), "g": ("open1", g), "d": ("open2", weight), "o1": ("open3", pattern)}
    inner = {"i1 9": (x, pattern), "k1 3": (pattern, weight), "c 2": (x, weight)}
    expected = {frozenset(pair): "" for pair in (*loose.values(), (x, g), (g, weight))}
    expected |= {frozenset(pair): label for label, pair in inner.items()}
    assert {pair for pair, _ in joined} == expected.keys()
    assert all(expected[pair] in attributes for pair, attributes in joined)


def test_legs_that_nothing_holds():
    sizes = {"n": 2, "c": 3}
    picture = Picture(dot(TensorNetwork((), View.of(sizes, "n"), sizes)).source)
    assert sorted(map(picture.degree, picture.shaped("point"))) == [0, 1]
    assert "c 3" in picture.labels


def test_patterns_say_what_they_are():
    def labels(*patterns):
        sizes = {leg: 9 for pattern in patterns for leg in pattern.legs}
        return Picture(dot(TensorNetwork(patterns, View((), ()), sizes)).source).labels

    assert "Πs=2 d=1 p=1" in Picture(dot(NET).source).labels
    assert "δ" in labels(delta("i", "j"))
    assert "1 ≤ 2·o + k < 9" in labels(mask({"o": 2, "k": 1}, -1, 8))
    assert "i ∈ 0:6:2" in labels(Pattern((("i", 1),), range(0, 6, 2)))
    assert "Π2·o + k - 3·i = 4" in labels(Pattern((("o", 2), ("k", 1), ("i", -3)), range(4, 5)))
    assert "Πa + 2·b - c = 1" in labels(Pattern((("a", 1), ("b", 2), ("c", -1)), range(1, 2)))


def test_odd_names_are_escaped():
    sizes = {"a": 3, "b:<&": 3}
    nodes = (Tensor('<"w" & v>', View.of(sizes, "a", "b:<&")),)
    source = dot(TensorNetwork(nodes, View((), ()), sizes)).source
    assert "&lt;&quot;w&quot; &amp; v&gt;" in source
    assert "b:&lt;&amp;" in source


NAMES = st.sampled_from(["", "é", "self", "network", "\n", "a\0", "\ud800", "\\N", "<b>", " "])


@settings(max_examples=10)
@given(names=st.lists(NAMES | st.text(max_size=4), min_size=3, max_size=3, unique=True))
def test_any_name_is_drawn(names):
    """Names of operands, of legs and of steps."""
    operand, *legs = names
    sizes = dict.fromkeys(legs, 3)
    network = TensorNetwork((Tensor(operand, View.of(sizes, *legs)),), View((), ()), sizes)
    for picture in (dot(network), dot_steps([(operand, network)])):
        assert drawing._render(picture, "svg")[:5] == MAGIC["svg"]
    assert network.reference(**{operand: torch.ones(3, 3)}) == 9


def test_names_are_shown():
    network = TensorNetwork((Tensor("", View((), ())),), View((), ()), {})
    assert "label=<&#x27;&#x27;>" in dot(network).source
    assert "label=<a\\x00>" in dot(network.rename_operands({"": "a\0"})).source


def test_sum_has_all_terms_in_a_row():
    source = dot(with_bias(NET)).source
    assert source.count("subgraph") == 2
    picture = Picture(source)
    assert "+" in picture.labels
    assert {"x", "weight", "bias"} <= set(picture.labels)


def test_steps_are_titled_and_in_order(tmp_path):
    steps = [("before: 1", NET), ("after", NET), ("last", NET)]
    labels = Picture(dot_steps(steps).source).labels
    assert Counter(labels)["→"] == 2
    assert [label for label in labels if label in dict(steps)] == [title for title, _ in steps]
    assert draw_steps(steps, tmp_path / "steps.dot").read_text().count("subgraph") == 3


def test_source_does_not_depend_on_the_run():
    assert dot(with_bias(NET)).source == dot(with_bias(NET)).source


@needs_dot
@pytest.mark.parametrize("format", FORMATS)
def test_all_formats(tmp_path, format):
    path = NET.draw(tmp_path / f"conv.{format}")
    assert path == tmp_path / f"conv.{format}"
    assert path.read_bytes().startswith(MAGIC[format])
    assert with_bias(NET).draw(str(path)) == path


@pytest.fixture
def no_dot(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("PATH", str(tmp_path_factory.mktemp("empty")))
    with pytest.raises(graphviz.ExecutableNotFound):
        graphviz.Graph().pipe(format="svg")


@pytest.fixture
def no_renderer(no_dot, monkeypatch):
    monkeypatch.setitem(sys.modules, "pygraphviz", None)


@pytest.mark.parametrize("format", FORMATS)
def test_without_dot_pygraphviz_draws(no_dot, tmp_path, format):
    pytest.importorskip("pygraphviz")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = draw(kfac_reduce((8, 4, 9), 3), tmp_path / f"factor.{format}")
    assert path.suffix == f".{format}"
    assert path.read_bytes().startswith(MAGIC[format])
    if format == "svg":
        assert "Π" in path.read_text() and "</svg>" in path.read_text()


def test_without_a_renderer_the_source_is_written(no_renderer, tmp_path):
    with pytest.warns(UserWarning, match=r"install Graphviz or pip install 'tnconv\[draw\]'") as w:
        path = draw(NET, tmp_path / "conv.png")
    assert len(w) == 1 and "\n" not in str(w[0].message)
    assert w[0].filename == __file__
    assert path == tmp_path / "conv.dot"
    assert path.read_text() == dot(NET).source
    assert [p.name for p in tmp_path.iterdir()] == ["conv.dot"]


def test_without_a_renderer_dot_needs_no_warning(no_renderer, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert draw(NET, tmp_path / "conv.dot").exists()


def test_where_pygraphviz_lacks_a_format_the_source_is_written(no_dot, monkeypatch, tmp_path):
    pygraphviz = pytest.importorskip("pygraphviz")

    def fail(*args, **kwargs):
        raise ValueError("no such format")

    monkeypatch.setattr(pygraphviz.AGraph, "draw", fail)
    with pytest.warns(UserWarning, match="wrote conv.dot instead"):
        assert draw(NET, tmp_path / "conv.pdf").suffix == ".dot"


@pytest.mark.parametrize("name", ["conv.jpg", "conv", "conv.", ".svg"])
def test_bad_suffix(tmp_path, name, monkeypatch):
    monkeypatch.setattr("tnconv.diagrams.drawing.dot", lambda *given: pytest.fail("worked"))
    with pytest.raises(ValueError, match=re.escape(f"{name}'; expected a suffix among .svg, .pdf")):
        draw(NET, tmp_path / name)
    with pytest.raises(ValueError, match="expected a suffix"):
        draw_steps([("a", NET)], Path(tmp_path / name))
    assert not list(tmp_path.iterdir())


def test_notebook():
    bundle = mimebundle(NET)
    assert bundle["text/plain"] == equation(NET)
    if "image/svg+xml" in bundle:
        assert "</svg>" in bundle["image/svg+xml"]
    assert NET._repr_mimebundle_() == bundle
    assert with_bias(NET)._repr_mimebundle_()["text/plain"] == equation(with_bias(NET))


def test_notebook_without_a_renderer(no_renderer):
    assert mimebundle(NET) == {"text/plain": equation(NET)}


@given(network=networks(selections=True))
def test_legs_of_size_one_are_hidden(network):
    shown = without_ones(network)
    assert 1 not in shown.sizes.values() and shown.shape == network.shape
    assert dot(network).source == dot(shown, ONES).source
    if 0 not in network.sizes.values():
        operands = operands_for(network)
        assert_close(shown.reference(**operands), network.reference(**operands))


def test_composed_networks_run_from_input_to_output():
    layers = conv((2, 3, 12), (4, 3, 3)).rename_operands({"weight": "weight1"})
    for number, out in ((2, 5), (3, 6)):
        layer = conv(layers.shape, (out, layers.shape[1], 3))
        names = {"weight": f"weight{number}"}
        (layers,) = compose(layer.rename_operands(names), "x", layers).terms
    network = without_ones(layers)
    order, left = arrange(network)
    names = [n.name for n in (network.nodes[at] for at in order) if isinstance(n, Tensor)]
    assert names == ["x", "weight1", "weight2", "weight3"] and left == {order[0]}


def test_halves_are_mirrored():
    network = without_ones(kfac_reduce((8, 4, 9), 3))
    order, left = arrange(network)
    names = [getattr(network.nodes[at], "name", "Π") for at in order]
    assert names == ["Π", "x", "x", "Π"] and left == {0, 1}


def test_parameters_are_told_by_signs():
    pattern = Pattern((("a", 2), ("b", 2), ("c", -1)), range(1, 2))
    network = TensorNetwork((pattern,), View((), ()), dict.fromkeys("abc", 5))
    assert "Πs=2 d=2 p=1" in Picture(dot(network).source).labels


def test_options():
    plain = Picture(dot(NET, Style(sizes=False)).source)
    assert "c" in plain.labels and "c 2" not in plain.labels
    assert "2" in Picture(dot(NET, Style(labels=False)).source).labels
    source = dot(NET, Style(direction="TB", font="Times", theme="dark")).source
    assert "rankdir=TB" in source and "fontname=Times" in source
    assert THEMES["dark"].page in source
    mark = THEMES["light"].mark
    marked = [line for line in dot(NET, Style(highlight=["x", "c"])).source.splitlines()]
    assert sum(mark in line for line in marked) == 2 and mark not in dot(NET).source


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"direction": "up"}, "direction is 'up'; expected one of"),
        ({"theme": "blue"}, "theme is 'blue'; expected one of"),
        ({"dpi": 0}, "dpi is 0; expected at least 1"),
        ({"highlight": "x"}, "highlight is 'x'; expected a list of names"),
    ],
)
def test_options_are_refused_before_work(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        draw(NET, tmp_path / "conv.svg", **options)
    assert not list(tmp_path.iterdir())


def test_changes_between_steps_are_highlighted_in_a_grid():
    steps = simplify(kfac_reduce((8, 4, 16), 4, stride=4)).trace
    pictures = [("as given", steps[0].before), *((step.rule, step.after) for step in steps)]
    source = dot_steps(pictures, columns=2).source
    assert THEMES["light"].mark in source
    assert source.index('label="as given"') > source.index(f"label={steps[-1].rule}")


def test_pictures_without_a_path_are_shown_and_saved(tmp_path):
    picture = NET.draw(theme="dark")
    assert repr(picture) == f"Picture of {equation(NET)}"
    assert picture._repr_mimebundle_()["text/plain"] == equation(NET)
    assert picture.save(tmp_path / "conv.dot").read_text() == dot(NET, Style(theme="dark")).source


def test_resolution_is_that_of_the_png(tmp_path):
    pytest.importorskip("pygraphviz")
    sizes = []
    for dpi in (72, 144):
        data = NET.draw(tmp_path / "conv.png", dpi=dpi).read_bytes()
        sizes.append(int.from_bytes(data[16:20], "big"))
    assert sizes[1] == pytest.approx(2 * sizes[0], abs=4)


def test_latex(tmp_path):
    if drawing._render(dot(NET), "plain") is None:
        pytest.skip("needs Graphviz or pygraphviz")
    network = NET.rename_operands({"x": "x_1%"}).scaled(2)
    text = network.draw(tmp_path / "conv.tex").read_text()
    assert text.count(r"\node[tensor]") == 2 and text.count(r"\node[pattern]") == 1
    assert r"{x\_1\%}" in text and r"$\times$ 2" in text and r"i\textsubscript{1}" in text


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs LaTeX: texlive-pictures")
def test_latex_compiles(tmp_path):
    """Every diagram of the zoo, programs, and letters of every kind, in one plain document."""
    if drawing._render(dot(NET), "plain") is None:
        pytest.skip("needs Graphviz or pygraphviz")
    odd = ['\\~^<>|"$&#_{}%', "λΓΠςoχ", "éçňÅ", "层\n", "a\0b`'"]
    named = [NET.rename_operands({"x": name}).scaled(2) for name in odd]
    legs = NET.rename(dict(zip(NET.sizes, odd, strict=False)))
    drawn = [*(ZOO[name](CASE) for name in sorted(ZOO)[::3]), *named, legs]
    documents = [net.draw(tmp_path / f"{at}.tex").read_text() for at, net in enumerate(drawn)]
    documents.append(tnconv.compile(NET).draw(tmp_path / "program.tex").read_text())
    head, _, _ = documents[0].partition(r"\begin{tikzpicture}")
    parts = [re.search(r"\\begin{tikzpicture}.*\\end{tikzpicture}", d, re.S)[0] for d in documents]
    (tmp_path / "all.tex").write_text("\n\\clearpage\n".join([head, *parts, r"\end{document}"]))
    for name in ("0", "all"):
        command = ["pdflatex", "-interaction=batchmode", "-halt-on-error", f"{name}.tex"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True)
        assert done.returncode == 0, (tmp_path / f"{name}.log").read_text()[-2000:]
        assert (tmp_path / f"{name}.pdf").read_bytes().startswith(MAGIC["pdf"])
    log = (tmp_path / "all.log").read_text()
    assert "Missing character" not in log and "Undefined" not in log
