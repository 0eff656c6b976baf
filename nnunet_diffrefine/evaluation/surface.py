"""Distances between the surfaces of two masks: HD95, NSD, ASSD.

The surfaces are those of DeepMind's surface-distance (Nikolov et al., arXiv 1809.04430), which is also what the BraTS
2023 evaluation uses. Only masks with foreground are handed to it: its release fails on empty ones with NumPy 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import surface_distance

from nnunet_diffrefine.evaluation.masks import joint_box


@dataclass(frozen=True)
class SurfaceDistances:
    """Distances in mm from each surface element of one mask to the other mask's surface, and the elements' areas.

    Args:
        to_prediction: from the reference's surface (N,), ascending.
        to_reference: from the prediction's surface (M,), ascending.
        area_reference: mm2 (N,), in the order of ``to_prediction``.
        area_prediction: mm2 (M,), in the order of ``to_reference``.
    """

    to_prediction: np.ndarray
    to_reference: np.ndarray
    area_reference: np.ndarray
    area_prediction: np.ndarray

    @property
    def hd95(self) -> float:
        """The larger of the two directed 95th percentiles of area, in mm."""
        return float(surface_distance.compute_robust_hausdorff(self._as_library(), 95))

    @property
    def assd(self) -> float:
        """Area-weighted mean distance in mm over both surfaces together."""
        moments = self.to_prediction @ self.area_reference + self.to_reference @ self.area_prediction
        return float(moments / (self.area_reference.sum() + self.area_prediction.sum()))

    def nsd(self, tolerance: float) -> float:
        """Share in [0, 1] of both surfaces' area that lies within ``tolerance`` mm of the other surface."""
        return float(surface_distance.compute_surface_dice_at_tolerance(self._as_library(), tolerance))

    def _as_library(self) -> dict[str, np.ndarray]:
        return {
            "distances_gt_to_pred": self.to_prediction,
            "distances_pred_to_gt": self.to_reference,
            "surfel_areas_gt": self.area_reference,
            "surfel_areas_pred": self.area_prediction,
        }


def surface_distances(reference: np.ndarray, prediction: np.ndarray, spacing: Sequence[float]) -> SurfaceDistances:
    """Distances between the surfaces of two boolean masks (D, H, W); ``spacing`` in mm, in the order of the axes.

    A mask that reaches the border of the image has a surface there.

    Raises:
        ValueError: a mask is empty: decide by a policy what that is worth, before measuring.
    """
    if not reference.any() or not prediction.any():
        raise ValueError("An empty mask has no surface; apply an empty policy first.")
    box = joint_box(reference, prediction)
    spacing = [float(s) for s in spacing]
    found = surface_distance.compute_surface_distances(
        np.ascontiguousarray(reference[box]), np.ascontiguousarray(prediction[box]), spacing
    )
    return SurfaceDistances(
        found["distances_gt_to_pred"],
        found["distances_pred_to_gt"],
        found["surfel_areas_gt"],
        found["surfel_areas_pred"],
    )
