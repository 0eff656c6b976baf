"""All metrics of one case."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from nnunet_diffrefine.evaluation.cases import Case
from nnunet_diffrefine.evaluation.classes import Classes
from nnunet_diffrefine.evaluation.definitions import nsd
from nnunet_diffrefine.evaluation.lesions import LesionRule, lesion_scores
from nnunet_diffrefine.evaluation.masks import dice, iou
from nnunet_diffrefine.evaluation.policy import POLICIES, Emptiness, EmptyPolicy, emptiness
from nnunet_diffrefine.evaluation.surface import surface_distances
from nnunet_diffrefine.image_files import read_labels

MM3_PER_ML = 1000.0


@dataclass(frozen=True)
class Settings:
    """What the numbers depend on besides the masks.

    Args:
        tolerances: of NSD, in mm, above 0 and each once.
        policy: name of the empty policy, a key of :data:`POLICIES`.
        lesions: the lesion rule's parameters.
    """

    tolerances: tuple[float, ...] = (1.0, 2.0)
    policy: str = "nnunet"
    lesions: LesionRule = field(default_factory=LesionRule)

    def __post_init__(self) -> None:
        good = all(t > 0 and math.isfinite(t) for t in self.tolerances)
        names = {nsd(t).name for t in self.tolerances}  # tolerances that print alike would share a name
        if not good or len(names) < len(self.tolerances):
            raise ValueError(f"--tolerances are {[*self.tolerances]}; wanted millimetres above 0, each once.")
        if self.policy not in POLICIES:
            raise ValueError(f"--empty is {self.policy!r}; wanted one of {', '.join(POLICIES)}.")


@dataclass(frozen=True)
class CaseResult:
    """Values of one case, ``values[class][metric]``, and which masks were empty, ``empty[class]``."""

    name: str
    values: dict[str, dict[str, float]]
    empty: dict[str, Emptiness]


def evaluate_case(case: Case, classes: Classes, settings: Settings) -> CaseResult:
    """Read a case and measure every class.

    Voxels with the ignore label in the reference are background in both masks.

    Raises:
        ValueError: a file cannot be read, or holds a value that is not in ``dataset.json``.
    """
    reference, prediction = read_labels(case.reference), read_labels(case.prediction)
    ignored = () if classes.ignore is None else (classes.ignore,)
    _refuse_unknown(case.reference, reference, classes.values.union(ignored))
    if classes.ignore is not None:
        prediction[reference == classes.ignore] = 0
        reference[reference == classes.ignore] = 0
    _refuse_unknown(case.prediction, prediction, classes.values)
    ours, theirs = classes.masks(reference), classes.masks(prediction)
    spacing = case.header.spacing[::-1]
    values = {name: measure(ours[name], theirs[name], spacing, settings, case.header.diagonal) for name in ours}
    empty = {name: emptiness(int(ours[name].sum()), int(theirs[name].sum())) for name in ours}
    return CaseResult(case.name, values, empty)


def measure(
    reference: np.ndarray, prediction: np.ndarray, spacing: tuple[float, ...], settings: Settings, diagonal: float
) -> dict[str, float]:
    """All metrics of two boolean masks (D, H, W) by name, see :func:`definitions.metrics`; NaN is no value.

    Args:
        reference: the truth.
        prediction: what is judged.
        spacing: mm, in the order of the axes.
        settings: tolerances, empty policy and lesion rule.
        diagonal: of the image in mm, for the empty policy.
    """
    voxel = math.prod(spacing) / MM3_PER_ML
    true, predicted = np.count_nonzero(reference), np.count_nonzero(prediction)
    lesions = lesion_scores(reference, prediction, spacing, settings.lesions)
    return {
        **_overlap_and_distances(reference, prediction, spacing, settings, diagonal),
        "volume_error": (predicted - true) * voxel,
        "relative_volume_error": 100 * (predicted - true) / true if true else math.nan,
        "lesion_Dice": lesions.dice,
        "lesion_HD95": lesions.hd95,
        "lesions_missed": lesions.missed,
        "lesions_false": lesions.false,
        "lesions_reference": lesions.lesions,
        "reference_volume": true * voxel,
    }


def _overlap_and_distances(
    reference: np.ndarray, prediction: np.ndarray, spacing: tuple[float, ...], settings: Settings, diagonal: float
) -> dict[str, float]:
    """Dice, IoU, HD95, NSD and ASSD, or what the policy says of empty masks."""
    surfaces = [nsd(tolerance).name for tolerance in settings.tolerances]
    empty = emptiness(int(reference.sum()), int(prediction.sum()))
    if empty != "neither":
        overlap, distance = _by_policy(POLICIES[settings.policy], empty, diagonal)
        return {**dict.fromkeys(["Dice", "IoU", *surfaces], overlap), **dict.fromkeys(["HD95", "ASSD"], distance)}
    found = surface_distances(reference, prediction, spacing)
    return {
        "Dice": dice(reference, prediction),
        "IoU": iou(reference, prediction),
        "HD95": found.hd95,
        **{name: found.nsd(tolerance) for name, tolerance in zip(surfaces, settings.tolerances, strict=True)},
        "ASSD": found.assd,
    }


def _by_policy(policy: EmptyPolicy, empty: Emptiness, diagonal: float) -> tuple[float, float]:
    if empty == "both":
        return policy.both_overlap, policy.both_distance
    return 0.0, diagonal if policy.one_distance is None else policy.one_distance


def _refuse_unknown(file: object, labels: np.ndarray, known: Iterable[int]) -> None:
    if unknown := sorted(set(np.unique(labels).tolist()) - set(known)):
        raise ValueError(f"{file} holds label(s) {unknown}; dataset.json has {sorted(known)}.")
