"""How good probabilities are: of errors, voxel by voxel, and of Dice, case by case."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

BINS = 10
EPS = 1e-6
DOUBT = 0.05
"""Error probability of stage one from which on a voxel counts as in doubt."""


@dataclass(frozen=True)
class ErrorScores:
    """An error map in the doubtful region, over voxels.

    Attributes:
        log_loss: mean negative log-likelihood; a proper score, as is the next.
        brier: mean squared difference between probability and outcome.
        auroc: probability that a wrong voxel has the larger value than a right one, ties half; None if all are alike.
        auroc_doubt: the same among the voxels in doubt alone; the region holds many that no one would get wrong.
        ece: expected calibration error over ten bins of equal width.
    """

    log_loss: float
    brier: float
    auroc: float | None
    auroc_doubt: float | None
    ece: float


def error_scores(probability: np.ndarray, wrong: np.ndarray, doubt: np.ndarray) -> ErrorScores:
    """Scores of error probabilities (N,) in [0, 1] against outcomes, bool (N,).

    Args:
        probability: of an error.
        wrong: whether there is one.
        doubt: stage one's own error probability (N,); from :data:`DOUBT` on a voxel is in doubt.
    """
    open_ = doubt >= DOUBT
    p, y = probability.astype(np.float64), wrong.astype(np.float64)
    clipped = p.clip(EPS, 1 - EPS)
    likelihood = np.where(wrong, np.log(clipped), np.log1p(-clipped))
    return ErrorScores(
        float(-likelihood.mean()),
        float(((p - y) ** 2).mean()),
        _auroc(p, wrong),
        _auroc(p[open_], wrong[open_]),
        _ece(p, y),
    )


def _auroc(p: np.ndarray, wrong: np.ndarray) -> float | None:
    n_wrong, n_right = int(wrong.sum()), int((~wrong).sum())
    if not n_wrong or not n_right:
        return None
    ranks = stats.rankdata(p)
    return float((ranks[wrong].sum() - n_wrong * (n_wrong + 1) / 2) / (n_wrong * n_right))


def _ece(p: np.ndarray, y: np.ndarray) -> float:
    place = np.minimum((p * BINS).astype(int), BINS - 1)
    excess = np.bincount(place, weights=p - y, minlength=BINS)
    return float(np.abs(excess).sum() / len(p))


@dataclass(frozen=True)
class DiceScores:
    """Predicted against true Dice of the result, over cases.

    Attributes:
        n: cases.
        spearman: rank correlation, mean over the groups of cross-fitting, each weighted by its cases; None where it is
            defined in none.
        mae: mean absolute error after the linear map, cross-fitted.
        mae_before: mean absolute error before it.
    """

    n: int
    spearman: float | None
    mae: float
    mae_before: float


@dataclass(frozen=True)
class Line:
    """Dice as a linear function of predicted Dice, clipped to [0, 1]."""

    intercept: float
    slope: float

    def __call__(self, predicted: Any) -> Any:  # noqa: ANN401 (a number or an array)
        """Recalibrated prediction."""
        return np.clip(self.intercept + self.slope * predicted, 0, 1)


def fit_line(predicted: np.ndarray, true: np.ndarray) -> Line:
    """Least squares over cases (N,), with a slope in [0, 1]; the mean of the true values if predictions are all alike.

    A negative slope would turn the order of the cases round. A slope above 1 stretches the spread of the predictions,
    and with it the difference between one model's level and another's: on the hippocampus, where least squares give
    slopes of 1 to 4, errors on the other fold nearly doubled.
    """
    if not len(true):
        return Line(0.0, 1.0)
    spread = predicted - predicted.mean()
    slope = float(np.clip((spread * true).sum() / (spread**2).sum(), 0, 1)) if np.ptp(predicted) > 1e-12 else 0.0
    return Line(float(true.mean() - slope * predicted.mean()), slope)


def dice_scores(predicted: Mapping[int, np.ndarray], true: np.ndarray, group: np.ndarray) -> DiceScores:
    """Agreement over cases (N,); those without a prediction (NaN) are left out.

    Args:
        predicted: for each group, the predictions (N,) of all cases by what was calibrated on the other groups; the
            group's linear map is fitted on these cases too.
        true: Dice (N,).
        group: of each case, (N,).
    """
    known = np.isfinite(next(iter(predicted.values())))
    mapped, before, ranks = np.zeros(len(true)), np.zeros(len(true)), []
    for g in sorted(set(group)):
        own, others, values = known & (group == g), known & (group != g), predicted[int(g)]
        line = fit_line(values[others], true[others])
        before[own], mapped[own] = values[own], line(values[own])
        if own.sum() > 2 and np.ptp(values[own]) > 0 and np.ptp(true[own]) > 0:
            ranks.append((own.sum(), stats.spearmanr(values[own], true[own]).statistic))
    if not known.any():
        return DiceScores(0, None, 0.0, 0.0)
    spearman = float(np.average([r for _, r in ranks], weights=[n for n, _ in ranks])) if ranks else None
    errors = [float(np.abs(values - true)[known].mean()) for values in (mapped, before)]
    return DiceScores(int(known.sum()), spearman, *errors)


def predicted_dice(soft: np.ndarray, decided: np.ndarray, overlap: np.ndarray) -> np.ndarray:
    """2 sum(q m) / (sum q + sum m), (R,), of sums of q, m and q m over a volume; NaN where m is empty.

    An empty mask has a Dice of 0 or is right, and no probability of a voxel says which.
    """
    found = 2 * overlap / np.maximum(soft + decided, EPS)
    return np.where(decided > 0, found, np.nan)
