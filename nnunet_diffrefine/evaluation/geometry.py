"""Images with their geometry, read with SimpleITK, and whether two of them lie on the same grid."""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

SPACING_TOLERANCE = 1e-4  # mm
ORIGIN_TOLERANCE = 1e-2  # of a voxel; NIfTI stores single precision
DIRECTION_TOLERANCE = 1e-3  # of a cosine; quaternions in NIfTI headers are that coarse near half turns


@dataclass(frozen=True)
class Geometry:
    """Size in voxels, spacing and origin in mm, direction cosines, in the order x, y, z."""

    size: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    direction: tuple[float, ...]

    @property
    def diagonal(self) -> float:
        """Distance in mm between the outer corners of the image."""
        return float(np.linalg.norm(np.multiply(self.size, self.spacing)))

    def differences(self, other: Geometry) -> list[str]:
        """In what the ``other``, a prediction, differs from this, a reference, and by how much; [] if in nothing."""
        found = []
        if self.size != other.size:
            more = tuple(b - a for a, b in zip(self.size, other.size, strict=True))
            found.append(f"shape (reference {self.size}, prediction {other.size} voxels, by {more})")
        finest = min(self.spacing)
        for name, unit, tolerance in (
            ("spacing", " mm", SPACING_TOLERANCE),
            ("origin", " mm", ORIGIN_TOLERANCE * finest),
            ("direction", "", DIRECTION_TOLERANCE),
        ):
            ours, theirs = getattr(self, name), getattr(other, name)
            by = float(np.abs(np.subtract(ours, theirs)).max())
            if not by <= tolerance:  # written so that NaN is a difference
                shown = [tuple(float(f"{v:.6g}") for v in values) for values in (ours, theirs)]
                found.append(f"{name} (reference {shown[0]}, prediction {shown[1]}{unit}, by up to {by:.4g}{unit})")
        return found


def read_geometry(file: Path) -> Geometry:
    """Read the header of a label map.

    Raises:
        ValueError: unreadable, not 3D, or several channels.
    """
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(file))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise ValueError(f"{file} cannot be read: {_reason(error)}") from error
    if reader.GetDimension() != 3 or reader.GetNumberOfComponents() != 1:
        raise ValueError(
            f"{file} has {reader.GetDimension()} axes and {reader.GetNumberOfComponents()} value(s) a voxel; "
            "wanted a 3D label map with one."
        )
    return Geometry(reader.GetSize(), reader.GetSpacing(), reader.GetOrigin(), reader.GetDirection())


def read_labels(file: Path) -> np.ndarray:
    """The label map (D, H, W), axes z, y, x, as int32.

    Raises:
        ValueError: unreadable or truncated, or values that are not whole numbers.
    """
    if file.name.endswith(".gz"):
        _refuse_damaged(file)
    try:
        array = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
    except RuntimeError as error:
        raise ValueError(f"{file} cannot be read: {_reason(error)}") from error
    if not np.issubdtype(array.dtype, np.integer):
        wrong = array[~(np.isfinite(array) & (array == np.rint(array)))]
        if wrong.size:
            raise ValueError(
                f"{file} holds {wrong.size} values that are no labels, such as {wrong[0]}; wanted whole numbers. "
                "Is it an image, or a label map that was resampled with interpolation?"
            )
    return array.astype(np.int32)


def _refuse_damaged(file: Path) -> None:
    """Decompress to the end: SimpleITK reads what a truncated NIfTI file lacks as zeros, without a word."""
    try:
        with gzip.open(file) as stream:
            while stream.read(1 << 20):
                pass
    except (EOFError, zlib.error, OSError) as error:
        raise ValueError(f"{file} cannot be read, it is truncated or damaged: {error}") from error


def _reason(error: RuntimeError) -> str:
    """The last line of SimpleITK's message, which says what is wrong."""
    return str(error).strip().splitlines()[-1]
