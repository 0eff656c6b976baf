"""Is the error map right? Reliability, calibration error and AUROC of predicted error probabilities.

Beside the map stands what it has to beat: stage one's own confidence, and the spread of samples and folds. A spread is
no probability; it can only be judged by its order, that is by AUROC.

ECE is that of Naeini et al. (AAAI 2015) and Guo et al. (arXiv 1706.04599) for binary events, over voxels: with bins b
of equal width, sum_b (n_b / N) |mean probability in b - share of wrong voxels in b|.

Nearly all voxels of a scan are far from any structure, certainly right and given a probability of 0, so numbers over
all voxels look good whatever the map says. The same numbers are therefore also given for a band about stage one's
surface, which depends on neither the map nor the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from nnunet_diffrefine.reports.confidence import own_doubt
from nnunet_diffrefine.reports.volumes import CaseFiles, Volumes, ignored, read_map, read_masks, wrong_voxels

BINS = 10
FINE = 1000
"""Bins of the histogram that AUROC is computed from; a multiple of ``BINS``."""
BAND = 5.0
"""Half the width of the band in mm."""
MAP, OWN, SPREAD = "error map", "stage one's own confidence", "uncertainty (spread)"
"""What is judged; each says where stage one is wrong."""


@dataclass(frozen=True)
class Histogram:
    """Counts of voxels by predicted probability in ``FINE`` bins of equal width.

    Args:
        n: voxels (FINE,).
        wrong: of these, voxels where stage one is wrong (FINE,).
        probability: sum of their probabilities (FINE,).
        squares: sum of (probability - wrong)^2, one number.
    """

    n: np.ndarray
    wrong: np.ndarray
    probability: np.ndarray
    squares: float

    def __add__(self, other: Histogram) -> Histogram:
        return Histogram(
            self.n + other.n,
            self.wrong + other.wrong,
            self.probability + other.probability,
            self.squares + other.squares,
        )

    def coarse(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Voxels, mean probability and share of wrong voxels in each of ``BINS`` bins (BINS,); NaN in empty bins."""
        n, wrong, probability = (
            values.reshape(BINS, -1).sum(1).astype(float) for values in (self.n, self.wrong, self.probability)
        )
        with np.errstate(invalid="ignore"):
            return n, probability / n, wrong / n

    @property
    def ece(self) -> float:
        """Expected calibration error in [0, 1]."""
        n, probability, share = self.coarse()
        return float(np.nansum(n * np.abs(probability - share)) / n.sum())

    @property
    def brier(self) -> float:
        """Mean squared difference between probability and outcome, in [0, 1]."""
        return self.squares / float(self.n.sum())

    @property
    def auroc(self) -> float | None:
        """Probability that a wrong voxel has the larger value than a right one, ties (of a fine bin) half.

        None if all voxels are wrong or none is.
        """
        wrong, right = self.wrong.astype(float), (self.n - self.wrong).astype(float)
        if not wrong.sum() or not right.sum():
            return None
        below = np.cumsum(right) - right
        return float((wrong * (below + right / 2)).sum() / (wrong.sum() * right.sum()))


@dataclass(frozen=True)
class Reliability:
    """Error maps against stage one's true errors, pooled over voxels of all cases.

    Args:
        everywhere: all voxels, ignored ones left out.
        band: those within ``BAND`` mm of stage one's surface.
        by_case: the band, case by case.
    """

    everywhere: Histogram
    band: Histogram
    by_case: tuple[Histogram, ...]

    @property
    def share_in_band(self) -> float | None:
        """Share of all wrong voxels that the band holds; None if no voxel is wrong."""
        total = int(self.everywhere.wrong.sum())
        return int(self.band.wrong.sum()) / total if total else None


def histogram(probability: np.ndarray, wrong: np.ndarray) -> Histogram:
    """Histogram of probabilities in [0, 1] and outcomes, both of any one shape."""
    p, y = probability.ravel().astype(np.float64), wrong.ravel()
    place = np.minimum((p * FINE).astype(np.int64), FINE - 1)
    n = np.bincount(place, minlength=FINE)
    return Histogram(
        n,
        np.bincount(place[y], minlength=FINE),
        np.bincount(place, weights=p, minlength=FINE),
        float(((p - y) ** 2).sum()),
    )


def measure(volumes: Volumes) -> dict[str, Reliability]:
    """Compare with the errors of stage one, over all cases: error maps and what there is of ``OWN`` and ``SPREAD``.

    Raises:
        ValueError: a map holds values outside its range, or a file cannot be read.
    """
    found: dict[str, list[tuple[Histogram, Histogram]]] = {}
    for case in volumes.cases.values():
        for name, pair in _measure_case(case, volumes).items():
            found.setdefault(name, []).append(pair)
    result = {}
    for name, pairs in found.items():
        everywhere, bands = zip(*pairs, strict=True)
        result[name] = Reliability(_sum(everywhere), _sum(bands), bands)
    return result


def _sum(parts: Sequence[Histogram]) -> Histogram:
    total = parts[0]
    for part in parts[1:]:
        total += part
    return total


def _measure_case(files: CaseFiles, volumes: Volumes) -> dict[str, tuple[Histogram, Histogram]]:
    """Histograms of all voxels and of those in the band."""
    assert files.error_map is not None, "measured only where error maps are given"
    reference = read_masks(files.reference, volumes.classes)
    prediction = read_masks(files.stage_one, volumes.classes)
    ignore = ignored(files.reference, volumes.classes)
    wrong = wrong_voxels(reference, prediction, ignore)
    scored = np.ones_like(wrong) if ignore is None else ~ignore
    near = scored & surface_band(list(prediction.values()), files.header.spacing[::-1])
    given = {MAP: read_map(files.error_map, largest=1)}
    if files.probabilities is not None:
        given[OWN] = own_doubt(files.probabilities, prediction, volumes.classes)
    if files.uncertainty is not None:
        given[SPREAD] = 1 - 1 / (1 + read_map(files.uncertainty))  # into [0, 1], the order is kept
    return {
        name: (histogram(values[scored], wrong[scored]), histogram(values[near], wrong[near]))
        for name, values in given.items()
    }


def surface_band(masks: Sequence[np.ndarray], spacing: Sequence[float]) -> np.ndarray:
    """Voxels (D, H, W) within ``BAND`` mm of a border voxel of any mask; spacing in mm, in the order of the axes."""
    border = np.zeros_like(masks[0])
    for mask in masks:
        border |= mask & ~ndimage.binary_erosion(mask, border_value=1)
    if not border.any():
        return border
    reach = [int(np.ceil(BAND / s)) for s in spacing]
    extent = ndimage.find_objects(border.astype(np.uint8))[0]
    box = tuple(slice(max(0, s.start - r), s.stop + r) for s, r in zip(extent, reach, strict=True))
    band = np.zeros_like(border)
    band[box] = ndimage.distance_transform_edt(~border[box], sampling=[*spacing]) <= BAND
    return band
