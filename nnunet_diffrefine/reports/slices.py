"""The slice of a case that a report shows, cut out as a radiologist views it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from nnunet_diffrefine.reports.volumes import (
    CaseFiles,
    Volumes,
    ignored,
    read_image,
    read_map,
    read_masks,
    to_lps,
    wrong_voxels,
)

PLANES = ("axial", "coronal", "sagittal")
SIDES = (("R", "A"), ("R", "S"), ("A", "S"))
"""What is on the left and on top of each plane."""
ANISOTROPIC = 1.5
"""From this ratio of spacings on, the plane is the one that was acquired."""
MARGIN = 12.0
SMALLEST = 48.0
"""Margin about the structures and smallest side of the cut-out, both in mm."""
Masks = dict[str, np.ndarray]


@dataclass(frozen=True)
class Slice:
    """A slice; all images are (rows, columns) of the same shape.

    Args:
        channels: name and image of each.
        reference: mask of each class.
        stage_one: the same.
        refined: the same.
        ignored: voxels that are not scored.
        error_map: probability in [0, 1], or None.
        uncertainty: spread, or None.
        spacing: mm between rows and between columns.
        plane: axial, coronal or sagittal.
        index: of the slice, from 1, and how many there are.
        sides: letters of what is on the left and on top.
        windows: darkest and brightest value shown of each channel.
    """

    channels: tuple[tuple[str, np.ndarray], ...]
    reference: Masks
    stage_one: Masks
    refined: Masks
    ignored: np.ndarray
    error_map: np.ndarray | None
    uncertainty: np.ndarray | None
    spacing: tuple[float, float]
    plane: str
    index: tuple[int, int]
    sides: tuple[str, str]
    windows: tuple[tuple[float, float], ...]

    @property
    def wrong_before(self) -> np.ndarray:
        """Where stage one is wrong in any class."""
        return wrong_voxels(self.reference, self.stage_one, self.ignored)

    @property
    def wrong_after(self) -> np.ndarray:
        """Where the refined mask is wrong in any class."""
        return wrong_voxels(self.reference, self.refined, self.ignored)


def read_slice(files: CaseFiles, volumes: Volumes) -> Slice:
    """The slice on which most voxels are wrong before or after refinement; without errors, that with most foreground.

    Raises:
        ValueError: a file cannot be read or holds values that it must not.
    """
    assert files.refined is not None, "pictures are drawn only with refined masks"
    masks = [read_masks(file, volumes.classes) for file in (files.reference, files.stage_one, files.refined)]
    ignore = ignored(files.reference, volumes.classes)
    ignore = np.zeros_like(next(iter(masks[0].values()))) if ignore is None else ignore
    errors = wrong_voxels(masks[0], masks[1], ignore) | wrong_voxels(masks[0], masks[2], ignore)
    wrong, spacing = to_lps(errors, files.header)
    present, _ = to_lps(np.any(list(masks[0].values()), axis=0), files.header)
    axis, index = find_plane(wrong if wrong.any() else present, spacing)

    def cut(volume: np.ndarray) -> np.ndarray:
        plane = np.take(to_lps(volume, files.header)[0], index, axis)
        return plane if axis == 0 else plane[::-1]  # superior on top

    reference, stage_one, refined = ({name: cut(mask) for name, mask in found.items()} for found in masks)
    rest = [s for i, s in enumerate(spacing) if i != axis]
    return Slice(
        channels=tuple((name, cut(read_image(f))) for name, f in zip(volumes.channels, files.images, strict=True)),
        reference=reference,
        stage_one=stage_one,
        refined=refined,
        ignored=cut(ignore),
        error_map=None if files.error_map is None else cut(read_map(files.error_map, largest=1)),
        uncertainty=None if files.uncertainty is None else cut(read_map(files.uncertainty)),
        spacing=(rest[0], rest[1]),
        plane=PLANES[axis],
        index=(index + 1, wrong.shape[axis]),
        sides=SIDES[axis],
        windows=(),
    )


def find_plane(shown: np.ndarray, spacing: Sequence[float]) -> tuple[int, int]:
    """Axis and index of the slice with most voxels of a mask (D, H, W).

    The axis is that of the thickest slices, or the first, axial, if voxels are nearly cubes.
    """
    axis = int(np.argmax(spacing)) if max(spacing) >= ANISOTROPIC * min(spacing) else 0
    counts = shown.sum(tuple(i for i in range(3) if i != axis))
    return axis, int(np.argmax(counts))


def crop_box(shown: Slice) -> tuple[slice, slice]:
    """A square about all structures and errors on the slice, as far as the slice reaches."""
    masks = [*shown.reference.values(), *shown.stage_one.values(), *shown.refined.values()]
    inside = np.any(masks, axis=0)
    if not inside.any():
        return slice(0, inside.shape[0]), slice(0, inside.shape[1])
    ends = [np.flatnonzero(inside.any(1 - axis))[[0, -1]] for axis in (0, 1)]
    sides = [(end[1] - end[0] + 1) * s for end, s in zip(ends, shown.spacing, strict=True)]
    side = max(SMALLEST, max(sides) + 2 * MARGIN)
    box = []
    for axis, (end, s) in enumerate(zip(ends, shown.spacing, strict=True)):
        length = min(inside.shape[axis], round(side / s))
        start = round((end[0] + end[1] + 1) / 2 - length / 2)
        start = min(max(0, start), inside.shape[axis] - length)
        box.append(slice(start, start + length))
    return box[0], box[1]


def cropped(shown: Slice, box: tuple[slice, slice]) -> Slice:
    """The slice cut to a box, with the window of each channel: its 0.5th and 99.5th percentile inside the box."""

    def cut(masks: Masks) -> Masks:
        return {name: mask[box] for name, mask in masks.items()}

    channels = tuple((name, image[box]) for name, image in shown.channels)
    limits = [np.percentile(image, (0.5, 99.5)) for _, image in channels]
    return replace(
        shown,
        channels=channels,
        reference=cut(shown.reference),
        stage_one=cut(shown.stage_one),
        refined=cut(shown.refined),
        ignored=shown.ignored[box],
        error_map=None if shown.error_map is None else shown.error_map[box],
        uncertainty=None if shown.uncertainty is None else shown.uncertainty[box],
        windows=tuple((float(low), float(high)) for low, high in limits),
    )
