"""Rewriting of diagrams by the connectivity of their patterns."""

from tnconv.simplify.driver import Firing, Simplified, fixed_point, measure, simplify
from tnconv.simplify.offered import OFFERED, Offer
from tnconv.simplify.queries import constants, mirrored
from tnconv.simplify.rules import NORMAL_RULES, Rule
from tnconv.simplify.view_rules import VIEW_RULES

__all__ = [
    "NORMAL_RULES",
    "OFFERED",
    "VIEW_RULES",
    "Firing",
    "Offer",
    "Rule",
    "Simplified",
    "constants",
    "fixed_point",
    "measure",
    "mirrored",
    "simplify",
]
