"""Predictions that exist already, as priors: nnU-Net's probabilities, or label maps of any tool."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter

from nnunet_diffrefine.image_files import refuse_damaged
from nnunet_diffrefine.inference.files import CaseFiles
from nnunet_diffrefine.inference.geometry import Geometry

RANGE_TOLERANCE = 1e-3
SUM_TOLERANCE = 1e-2  # probabilities may be stored in half precision


@dataclass(frozen=True)
class Prediction:
    """A prediction in original geometry.

    Attributes:
        labels: (Z, Y, X), whole numbers.
        foreground: probabilities of the foreground channels, (R, Z, Y, X).
        given: all probabilities (H, Z, Y, X) of nnU-Net's npz, or None where there was none.
    """

    labels: np.ndarray
    foreground: np.ndarray
    given: np.ndarray | None = None

    def heads(self, exclusive: bool) -> np.ndarray:
        """Probabilities (H, Z, Y, X) as nnU-Net stores them."""
        if self.given is not None or not exclusive:
            return self.foreground if self.given is None else self.given
        return np.concatenate((1 - self.foreground.sum(0, keepdims=True), self.foreground)).clip(0, 1)


def read_prediction(case: CaseFiles, geometry: Geometry, soften: float = 0.0) -> Prediction:
    """Read a case's prediction.

    Args:
        case: its files.
        geometry: of the model.
        soften: standard deviation in mm of the Gaussian that turns labels into probabilities; 0 leaves 0 and 1.

    Raises:
        ValueError: unreadable, or not a prediction of the model's dataset.
    """
    labels, spacing = read_labels(case.labels, geometry)
    if case.probabilities is None:
        return Prediction(labels, from_labels(labels, geometry.groups, spacing, soften))
    p = _probabilities(case.probabilities, geometry, labels.shape)
    return Prediction(labels, p if geometry.labels.has_regions else p[1:], p)


def from_labels(labels: np.ndarray, groups: Sequence[Any], spacing: Sequence[float], soften: float) -> np.ndarray:
    """Foreground probabilities (R, Z, Y, X) of a label map (Z, Y, X): 0 and 1, or smoothed by ``soften`` mm."""
    channels = np.stack([np.isin(labels, group) for group in groups]).astype(np.float32)
    if soften > 0:
        sigma = [soften / step for step in spacing]
        channels = np.stack([gaussian_filter(channel, sigma, mode="nearest") for channel in channels])
    return channels


def read_labels(file: Path, geometry: Geometry) -> tuple[np.ndarray, Sequence[float]]:
    """Label map (Z, Y, X) and spacing in mm along these axes; raises as :func:`read_prediction` does."""
    refuse_damaged(file)
    try:
        read, properties = geometry.reader.read_seg(str(file))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    known = geometry.labels.all_labels
    values = np.unique(read[0])
    if unknown := [float(value) for value in values if value not in known]:
        raise ValueError(f"{file} holds labels {[f'{v:g}' for v in unknown[:5]]}, which are not in the dataset; its "
                         f"labels are {[int(label) for label in known]}.")  # fmt: skip
    return read[0].astype(np.uint8 if max(known) < 255 else np.uint16), properties["spacing"]


def _probabilities(file: Path, geometry: Geometry, shape: Sequence[int]) -> np.ndarray:
    """Probabilities (H, Z, Y, X), checked."""
    try:
        with np.load(file, allow_pickle=False) as content:
            p = content["probabilities"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} cannot be read as nnU-Net's probabilities: {error}. Predict it again.") from error
    heads = geometry.labels.num_segmentation_heads
    if p.ndim != 4 or p.shape[0] != heads:
        kind = "regions" if geometry.labels.has_regions else "classes with background"
        raise ValueError(f"{file} holds {(p.shape or (0,))[0]} channels; the model's dataset has {heads} {kind}.")
    if tuple(p.shape[1:]) != tuple(shape):
        raise ValueError(f"{file} has shape {p.shape[1:]}, its label map {tuple(shape)}. They are not of one case.")
    _check_values(file, p, exclusive=not geometry.labels.has_regions)
    return p.astype(np.float32, copy=False)


def _check_values(file: Path, p: np.ndarray, exclusive: bool) -> None:
    if not np.isfinite(p).all():
        raise ValueError(f"{file} holds {int((~np.isfinite(p)).sum())} NaN or infinite values.")
    low, high = float(p.min()), float(p.max())
    if low < -RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
        raise ValueError(
            f"{file} holds values from {low:.4g} to {high:.4g}; probabilities lie in [0, 1]. Are they logits?"
        )
    if exclusive:
        total = p.sum(0, dtype=np.float32)
        worst = float(np.abs(total - 1).max())
        if worst > SUM_TOLERANCE:
            raise ValueError(
                f"{file}: probabilities do not sum to 1, but are off by up to {worst:.4g}. Background comes first."
            )
