"""Paired comparison of two systems on the same cases.

The tests are those of Re-DiffiNet (Ren et al., arXiv 2402.07354), Appendix B: paired, one-sided, the alternative being
that the system is better than the baseline; for each fold and pooled over folds. A Wilcoxon signed-rank test is added,
as differences of Dice and HD95 are rarely normal, and Holm's correction, as several labels and metrics are tested.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from nnunet_diffrefine.evaluation.definitions import Better

EQUAL = 1e-9
"""Differences up to this size are rounding."""
CONFIDENCE = 0.95
RESAMPLES = 9999


@dataclass(frozen=True)
class Loss:
    """A case on which the system is worse: both values, and the difference system minus baseline."""

    case: str
    baseline: float
    system: float
    difference: float


@dataclass(frozen=True)
class PairedComparison:
    """System against baseline in one label and metric.

    Values that are better nearer zero (volume errors) enter as their absolute values.

    Args:
        n: cases with a value in both; all numbers but the counts are of these.
        baseline: mean.
        system: mean.
        difference: mean of system minus baseline.
        interval: bootstrap interval (BCa, 95 %) of ``difference``; None for fewer than two cases.
        p_wilcoxon: one-sided; 1 if all differences are zero, None for fewer than two cases.
        p_t: one-sided; 1 if all differences are zero, None for fewer than two cases or equal ones other than zero.
        better: cases on which the system is better. If only one has no value, which under the empty policy ``nnunet``
            means that it rightly predicted nothing, that one is the better.
        equal: cases without difference, or without value in both.
        worse: the rest.
        n_one_sided: cases with a value in one system only: counted, but in no mean and no test.
        losses: the largest, largest first.
    """

    n: int
    baseline: float | None
    system: float | None
    difference: float | None
    interval: tuple[float, float] | None
    p_wilcoxon: float | None
    p_t: float | None
    better: int
    equal: int
    worse: int
    n_one_sided: int
    losses: tuple[Loss, ...]


def compare(
    baseline: Mapping[str, float], system: Mapping[str, float], better: Better, seed: int = 0, n_losses: int = 3
) -> PairedComparison:
    """Compare two systems' values of the same cases; NaN is no value.

    Args:
        baseline: value of each case.
        system: the same cases.
        better: which direction is.
        seed: of the bootstrap.
        n_losses: how many of the worst losses to list.

    Raises:
        ValueError: the cases differ.
    """
    if baseline.keys() != system.keys():
        raise ValueError(f"Unpaired cases: {sorted(baseline.keys() ^ system.keys())}.")
    cases = sorted(baseline)
    old, new = (np.array([values[case] for case in cases], dtype=float) for values in (baseline, system))
    if better == "nearer zero":
        old, new = np.abs(old), np.abs(new)
    both = ~(np.isnan(old) | np.isnan(new))
    gain = (new - old) * (1.0 if better == "higher" else -1.0)
    gain[np.abs(gain) <= EQUAL] = 0.0  # NaN compares false and stays
    unmatched_better = int((np.isnan(new) & ~np.isnan(old)).sum())
    unmatched_worse = int((np.isnan(old) & ~np.isnan(new)).sum())
    n_better, n_worse = int((gain > 0).sum()) + unmatched_better, int((gain < 0).sum()) + unmatched_worse
    order = [i for i in np.argsort(gain, kind="stable") if gain[i] < 0][:n_losses]
    return PairedComparison(
        n=int(both.sum()),
        baseline=_mean(old[both]),
        system=_mean(new[both]),
        difference=_mean((new - old)[both]),
        interval=bootstrap_interval((new - old)[both], seed),
        p_wilcoxon=wilcoxon_p(gain[both]),
        p_t=t_p(gain[both]),
        better=n_better,
        equal=len(cases) - n_better - n_worse,
        worse=n_worse,
        n_one_sided=unmatched_better + unmatched_worse,
        losses=tuple(Loss(cases[i], float(old[i]), float(new[i]), float(new[i] - old[i])) for i in order),
    )


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def bootstrap_interval(differences: np.ndarray, seed: int = 0) -> tuple[float, float] | None:
    """BCa bootstrap interval (95 %) of the mean of paired differences (N,); None for fewer than two.

    All resamples of equal differences are equal, and so are the ends of the interval.
    """
    if len(differences) < 2:
        return None
    if np.ptp(differences) <= EQUAL:
        return (float(differences.mean()),) * 2
    rng = np.random.default_rng(seed)
    found = stats.bootstrap(
        (differences,), np.mean, n_resamples=RESAMPLES, confidence_level=CONFIDENCE, method="BCa", rng=rng, batch=999
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def wilcoxon_p(gains: np.ndarray) -> float | None:
    """One-sided p: gains (N,) are symmetric about zero or less. Zeros are left out, as Wilcoxon did."""
    if len(gains) < 2:
        return None
    if not gains.any():
        return 1.0
    return float(stats.wilcoxon(gains, zero_method="wilcox", alternative="greater").pvalue)


def t_p(gains: np.ndarray) -> float | None:
    """One-sided p of the paired t test: the mean of gains (N,) is zero or less. None where it is not defined."""
    if len(gains) < 2:
        return None
    if not gains.any():
        return 1.0
    if np.ptp(gains) <= EQUAL:
        return None
    return float(stats.ttest_1samp(gains, 0.0, alternative="greater").pvalue)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjusted p values by Holm's step-down method (Scand. J. Statist. 6, 1979); None stays and is not counted."""
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None and not math.isnan(p))
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        adjusted[i] = largest
    return adjusted
