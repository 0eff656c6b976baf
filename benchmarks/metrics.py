"""Dice and HD95 for the benchmarks, per case and class."""

from __future__ import annotations

import numpy as np
import torch
from monai.metrics import compute_hausdorff_distance

from nnunet_diffrefine.evaluation.policy import POLICIES, emptiness


def dice(prediction: np.ndarray, reference: np.ndarray) -> float:
    """Dice of two masks (D, H, W) in [0, 1]; NaN if both are empty."""
    total = prediction.sum() + reference.sum()
    return float("nan") if total == 0 else float(2 * (prediction & reference).sum() / total)


def hd95(prediction: np.ndarray, reference: np.ndarray, spacing: tuple[float, ...]) -> float:
    """HD95 of two masks (D, H, W) in mm: the larger of the two directed 95th percentiles (MONAI).

    Empty masks count as in ``evaluate`` (policy "nnunet"): the length of the image's diagonal if one is empty, so that
    a missed structure is no gain; NaN, which the tables leave out, if both are.
    """
    policy, empty = POLICIES["nnunet"], emptiness(int(reference.sum()), int(prediction.sum()))
    if empty == "both":
        return policy.both_distance
    if empty != "neither":
        return float(np.linalg.norm(np.multiply(prediction.shape, spacing)))
    as_batch = [torch.from_numpy(mask[None, None]) for mask in (prediction, reference)]
    value = compute_hausdorff_distance(
        *as_batch, include_background=True, percentile=95, spacing=list(map(float, spacing))
    )
    return float(value.max())


def change_quality(before: np.ndarray, after: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """How well the change from ``before`` to ``after``, masks (R, D, H, W), hits the errors of ``before``.

    A voxel is wrong, or has changed, if it is or has in any class or region.

    Returns:
        ``flip_precision``: share of changed voxels that are right now; ``flip_harm``: share that were right before;
        ``error_recall``: share of wrong voxels that are right now; ``error_dice``: Dice of changed and wrong voxels.
    """
    changed, wrong = (before != after).any(0), (before != reference).any(0)
    mended = changed & ~(after != reference).any(0)
    share = lambda part, whole: float(part.sum() / whole.sum()) if whole.any() else float("nan")  # noqa: E731
    return {
        "flip_precision": share(mended, changed),
        "flip_harm": share(changed & ~wrong, changed),
        "error_recall": share(mended, wrong),
        "error_dice": dice(changed, wrong),
    }
