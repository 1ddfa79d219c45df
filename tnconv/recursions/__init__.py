"""Recursions over autograd graphs: what goes backwards beside the gradient, one rule per operation.

A rule is a small function for one operation, registered by `register_rule`; see `step`.
"""

from tnconv.recursions import (
    column_rules,
    entrywise,
    memory_saving,
    multilinear,
    norms,
    rearrangements,
    resampling,
)
from tnconv.recursions.column_step import Rows
from tnconv.recursions.columns_walk import ColumnPlan, column_plan
from tnconv.recursions.diagonal import check_method, diagonals
from tnconv.recursions.step import Flow, Flows, Step, register_rule
from tnconv.recursions.walk import recursion

__all__ = [
    "ColumnPlan",
    "Flow",
    "Flows",
    "Rows",
    "Step",
    "check_method",
    "column_plan",
    "column_rules",
    "diagonals",
    "entrywise",
    "memory_saving",
    "multilinear",
    "norms",
    "rearrangements",
    "recursion",
    "register_rule",
    "resampling",
]
