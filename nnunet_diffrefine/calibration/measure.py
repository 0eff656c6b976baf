"""All that calibration measures on the out-of-fold cases of a cross-validation, in passes over their stored voxels."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from nnunet_diffrefine.batch import Foreground
from nnunet_diffrefine.calibration.agreement import (
    DiceScores,
    ErrorScores,
    Line,
    dice_scores,
    error_scores,
    fit_line,
    predicted_dice,
)
from nnunet_diffrefine.calibration.decisions import (
    OFFSETS,
    Cases,
    OffsetChoice,
    Paired,
    choose_offsets,
    gated_classes,
    groups,
    offset_table,
    stage_one_dice,
)
from nnunet_diffrefine.calibration.scaling import Scaling, fit, identity
from nnunet_diffrefine.calibration.voxels import CaseVoxels, dice
from nnunet_diffrefine.errors.probability import error_of
from nnunet_diffrefine.networks.gate import Gate

SAMPLE = 200_000
"""Voxels of all cases together on which probabilities are calibrated; every case gives as many as any."""
SCALED = {"stage one, scaled": (False, True), "refiner, scaled": (True, False), "both, scaled": (True, True)}
"""Candidates for the error map, and whether each reads the refiner and stage one."""
AS_THEY_ARE = {"stage one": "stage_one", "refiner": "refiner"}
NOTHING = "mean of other cases"
"""What predicted Dice has to beat: the mean Dice of the cases it was calibrated on."""
PERCENTILES = (5, 95)


@dataclass(frozen=True)
class Quality:
    """How the results of a class are judged without a reference.

    Attributes:
        line: from predicted Dice to Dice.
        ratios: 5th and 95th percentile of true over predicted volume; None without cases.
        n: cases with a predicted volume.
    """

    line: Line
    ratios: tuple[float, float] | None
    n: int


@dataclass(frozen=True)
class Measured:
    """Everything measured on N cases; see the modules that measure it.

    Attributes:
        n: cases.
        stage_one: Dice (N, R).
        offsets: their choice, and the refined Dice.
        differences: of each class.
        keep: classes that keep stage one's decision.
        result: Dice (N, R) through offsets (cross-fitted) and gate.
        scalings: of every source, fitted on all cases.
        error_source: whose error map ships: the least log loss.
        dice_source: whose predicted Dice ships: the least mean absolute error.
        errors: scores of every source's error map, cross-fitted.
        dice: scores of every source's predicted Dice, of each class; of :data:`NOTHING` too.
        quality: of each class.
        found: wrong voxels of stage one that lie in the region.
        wrong: all of them.
        voxels: in the sample.
    """

    n: int
    stage_one: np.ndarray
    offsets: OffsetChoice
    differences: list[Paired]
    keep: list[int]
    result: np.ndarray
    scalings: dict[str, Scaling]
    error_source: str
    dice_source: str
    errors: dict[str, ErrorScores]
    dice: dict[str, list[DiceScores]]
    quality: list[Quality]
    found: int
    wrong: int
    voxels: int


@dataclass
class _First:
    """What the first pass keeps: numbers of every case, and some of its voxels, drawn with a seed of its name."""

    quota: int
    logits: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    truth: list[Tensor] = field(default_factory=list)
    tables: list[np.ndarray] = field(default_factory=list)
    stage_one: list[np.ndarray] = field(default_factory=list)
    found: int = 0
    wrong: int = 0

    def add(self, case: CaseVoxels, foreground: Foreground, candidates: Sequence[float]) -> None:
        available = case.refined.shape[1]
        rng = np.random.default_rng(zlib.crc32(case.name.encode()))
        chosen = torch.from_numpy(rng.choice(available, min(self.quota, available), replace=False))
        refined, stage_one = case.logits(foreground)
        self.logits.append((refined[..., chosen], stage_one[..., chosen]))
        self.truth.append(case.truth[..., chosen])
        self.tables.append(offset_table(case, foreground, candidates))
        self.stage_one.append(stage_one_dice(case, foreground))
        inside = int(case.errors(foreground).sum())
        self.found, self.wrong = self.found + inside, self.wrong + inside + case.outside_errors

    def of(self, which: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Refined and stage-one logits (1, H, N) and reference (1, R, N) of some cases."""
        indices = np.flatnonzero(which)
        parts = ([self.logits[i][0] for i in indices], [self.logits[i][1] for i in indices])
        return torch.cat(parts[0], -1), torch.cat(parts[1], -1), torch.cat([self.truth[i] for i in indices], -1)


def measure(cases: Cases, folds: Sequence[int], foreground: Foreground, flips: bool) -> Measured:
    """Measure everything.

    Args:
        cases: N of them, at least one.
        folds: of each case.
        foreground: meaning of the R channels.
        flips: whether the refiner has calibrated thresholds already; no offsets are then tried.

    Raises:
        RuntimeError: no case has a voxel in its doubtful region.
    """
    candidates = OFFSETS[:1] if flips else OFFSETS
    group, first = groups(folds), _First(max(SAMPLE // len(folds), 1))
    for case in cases():
        first.add(case, foreground, candidates)
    if not any(truth.shape[-1] for truth in first.truth):
        raise RuntimeError(
            f"No annotated voxel of the {len(folds)} case(s) is in doubt: stage one is sure everywhere, or finds "
            "nothing, so there is nothing to measure. Widen the region (nnUNetv2_diffrefine calibrate --everywhere), "
            "or leave the model uncalibrated."
        )
    stage_one = np.stack(first.stage_one)
    offsets = choose_offsets(cases, np.stack(first.tables), group, foreground, candidates)
    differences, keep = gated_classes(stage_one, offsets.refined)
    gates = {g: Gate(foreground, frozenset(keep), of) for g, of in offsets.by_group.items()}
    scalings = {name: _cross_fitted(first, group, foreground, use) for name, use in SCALED.items()}
    scalings |= {name: dict.fromkeys([-1, *group], identity(foreground, of)) for name, of in AS_THEY_ARE.items()}
    errors = {name: _error_scores(first, group, foreground, of) for name, of in scalings.items()}
    judged = [_judged(case, gates[int(g)], scalings) for case, g in zip(cases(), group, strict=True)]
    result = np.stack([j.dice for j in judged])
    dice_source, scores, quality = _predicted_dice(judged, result, group)
    return Measured(
        len(folds), stage_one, offsets, differences, keep, result, {name: of[-1] for name, of in scalings.items()},
        min(SCALED, key=lambda name: errors[name].log_loss), dice_source, errors, scores, quality,
        first.found, first.wrong, sum(t.shape[-1] for t in first.truth),
    )  # fmt: skip


def _predicted_dice(
    judged: Sequence[_Judged], result: np.ndarray, group: np.ndarray
) -> tuple[str, dict[str, list[DiceScores]], list[Quality]]:
    """The best source, the scores of all, and how the best one judges."""
    predicted = {
        name: {g: np.stack([j.predicted[name][g] for j in judged]) for g in of}
        for name, of in judged[0].predicted.items()
    }
    scores = {name: _dice_scores(values, result, group) for name, values in predicted.items()}
    best = min(scores, key=lambda name: sum(s.mae for s in scores[name]))
    nothing = {g: np.where(np.isfinite(values), 0.0, np.nan) for g, values in predicted[best].items()}
    scores[NOTHING] = _dice_scores(nothing, result, group)
    return best, scores, _quality(predicted[best][-1], result, np.stack([j.volumes for j in judged]))


def _cross_fitted(
    sample: _First, group: np.ndarray, foreground: Foreground, use: tuple[bool, bool]
) -> dict[int, Scaling]:
    """The scaling for the cases of each group, fitted on the others; under -1 the one fitted on all."""
    found = {-1: fit(*sample.of(np.ones_like(group, bool)), foreground, use)}
    for g in sorted(set(group)):
        others = group != g
        found[int(g)] = fit(*sample.of(others), foreground, use) if others.any() else identity(foreground, "stage_one")
    return found


def _error_scores(
    sample: _First, group: np.ndarray, foreground: Foreground, scalings: dict[int, Scaling]
) -> ErrorScores:
    probabilities, outcomes, doubts = [], [], []
    for g in sorted(set(group)):
        refined, stage_one, truth = sample.of(group == g)
        prior = foreground.probabilities(stage_one)
        error = error_of(scalings[int(g)](refined, stage_one, foreground), prior, foreground)
        probabilities.append(error[0].numpy())
        doubts.append(error_of(prior, prior, foreground)[0].numpy())
        outcomes.append((foreground.decide(stage_one) != truth).any(1)[0].numpy())
    return error_scores(np.concatenate(probabilities), np.concatenate(outcomes), np.concatenate(doubts))


@dataclass(frozen=True)
class _Judged:
    """Of a case: Dice (R,), predicted Dice (R,) by source and scaling, volumes in voxels (2, R), true and predicted."""

    dice: np.ndarray
    predicted: dict[str, dict[int, np.ndarray]]
    volumes: np.ndarray


def _judged(case: CaseVoxels, gate: Gate, scalings: dict[str, dict[int, Scaling]]) -> _Judged:
    foreground = gate.foreground
    refined, stage_one = case.logits(foreground)
    decided = foreground.exported(foreground.decide(gate(refined, stage_one)))
    sums = case.sums(decided)

    def predicted(scaling: Scaling) -> np.ndarray:
        q = scaling(refined, stage_one, foreground)
        soft = q.sum((0, 2)).double().numpy() + case.outside[3]
        overlap = (q * decided).sum((0, 2)).double().numpy() + case.outside[4]
        return predicted_dice(soft, sums[1], overlap)

    found = {}
    for name, of in scalings.items():
        once = {id(scaling): predicted(scaling) for scaling in {id(s): s for s in of.values()}.values()}
        found[name] = {g: once[id(scaling)] for g, scaling in of.items()}
    return _Judged(dice(sums), found, sums[[2, 1]])


def _dice_scores(predicted: dict[int, np.ndarray], true: np.ndarray, group: np.ndarray) -> list[DiceScores]:
    return [dice_scores({g: p[:, c] for g, p in predicted.items()}, true[:, c], group) for c in range(true.shape[1])]


def _quality(predicted: np.ndarray, true: np.ndarray, volumes: np.ndarray) -> list[Quality]:
    found = []
    for c in range(true.shape[1]):
        known = np.isfinite(predicted[:, c])
        ratios = volumes[known, 0, c] / np.maximum(volumes[known, 1, c], 1)
        limits = tuple(float(x) for x in np.percentile(ratios, PERCENTILES)) if len(ratios) else None
        found.append(Quality(fit_line(predicted[known, c], true[known, c]), limits, int(known.sum())))  # type: ignore[arg-type]
    return found
