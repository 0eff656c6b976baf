"""Lesion-wise Dice and HD95 by the rule of the BraTS 2023 challenges, written from its description.

Source: "BraTS 2023 Lesion-Wise Performance Metrics", github.com/rachitsaluja/BraTS-2023-Metrics (README).
Every step and where the later challenges differ: docs/metrics.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from nnunet_diffrefine.evaluation.masks import dice, grown, joint_box
from nnunet_diffrefine.evaluation.surface import surface_distances

MISSED_HD95 = 374.0
"""Millimetres counted for a missed lesion or a false positive: the diagonal of a BraTS image, 240 x 240 x 155 mm."""
NEIGHBOURS_26 = ndimage.generate_binary_structure(3, 3)
NEIGHBOURS_18 = ndimage.generate_binary_structure(3, 2)


@dataclass(frozen=True)
class LesionRule:
    """Parameters of the rule; the defaults are those for gliomas (also used for children and sub-Saharan Africa).

    Args:
        dilation: how often the reference is dilated by its 18-neighbourhood before components are formed.
        minimum_volume: reference lesions of at most this many mm3 are not scored.
    """

    dilation: int = 3
    minimum_volume: float = 50.0

    def __post_init__(self) -> None:
        if self.dilation < 0:
            raise ValueError(f"--lesion_dilation is {self.dilation}; wanted 0 or more.")
        if not (self.minimum_volume >= 0 and math.isfinite(self.minimum_volume)):
            raise ValueError(f"--lesion_min_volume is {self.minimum_volume}; wanted 0 mm3 or more.")


@dataclass(frozen=True)
class LesionScores:
    """Lesion-wise scores of one case and class.

    Args:
        dice: mean over lesions and false positives, in [0, 1]; 1 if there is neither.
        hd95: the same in mm; 0 if there is neither.
        lesions: reference lesions scored.
        missed: how many of them no predicted component touches.
        false: predicted components that touch no lesion, not even one too small to be scored.
    """

    dice: float
    hd95: float
    lesions: int
    missed: int
    false: int


def lesion_scores(
    reference: np.ndarray, prediction: np.ndarray, spacing: Sequence[float], rule: LesionRule
) -> LesionScores:
    """Score two boolean masks (D, H, W) lesion by lesion; ``spacing`` in mm, in the order of the axes."""
    if not reference.any() and not prediction.any():
        return LesionScores(1.0, 0.0, 0, 0, 0)
    everything = grown(joint_box(reference, prediction), rule.dilation)
    reference, prediction = reference[everything], prediction[everything]
    components, n_components = ndimage.label(prediction, NEIGHBOURS_26)
    scored: list[tuple[float, float]] = []
    touched: set[int] = set()
    missed = 0
    lesions = _lesions(reference, rule.dilation)
    for number, box in enumerate(ndimage.find_objects(lesions), start=1):
        touching = _touching(lesions, number, box, components, rule.dilation)
        touched.update(touching)
        if (lesions[box] == number).sum() * math.prod(spacing) <= rule.minimum_volume:
            continue
        missed += not touching
        scored.append(
            _score(lesions == number, np.isin(components, touching), spacing) if touching else (0, MISSED_HD95)
        )
    false = n_components - len(touched)
    counted = len(scored) + false
    if not counted:
        return LesionScores(1.0, 0.0, 0, 0, 0)
    mean_dice = sum(d for d, _ in scored) / counted
    mean_hd95 = (sum(h for _, h in scored) + false * MISSED_HD95) / counted
    return LesionScores(float(mean_dice), float(mean_hd95), len(scored), missed, false)


def _lesions(reference: np.ndarray, dilation: int) -> np.ndarray:
    """Number each voxel of the reference (D, H, W) with its lesion: components that meet once dilated are one."""
    blobs, _ = ndimage.label(_dilated(reference, dilation), NEIGHBOURS_26)
    return np.where(reference, blobs, 0)


def _touching(lesions: np.ndarray, number: int, box: tuple[slice, ...], components: np.ndarray, by: int) -> list[int]:
    """The predicted components with a voxel in the dilated lesion."""
    around = grown(box, by)
    near = np.unique(components[around][_dilated(lesions[around] == number, by)])
    return [int(component) for component in near if component]


def _dilated(mask: np.ndarray, times: int) -> np.ndarray:
    # scipy takes 0 iterations for "until nothing changes"
    return ndimage.binary_dilation(mask, NEIGHBOURS_18, iterations=times) if times else mask


def _score(lesion: np.ndarray, prediction: np.ndarray, spacing: Sequence[float]) -> tuple[float, float]:
    box = joint_box(lesion, prediction)
    lesion, prediction = lesion[box], prediction[box]
    return dice(lesion, prediction), surface_distances(lesion, prediction, spacing).hd95
