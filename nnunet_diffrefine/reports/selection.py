"""Which cases a report shows in pictures."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nnunet_diffrefine.reports.metrics_table import MetricsTable
from nnunet_diffrefine.reports.statistics import EQUAL

PREDICTED = "predicted_dice"
RANK = "need_of_review"


@dataclass(frozen=True)
class Review:
    """What a ``qc.csv`` says of the cases.

    Args:
        order: cases, the first to look at first.
        dice: predicted of each case, least of its classes; NaN where nothing was found.
    """

    order: tuple[str, ...]
    dice: dict[str, float]


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
    change: Mapping[str, float], dice: Mapping[str, float], review: Review | None, n: int
) -> dict[str, list[str]]:
    """The cases to show and why: n each of most improved, most harmed, median change and worst.

    Args:
        change: of Dice, by case; NaN is left out.
        dice: of the system, by case; NaN is left out.
        review: whose order is taken in place of that of ``dice``; None if there is none.
        n: cases of each kind. "Improved" and "harmed" take only cases that are, so there may be fewer.

    Returns:
        Reasons by case; a case that qualifies twice has two. Ties go by name.
    """
    known = sorted((value, case) for case, value in change.items() if not math.isnan(value))
    middle = float(np.median([value for value, _ in known])) if known else 0.0
    worst = sorted((value, case) for case, value in dice.items() if not math.isnan(value))
    ranked: dict[str, Sequence[tuple[float, str]]] = {
        "most improved": sorted((-value, case) for value, case in known if value > EQUAL),
        "most harmed": [(value, case) for value, case in known if value < -EQUAL],
        "median": sorted((abs(value - middle), case) for value, case in known),
    }
    ranked |= {"worst Dice": worst} if review is None else {"first to review": [*enumerate(review.order)]}
    reasons: dict[str, list[str]] = {}
    for reason, order in ranked.items():
        for _, case in order[:n]:
            reasons.setdefault(case, []).append(reason)
    return reasons


def read_review(file: Path, cases: set[str]) -> Review:
    """The order of review and the predicted Dice of a ``qc.csv``, its columns ``predicted_Dice...``.

    The order is that of the column ``need_of_review``. In a table without it, cases in which nothing was found come
    first, then the least predicted Dice of any class. A table may have one row a case, or one for each class.

    Raises:
        ValueError: no such columns, a case missing, a value that is no number.
        OSError: the file cannot be read.
    """
    found, ranks = _read_qc(file)
    if missing := sorted(cases - found.keys()):
        raise ValueError(f"--qc {file} lacks {len(missing)} of {len(cases)} cases: {', '.join(missing[:5])}.")
    dice = {case: min(found[case], default=math.nan) for case in sorted(cases)}
    urgency = ranks or {case: -math.inf if math.isnan(value) else value for case, value in dice.items()}
    return Review(tuple(sorted(dice, key=lambda case: (urgency[case], case))), dice)


def _read_qc(file: Path) -> tuple[dict[str, list[float]], dict[str, float]]:
    """The predicted Dice there are of each case, and its rank; no ranks if the table has none."""
    found: dict[str, list[float]] = {}
    ranks: dict[str, float] = {}
    with open(file, encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        names = reader.fieldnames or ()
        columns = [name for name in names if name.lower().startswith(PREDICTED)]
        if not columns or "case" not in names:
            raise ValueError(f"--qc {file} lacks the columns case and predicted_Dice; wanted qc.csv of apply.")
        for row in reader:
            case, where = row["case"], f"--qc {file}, line {reader.line_num}"
            found.setdefault(case, []).extend(_number(row[name], where) for name in columns if row[name])
            if RANK in names:
                ranks[case] = min(_number(row[RANK], f"{where}, {RANK}"), ranks.get(case, math.inf))
    return found, ranks


def _number(text: str | None, where: str) -> float:
    try:
        value = float(text or "")
    except ValueError as error:
        raise ValueError(f"{where}: {error}; wanted a number.") from None
    if math.isnan(value):
        raise ValueError(f"{where}: {text}; wanted a number.")
    return value
