"""The metrics: name, unit, which direction is better, and the definition that goes into every ``metrics.json``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Better = Literal["higher", "lower", "nearer zero"]


@dataclass(frozen=True)
class Metric:
    """A column of values; ``better`` is None for what describes a case and is neither good nor bad."""

    name: str
    unit: str
    better: Better | None
    definition: str


SURFACE = (
    "Surfaces as in DeepMind's surface-distance: corner points between voxels, each weighted with the marching-cubes "
    "area of its 2 x 2 x 2 neighbourhood in mm2; distances in mm between corner points, spacing honoured."
)
LESION = (
    "BraTS 2023 rule (docs/metrics.md): mean over reference lesions larger than the minimum volume and false-positive "
    "components; missed lesions and false positives count "
)

METRICS = (
    Metric("Dice", "1", "higher", "2 |R & P| / (|R| + |P|) over voxels."),
    Metric("IoU", "1", "higher", "|R & P| / |R or P| over voxels."),
    Metric("HD95", "mm", "lower", f"The larger of the two directed, area-weighted 95th percentiles. {SURFACE}"),
    Metric("ASSD", "mm", "lower", f"Area-weighted mean distance, both directions pooled. {SURFACE}"),
    Metric("volume_error", "mL", "nearer zero", "Volume of the prediction minus that of the reference."),
    Metric(
        "relative_volume_error",
        "%",
        "nearer zero",
        "volume_error / reference volume; no value if the reference is empty.",
    ),
    Metric("lesion_Dice", "1", "higher", f"{LESION}0."),
    Metric("lesion_HD95", "mm", "lower", f"{LESION}374 mm."),
    Metric("lesions_missed", "count", "lower", "Reference lesions above the minimum volume that no component touches."),
    Metric("lesions_false", "count", "lower", "Predicted components that touch no dilated reference lesion."),
    Metric("lesions_reference", "count", None, "Reference lesions above the minimum volume."),
    Metric("reference_volume", "mL", None, "Volume of the reference."),
)


def nsd(tolerance: float) -> Metric:
    """Normalised surface Dice at a tolerance in mm, named ``NSD@1mm``."""
    text = f"Share of both surfaces' area within {tolerance:g} mm of the other surface. {SURFACE}"
    return Metric(f"NSD@{tolerance:g}mm", "1", "higher", text)


def metrics(tolerances: Sequence[float]) -> tuple[Metric, ...]:
    """All metrics in the order of the table; NSD after HD95, once for each tolerance in mm."""
    return (*METRICS[:3], *map(nsd, tolerances), *METRICS[3:])


def find_metric(name: str) -> Metric:
    """The metric of that name.

    Raises:
        ValueError: there is none.
    """
    if match := re.fullmatch(r"NSD@(.+)mm", name):
        return nsd(float(match[1]))
    found = [metric for metric in METRICS if metric.name == name]
    if not found:
        known = ", ".join(metric.name for metric in METRICS)
        raise ValueError(f"There is no metric {name!r}; there are {known} and NSD@<tolerance>mm.")
    return found[0]
