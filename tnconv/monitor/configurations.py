"""Sets of measurements by name, and what else a list of them can hold."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

from tnconv.monitor.further_measurements import FURTHER, NormalisationNoiseScale, UpdateRatio
from tnconv.monitor.measurement import Measurement
from tnconv.monitor.needs import Curvature
from tnconv.monitor.published import (
    PUBLISHED,
    Alpha,
    Distance,
    GradHist1d,
    GradHist2d,
    GradNorm,
    HessMaxEV,
    HessTrace,
    InnerTest,
    Loss,
    NormTest,
    OfCurvature,
    OrthoTest,
    TICDiag,
    UpdateSize,
)

Configuration = Literal["cheap", "economy", "business", "full"]


def configuration(
    name: Configuration | str, curvature: Curvature = "hesscale", products: int = 12
) -> list[Measurement]:
    """The measurements of a set, the published ones but for "cheap", which costs next to nothing.

    ``curvature`` is that of traces and criteria, ``products`` how many products with the Hessian
    its largest eigenvalue takes at most.

    >>> len(configuration("economy")), len(configuration("business")), len(configuration("full"))
    (9, 11, 13)

    Raises:
        ValueError: no such set.
    """
    if name not in get_args(Configuration):
        known = ", ".join(map(repr, get_args(Configuration)))
        raise ValueError(f"quantities is {name!r}; expected one of {known}, or a list")
    if name == "cheap":
        return [Loss(), GradNorm(), UpdateSize(), UpdateRatio(), NormalisationNoiseScale()]
    found: list[Measurement] = [Alpha(), Distance(), GradHist1d(), GradNorm(), InnerTest(), Loss()]
    found += [NormTest(), OrthoTest(), UpdateSize()]
    if name in ("business", "full"):
        found += [TICDiag(curvature), HessTrace(curvature)]
    if name == "full":
        found += [HessMaxEV(products), GradHist2d()]
    return found


def measurements(
    given: Configuration | str | Sequence[Measurement | str | type[Measurement]],
    curvature: Curvature,
    products: int = 12,
) -> list[Measurement]:
    """The measurements of a set's name or of a list, which can hold names and classes, too.

    Raises:
        TypeError: something else.
        ValueError: an unknown name, or two of one name.
    """
    if isinstance(given, str):
        return configuration(given, curvature, products)
    if isinstance(given, Measurement | type):
        name = given.__name__ if isinstance(given, type) else type(given).__name__
        raise TypeError(f"quantities is {name} by itself; expected a sequence, [{name}()]")
    found = [_one(each, curvature) for each in given]
    names = [each.name for each in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"quantities holds {sorted(twice)} twice; expected a name for each")
    return found


def sampled(measurement: Measurement) -> Measurement:
    """With random samples of the curvature in the place of exact columns.

    One sample of the Hessian's diagonal is good for its trace, and no denominator of single
    entries: there HesScale is the cheap estimate.
    """
    if not isinstance(measurement, OfCurvature):
        return measurement
    hessian: Curvature = "hesscale" if isinstance(measurement, TICDiag) else "diag_h_mc"
    cheaper: dict[Curvature, Curvature] = {"diag_ggn_exact": "diag_ggn_mc", "diag_h": hessian}
    return replace(measurement, curvature=cheaper.get(measurement.curvature, measurement.curvature))


def _one(given: Measurement | str | type[Measurement], curvature: Curvature) -> Measurement:
    kinds: tuple[type[Measurement], ...] = (*PUBLISHED, *FURTHER)
    known = {kind.__name__: kind for kind in kinds}
    if isinstance(given, str):
        if given not in known:
            raise ValueError(f"quantity {given!r} is unknown; expected {', '.join(known)}")
        given = known[given]
    if isinstance(given, type) and issubclass(given, OfCurvature):
        return given(curvature)
    made = given() if isinstance(given, type) else given
    if not isinstance(made, Measurement):
        kind = type(made).__name__
        raise TypeError(f"quantities holds a {kind}; expected a Measurement or its name")
    return made
