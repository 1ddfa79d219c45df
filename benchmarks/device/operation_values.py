"""Every public operation on random layers, against torch on the processor in float64."""

from collections import Counter

import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor

from benchmarks.device.sections import Rows, error
from tests.functional.rows import ROWS, Layer
from tests.strategies import Case, geometries

TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-3, torch.float16: 4e-2}
EXAMPLES = 10


def geometries_drawn(count: int) -> list[Case]:
    """The same layers in every run."""
    found: list[Case] = []

    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(geometries())
    def collect(case: Case) -> None:
        found.append(case)

    collect()
    return found


def operation_values(rows: Rows) -> None:
    """Counts, the largest error by dtype, and a row for each kind of failure."""
    tiny, device = rows.setting.tiny, rows.setting.device
    counts, failures, worst = Counter[str](), Counter[str](), dict[str, float]()
    for case in geometries_drawn(2 if tiny else EXAMPLES):
        for name, row in list(ROWS.items())[:: 12 if tiny else 1]:
            for kind in row.kinds:
                if not rows.left:
                    break
                ours, expected, operands = row(Layer(case, kind))
                try:
                    wanted = expected(*operands)
                except (RuntimeError, ValueError):  # torch has no such layer
                    counts["without reference"] += 1
                    continue
                for dtype, tolerance in TOLERANCES.items():
                    if tiny and dtype == torch.float16:
                        continue
                    label = f"{name} {kind} {dtype}"
                    try:
                        got = ours(*(placed(each, device, dtype) for each in operands))
                        off = error(got, wanted)
                    except Exception as failure:
                        failures[f"{label}: {type(failure).__name__}: {str(failure)[:160]}"] += 1
                        continue
                    counts[str(dtype)] += 1
                    worst[str(dtype)] = max(worst.get(str(dtype), 0.0), off)
                    if got.device.type != device.type:
                        failures[f"{label}: the result is on {got.device}"] += 1
                    if not off <= tolerance:
                        failures[f"{label}: wrong by {off:.1e}"] += 1
    rows.rows.append({"name": "compared", **counts, "largest errors": worst})
    rows.rows += [{"name": "failures", "failed": k, "times": v} for k, v in failures.items()]


def placed(operand: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return operand.to(device, dtype if operand.is_floating_point() else operand.dtype)
