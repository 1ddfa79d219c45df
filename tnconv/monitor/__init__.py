"""Watching a training run: what its gradients, steps and curvature do, at a small price.

See `Monitor`. Measurements are `tnconv.monitor.published` and `further_measurements`, schedules
`every`, `linear` and `logarithmic`; `read_run` reads what was written.
"""

from tnconv.monitor.alerts import RULES, Alert, History
from tnconv.monitor.configurations import configuration
from tnconv.monitor.events import Event
from tnconv.monitor.further_measurements import (
    CriticalBatchSize,
    DeadUnits,
    GradientCosine,
    GradientRatio,
    HessSpectrum,
    LargestSample,
    NormalisationNoiseScale,
    SaturatedUnits,
    Smoothed,
    UpdateCosine,
    UpdateRatio,
)
from tnconv.monitor.measurement import Following, Measurement
from tnconv.monitor.published import (
    CABS,
    Alpha,
    Distance,
    EarlyStopping,
    GradHist1d,
    GradHist2d,
    GradNorm,
    HessMaxEV,
    HessTrace,
    InnerTest,
    Loss,
    MeanGSNR,
    NormTest,
    OrthoTest,
    Parameters,
    TICDiag,
    TICTrace,
    Time,
    UpdateSize,
)
from tnconv.monitor.run_folder import Run, read_run
from tnconv.monitor.schedules import every, linear, logarithmic
from tnconv.monitor.seen import Seen
from tnconv.monitor.training_monitor import Monitor

__all__ = [
    "CABS",
    "RULES",
    "Alert",
    "Alpha",
    "CriticalBatchSize",
    "DeadUnits",
    "Distance",
    "EarlyStopping",
    "Event",
    "Following",
    "GradHist1d",
    "GradHist2d",
    "GradNorm",
    "GradientCosine",
    "GradientRatio",
    "HessMaxEV",
    "HessSpectrum",
    "HessTrace",
    "History",
    "InnerTest",
    "LargestSample",
    "Loss",
    "MeanGSNR",
    "Measurement",
    "Monitor",
    "NormTest",
    "NormalisationNoiseScale",
    "OrthoTest",
    "Parameters",
    "Run",
    "SaturatedUnits",
    "Seen",
    "Smoothed",
    "TICDiag",
    "TICTrace",
    "Time",
    "UpdateCosine",
    "UpdateRatio",
    "UpdateSize",
    "configuration",
    "every",
    "linear",
    "logarithmic",
    "read_run",
]
