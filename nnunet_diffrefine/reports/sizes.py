"""Where refinement gains and loses: paired comparisons within classes, by size of the reference's structure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nnunet_diffrefine.evaluation.definitions import find_metric
from nnunet_diffrefine.reports.metrics_table import MetricsTable
from nnunet_diffrefine.reports.statistics import PairedComparison, compare

VOLUME = "reference_volume"
ENOUGH = 9
"""Cases with the structure that are needed to split a class into thirds."""


@dataclass(frozen=True)
class SizeGroup:
    """Cases of one class and size.

    Args:
        label: class.
        name: of the group.
        volumes: smallest and largest reference volume in mL; None if the reference has no such structure.
        cases: in it.
        results: comparison of each metric.
    """

    label: str
    name: str
    volumes: tuple[float, float] | None
    cases: tuple[str, ...]
    results: dict[str, PairedComparison]


def size_groups(baseline: MetricsTable, system: MetricsTable, metrics: Sequence[str], seed: int) -> list[SizeGroup]:
    """Each class whole and, where there are enough cases, in thirds by reference volume; absent structures apart.

    Classes without ``reference_volume`` in the table are left out.
    """
    groups = []
    for label in dict.fromkeys(label for label, _ in baseline.values):
        volumes = baseline.values.get((label, VOLUME))
        if volumes is None:
            continue
        chosen = [metric for metric in metrics if (label, metric) in baseline.values]
        for name, cases in _split(volumes).items():
            results = {m: _compare(baseline, system, label, m, cases, seed) for m in chosen}
            sizes = [volumes[case] for case in cases if volumes[case] > 0]
            groups.append(SizeGroup(label, name, (min(sizes), max(sizes)) if sizes else None, cases, results))
    return groups


def _split(volumes: Mapping[str, float]) -> dict[str, tuple[str, ...]]:
    present = sorted((case for case in volumes if volumes[case] > 0), key=lambda case: (volumes[case], case))
    groups = {"present": tuple(present)} if present else {}
    if len(present) >= ENOUGH:
        thirds = np.array_split(np.array(present, dtype=object), 3)
        groups |= dict(zip(("small third", "middle third", "large third"), map(tuple, thirds), strict=True))
    if absent := tuple(sorted(case for case in volumes if not (volumes[case] > 0 or math.isnan(volumes[case])))):
        groups["absent from reference"] = absent
    return groups


def _compare(
    baseline: MetricsTable, system: MetricsTable, label: str, metric: str, cases: Sequence[str], seed: int
) -> PairedComparison:
    old, new = ({case: table.values[label, metric][case] for case in cases} for table in (baseline, system))
    better = find_metric(metric).better
    assert better is not None, "neutral metrics are not compared"
    return compare(old, new, better, seed, n_losses=0)
