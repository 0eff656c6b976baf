"""Which decision is used of the refiner's logits: an offset a class, and the gate; both from out-of-fold cases.

Judged is the label map that nnU-Net writes of a decision (:meth:`Foreground.exported`): a core that lies outside of the
whole extends the whole.

Offsets are chosen for the mean Dice over cases and classes, one class at a time with the others at 0, and tried
together. They are cross-fitted: the offsets with which a case is judged were chosen on other folds' cases (of one fold
alone, on its other half). They are used only if the cross-fitted gain over no offset is real: its 95 % interval lies
above 0. So it is with the gate: a class is refined if the 95 % interval of the paired difference of its Dice, refined
less stage one, lies above 0, and keeps stage one's decision otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from nnunet_diffrefine.batch import Foreground
from nnunet_diffrefine.calibration.voxels import CaseVoxels, dice
from nnunet_diffrefine.networks.gate import Gate

OFFSETS = (0.0, -0.25, 0.25, -0.5, 0.5, -0.75, 0.75, -1.0, 1.0, -1.5, 1.5)
"""Candidates, the nearest to 0 first: of equally good ones the first is taken."""
CONFIDENCE = 0.95
RESAMPLES = 9999
EQUAL = 1e-9

Cases = Callable[[], Iterable[CaseVoxels]]
"""Reads the cases anew at each call, always in the same order; one is in memory at a time."""


@dataclass(frozen=True)
class Paired:
    """A paired difference over cases: its mean, 95 % bootstrap interval (None below two cases), and counts."""

    n: int
    difference: float
    interval: tuple[float, float] | None
    better: int
    worse: int

    @property
    def real(self) -> bool:
        """Whether the interval lies above 0."""
        return self.interval is not None and self.interval[0] > 0


def paired(gains: np.ndarray) -> Paired:
    """Summary of paired differences (N,); the interval is BCa's."""
    gains = np.where(np.abs(gains) <= EQUAL, 0.0, gains)
    interval: tuple[float, float] | None = None
    if len(gains) >= 2 and np.ptp(gains) <= EQUAL:
        interval = (float(gains.mean()),) * 2
    elif len(gains) >= 2:
        rng = np.random.default_rng(0)
        options = {"n_resamples": RESAMPLES, "confidence_level": CONFIDENCE, "method": "BCa", "batch": 999}
        found = stats.bootstrap((gains,), np.mean, rng=rng, **options).confidence_interval
        interval = (float(found.low), float(found.high))
    return Paired(len(gains), float(gains.mean()), interval, int((gains > 0).sum()), int((gains < 0).sum()))


def groups(folds: Sequence[int]) -> np.ndarray:
    """The group (N,) of each case in cross-fitting: its fold, or where there is one fold, alternating halves."""
    found = np.asarray(folds)
    return np.arange(len(found)) % 2 if len(set(folds)) < 2 else found


def decision_dice(case: CaseVoxels, gate: Gate) -> np.ndarray:
    """Dice (R,) of the label map that nnU-Net writes for a case that is decided through a gate."""
    foreground, logits = gate.foreground, case.logits(gate.foreground)
    return dice(case.sums(foreground.exported(foreground.decide(gate(*logits)))))


def stage_one_dice(case: CaseVoxels, foreground: Foreground) -> np.ndarray:
    """Dice (R,) of a case's prior."""
    return decision_dice(case, Gate(foreground, frozenset(range(foreground.channels))))


@dataclass(frozen=True)
class OffsetChoice:
    """Offsets and what they gain.

    Attributes:
        offsets: (R,), zeros if they are not used.
        best: (R,), the best on all cases, used or not.
        gain: cross-fitted gain in mean Dice over no offset; None where only 0 was tried.
        by_group: offsets (R,) with which the cases of each group are judged.
        refined: cross-fitted Dice (N, R) of the refined cases.
    """

    offsets: tuple[float, ...]
    best: tuple[float, ...]
    gain: Paired | None
    by_group: dict[int, tuple[float, ...]]
    refined: np.ndarray


def offset_table(case: CaseVoxels, foreground: Foreground, candidates: Sequence[float] = OFFSETS) -> np.ndarray:
    """Mean Dice over classes (R, K) of a case, with each of K offsets on each of R channels, the others at 0."""
    none = np.zeros(foreground.channels)
    rows = []
    for channel in range(foreground.channels):
        vectors = [tuple(np.where(np.arange(len(none)) == channel, offset, none)) for offset in candidates]
        rows.append([decision_dice(case, Gate(foreground, offsets=vector)).mean() for vector in vectors])
    return np.array(rows)


def choose_offsets(
    cases: Cases, tables: np.ndarray, group: np.ndarray, foreground: Foreground, candidates: Sequence[float] = OFFSETS
) -> OffsetChoice:
    """Choose offsets and judge them.

    Args:
        cases: N of them.
        tables: of :func:`offset_table`, (N, R, K).
        group: of each case, (N,).
        foreground: meaning of the R channels.
        candidates: K offsets, the first one 0.
    """

    def best(chosen: np.ndarray) -> tuple[float, ...]:
        if not chosen.any():
            return (0.0,) * foreground.channels
        return tuple(candidates[k] for k in tables[chosen].mean(0).round(12).argmax(1))

    none = (0.0,) * foreground.channels
    plain = np.stack([decision_dice(case, Gate(foreground)) for case in cases()])
    if len(candidates) < 2:
        return OffsetChoice(none, none, None, {int(g): none for g in set(group)}, plain)
    by_group = {int(g): best(group != g) for g in set(group)}
    gates = {g: Gate(foreground, offsets=offsets) for g, offsets in by_group.items()}
    shifted = np.stack([decision_dice(case, gates[int(g)]) for case, g in zip(cases(), group, strict=True)])
    gain, everywhere = paired((shifted - plain).mean(1)), best(np.ones_like(group, bool))
    if gain.real:
        return OffsetChoice(everywhere, everywhere, gain, by_group, shifted)
    return OffsetChoice(none, everywhere, gain, dict.fromkeys(by_group, none), plain)


def gated_classes(stage_one: np.ndarray, refined: np.ndarray) -> tuple[list[Paired], list[int]]:
    """The paired difference of each class, of Dice (N, R) of both, and the classes that keep stage one's decision."""
    differences = [paired(refined[:, c] - stage_one[:, c]) for c in range(stage_one.shape[1])]
    return differences, [c for c, difference in enumerate(differences) if not difference.real]
