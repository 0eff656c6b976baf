"""Which cases a report shows in pictures."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from nnunet_diffrefine.reports.metrics_table import MetricsTable
from nnunet_diffrefine.reports.statistics import EQUAL

PREDICTED = "predicted_dice"


def mean_dice(table: MetricsTable) -> dict[str, float]:
    """Dice of each case, mean over its labels with a value; NaN if none has one."""
    columns = [found for (_, metric), found in table.values.items() if metric == "Dice"]
    return {case: _mean([column[case] for column in columns]) for case in sorted(table.cases)}


def dice_change(baseline: MetricsTable, system: MetricsTable) -> dict[str, float]:
    """System minus baseline, mean over the labels with a value in both; NaN if there is none."""
    pairs = [(found, system.values[key]) for key, found in baseline.values.items() if key[1] == "Dice"]
    return {case: _mean([new[case] - old[case] for old, new in pairs]) for case in sorted(baseline.cases)}


def _mean(values: Sequence[float]) -> float:
    given = [value for value in values if not math.isnan(value)]
    return math.fsum(given) / len(given) if given else math.nan


def choose(
    change: Mapping[str, float], dice: Mapping[str, float], predicted: Mapping[str, float] | None, n: int
) -> dict[str, list[str]]:
    """The cases to show and why: n each of most improved, most harmed, median change and worst Dice.

    Args:
        change: of Dice, by case; NaN is left out.
        dice: of the system, by case; NaN is left out.
        predicted: Dice of the system predicted without a reference; replaces ``dice`` if given.
        n: cases of each kind. "Improved" and "harmed" take only cases that are, so there may be fewer.

    Returns:
        Reasons by case; a case that qualifies twice has two. Ties go by name.
    """
    known = sorted((value, case) for case, value in change.items() if not math.isnan(value))
    middle = float(np.median([value for value, _ in known])) if known else 0.0
    worst = dice if predicted is None else predicted
    ranked = {
        "most improved": sorted((-value, case) for value, case in known if value > EQUAL),
        "most harmed": [(value, case) for value, case in known if value < -EQUAL],
        "median": sorted((abs(value - middle), case) for value, case in known),
        "worst Dice" if predicted is None else "worst predicted Dice": sorted(
            (value, case) for case, value in worst.items() if not math.isnan(value)
        ),
    }
    reasons: dict[str, list[str]] = {}
    for reason, order in ranked.items():
        for _, case in order[:n]:
            reasons.setdefault(case, []).append(reason)
    return reasons


def read_predicted_dice(file: Path, cases: set[str]) -> dict[str, float]:
    """Predicted Dice of each case from a ``qc.csv``: the mean over all its columns named ``predicted_Dice...``.

    A table with one row a case and a column a class, and one with a row for every class, are read alike.

    Raises:
        ValueError: no such columns, a case missing, a value that is no number.
        OSError: the file cannot be read.
    """
    found: dict[str, list[float]] = {}
    with open(file, encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        columns = [name for name in reader.fieldnames or () if name.lower().startswith(PREDICTED)]
        if not columns or "case" not in (reader.fieldnames or ()):
            raise ValueError(f"--qc {file} lacks the columns case and predicted_Dice; wanted qc.csv of apply.")
        for row in reader:
            try:
                values = [float(row[name]) for name in columns if row[name]]
            except ValueError as error:
                raise ValueError(f"--qc {file}, line {reader.line_num}: {error}; wanted a number.") from None
            found.setdefault(row["case"], []).extend(values)
    if missing := sorted(cases - found.keys()):
        raise ValueError(f"--qc {file} lacks {len(missing)} of {len(cases)} cases: {', '.join(missing[:5])}.")
    return {case: _mean(found[case]) for case in sorted(cases)}
