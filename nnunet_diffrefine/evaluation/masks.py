"""Boxes around masks, and overlap."""

from __future__ import annotations

import numpy as np

Box = tuple[slice, ...]


def joint_box(*masks: np.ndarray) -> Box:
    """The smallest box that holds the foreground of all boolean masks (D, H, W); at least one has some."""
    occupied = masks[0]
    for mask in masks[1:]:
        occupied = occupied | mask
    box = []
    for axis in range(occupied.ndim):
        others = tuple(a for a in range(occupied.ndim) if a != axis)
        indices = np.flatnonzero(occupied.any(axis=others))
        box.append(slice(int(indices[0]), int(indices[-1]) + 1))
    return tuple(box)


def grown(box: Box, margin: int) -> Box:
    """``box`` with ``margin`` voxels on every side; ends beyond the image are cut by indexing, as NumPy does."""
    return tuple(slice(max(0, s.start - margin), s.stop + margin) for s in box)


def dice(reference: np.ndarray, prediction: np.ndarray) -> float:
    """Dice in [0, 1] of two boolean masks of one shape, not both empty."""
    return float(2 * np.count_nonzero(reference & prediction) / (reference.sum() + prediction.sum()))


def iou(reference: np.ndarray, prediction: np.ndarray) -> float:
    """Intersection over union in [0, 1] of two boolean masks of one shape, not both empty."""
    return float(np.count_nonzero(reference & prediction) / np.count_nonzero(reference | prediction))
