"""Rewriting of diagrams by the connectivity of their patterns."""

from tnconv.simplify.driver import Firing, Simplified, fixed_point, measure, simplify
from tnconv.simplify.rules import NORMAL_RULES, Rule
from tnconv.simplify.views import VIEW_RULES

__all__ = [
    "NORMAL_RULES",
    "VIEW_RULES",
    "Firing",
    "Rule",
    "Simplified",
    "fixed_point",
    "measure",
    "simplify",
]
