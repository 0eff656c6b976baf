"""What a metric is worth when a mask is empty: a stated choice, because no formula says it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Emptiness = Literal["neither", "both", "reference", "prediction"]


@dataclass(frozen=True)
class EmptyPolicy:
    """Values for empty masks.

    Args:
        name: as given on the command line.
        both_overlap: Dice, IoU and NSD if reference and prediction are empty; NaN leaves the case out of means.
        both_distance: HD95 and ASSD in mm in that case.
        one_distance: HD95 and ASSD in mm if exactly one is empty; None is the length of the image's diagonal, which
            no distance inside the image exceeds.
        text: the policy in a sentence.

    Overlap is 0 under every policy if exactly one mask is empty.
    """

    name: str
    both_overlap: float
    both_distance: float
    one_distance: float | None
    text: str


POLICIES = {
    "nnunet": EmptyPolicy(
        "nnunet",
        math.nan,
        math.nan,
        None,
        "Both masks empty: no value, left out of means (as nnU-Net's Dice). One empty: overlap 0, distances the "
        "length of the image's diagonal.",
    ),
    "brats": EmptyPolicy(
        "brats",
        1.0,
        0.0,
        374.0,
        "Both masks empty: overlap 1, distances 0 mm. One empty: overlap 0, distances 374 mm (BraTS 2023).",
    ),
}


def emptiness(reference_voxels: int, prediction_voxels: int) -> Emptiness:
    """Which of the two masks is empty, given their numbers of voxels."""
    if reference_voxels and prediction_voxels:
        return "neither"
    if not reference_voxels and not prediction_voxels:
        return "both"
    return "prediction" if reference_voxels else "reference"
