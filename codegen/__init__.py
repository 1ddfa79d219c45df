"""From diagrams to fast torch: paths, costs, routes, plans and programs."""

from tnconv.codegen.compiler import compile
from tnconv.codegen.lowering.nested import Nest
from tnconv.codegen.lowering.plans import Plan
from tnconv.codegen.planner import ROUTES
from tnconv.codegen.prices.calibration import calibrate
from tnconv.codegen.programs.program import Program

__all__ = ["ROUTES", "Nest", "Plan", "Program", "calibrate", "compile"]
