"""Identities of index patterns, each on random geometries, against the dense pattern."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor as Array

from tnconv.diagrams import Pattern, TensorNetwork, View, delta, exactly, index_pattern
from tnconv.simplify import NORMAL_RULES, VIEW_RULES, Rule, fixed_point
from tnconv.simplify.offered import padding, polyphase


@dataclass(frozen=True)
class Window:
    """``Π[k, o, i] = [i = s·o + d·k - p]`` for sizes K, O, I."""

    k: int
    o: int
    i: int
    s: int
    d: int
    p: int

    @property
    def sizes(self) -> dict[str, int]:
        return {"k": self.k, "o": self.o, "i": self.i}

    @property
    def pattern(self) -> Pattern:
        return index_pattern("k", "o", "i", self.s, self.d, self.p)

    @property
    def dense(self) -> Array:
        """The pattern by its definition, with axes k, o, i."""
        array = torch.zeros(self.k, self.o, self.i, dtype=torch.float64)
        for k in range(self.k):
            for o in range(self.o):
                if 0 <= (at := self.s * o + self.d * k - self.p) < self.i:
                    array[k, o, at] = 1
        return array

    def network(self, *legs: str, more: Sequence[Pattern] = (), **sizes: int) -> TensorNetwork:
        """The pattern and more, summed over all legs but these."""
        every = self.sizes | sizes
        return TensorNetwork((self.pattern, *more), View.of(every, *legs), every)


@st.composite
def windows(draw: Any) -> Window:
    """Any geometry, with every output that a convolution has."""
    k, s, d = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    i, left, right = draw(st.integers(1, 14)), draw(st.integers(0, 2)), draw(st.integers(0, 2))
    o = (i + left + right - d * (k - 1) - 1) // s + 1
    assume(o >= 1)
    return Window(k, o, i, s, d, left)


def simplified(network: TensorNetwork, rules: Sequence[Rule] = VIEW_RULES) -> TensorNetwork:
    """The form after the rules, whose value is the network's."""
    after, _ = fixed_point(network, rules)
    assert torch.equal(after.reference(), network.reference())
    return after


@given(w=windows())
def test_r0_two_legs_determine_the_third(w: Window) -> None:
    for dim in range(3):
        assert w.dense.sum(dim).max() <= 1
    same = {"k": (w.s, "o", w.d, "i"), "o": (w.d, "k", w.s, "i")}
    for leg, (a, other, b, third) in same.items():
        again = exactly({other: a, f"{leg}'": b, third: -1}, w.p)
        network = w.network("k", "o", "i", f"{leg}'", more=[again], **{f"{leg}'": w.sizes[leg]})
        after = simplified(network, NORMAL_RULES)
        assert f"{leg}'" not in after.sizes or leg not in after.sizes
    twice = w.network("k", "o", "i", "j", more=[index_pattern("k", "o", "j", w.s, w.d, w.p)], j=w.i)
    after = simplified(twice, NORMAL_RULES)
    assert not {"i", "j"} <= after.sizes.keys()
    assert torch.equal(simplified(w.network("k", "o", "i", more=[w.pattern])).reference(), w.dense)


@given(w=windows())
def test_r1_kernel_and_output_swap(w: Window) -> None:
    swapped = Window(w.o, w.k, w.i, w.d, w.s, w.p)
    assert w.pattern == index_pattern("o", "k", "i", w.d, w.s, w.p)
    assert torch.equal(swapped.dense.transpose(0, 1), w.dense)


@given(w=windows())
def test_r2_padding_is_a_view(w: Window) -> None:
    network = w.network("k", "o", "i")
    assert torch.equal(network.reference(), w.dense)
    for after in padding(network):
        assert torch.equal(after.reference(), w.dense)
        (_, pattern), *_ = after.patterns
        assert pattern.value == 0


@given(w=windows())
def test_r3_only_inputs_that_windows_span_matter(w: Window) -> None:
    span = (w.o - 1) * w.s + (w.k - 1) * w.d + 1
    for after in padding(w.network("k", "o", "i")):
        assert after.sizes["i"] == span
    after = simplified(w.network("k", "o", "i"), NORMAL_RULES)
    low, high = max(0, -w.p), min(w.i - 1, span - 1 - w.p)
    left_over = max(w.s, w.d) - 1  # which native kernels skip
    assert any(len(pattern.terms) == 2 for _, pattern in after.patterns) or (
        after.sizes.get("i", 0) <= high - low + 1 + left_over
    )


@given(w=windows(), c=st.integers(2, 3))
def test_r4_common_steps_keep_a_residue_class(w: Window, c: int) -> None:
    w = Window(w.k, w.o, w.i, c * w.s, c * w.d, w.p)
    after = simplified(w.network("k", "o", "i"), NORMAL_RULES)
    for _, pattern in after.patterns:
        if len(pattern.terms) == 3:
            assert gcd(*(a for leg, a in pattern.terms if leg != "i")) == 1


@given(w=windows(), extra=st.integers(0, 2))
def test_r5_disjoint_windows_have_no_pattern(w: Window, extra: int) -> None:
    w = Window(w.k, w.o, w.i, (w.k - 1) * w.d + 1 + extra, w.d, w.p)
    assert not list(simplified(w.network("k", "o", "i")).patterns)


@given(w=windows(), extra=st.integers(0, 2))
def test_r6_outputs_inside_one_step_have_no_pattern(w: Window, extra: int) -> None:
    w = Window(w.k, w.o, w.i, w.s, (w.o - 1) * w.s + 1 + extra, w.p)
    assert not list(simplified(w.network("k", "o", "i")).patterns)


@given(w=windows(), m=st.integers(2, 4), phases=st.integers(2, 3))
def test_r7_polyphase_has_stride_one(w: Window, m: int, phases: int) -> None:
    w = Window(m * phases, w.o, w.i, m, 1, w.p)
    after = next(polyphase(w.network("k", "o", "i")))
    assert torch.equal(after.reference(), w.dense)
    assert sorted(abs(a) for _, a in next(after.patterns)[1].terms) == [1, 1, 1]


@given(w=windows(), d=st.integers(2, 3))
def test_r8_dilation_polyphase_has_dilation_one(w: Window, d: int) -> None:
    assume(w.o > d)
    w = Window(w.k, w.o, w.i, 1, d, w.p)
    after = next(polyphase(w.network("k", "o", "i")))
    assert torch.equal(after.reference(), w.dense)
    assert sorted(abs(a) for _, a in next(after.patterns)[1].terms) == [1, 1, 1]


@given(w=windows(), single=st.sampled_from("ko"))
def test_r9_one_tap_or_one_output_is_a_slice(w: Window, single: str) -> None:
    w = Window(1 if single == "k" else w.k, 1 if single == "o" else w.o, w.i, w.s, w.d, w.p)
    after = simplified(w.network("k", "o", "i"))
    assert not list(after.patterns) and len(after.sizes) <= 1


@pytest.mark.parametrize("leg", ["k", "o", "i"])
@given(w=windows())
def test_r10_marginals_are_bands(w: Window, leg: str) -> None:
    rest = [other for other in ("k", "o", "i") if other != leg]
    network = w.network(*rest)
    assert torch.equal(network.reference(), w.dense.sum(("k", "o", "i").index(leg)))
    after = simplified(network)
    assert all(len(pattern.terms) <= 2 for _, pattern in after.patterns)
    assert len(after.sizes) <= 2


@given(w=windows())
def test_r11_deltas_rename(w: Window) -> None:
    for leg in ("k", "o", "i"):
        rest = [other for other in ("k", "o", "i") if other != leg]
        renamed = w.network(*rest, "z", more=[delta(leg, "z")], z=w.sizes[leg])
        after = simplified(renamed, NORMAL_RULES)
        assert not {leg, "z"} <= after.sizes.keys()


@given(w=windows())
def test_r12_flips_exchange_the_paddings(w: Window) -> None:
    right = w.s * (w.o - 1) + w.d * (w.k - 1) - w.p - w.i + 1
    flipped = Window(w.k, w.o, w.i, w.s, w.d, right)
    assert torch.equal(flipped.dense, w.dense.flip(0, 1, 2))
