"""Medical image files, read with SimpleITK: their headers, their values, and what readers let pass without a word."""

from __future__ import annotations

import gzip
import json
import math
import re
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import SimpleITK as sitk

SPACING_TOLERANCE = 1e-4  # mm
ORIGIN_TOLERANCE = 1e-2  # of a voxel; NIfTI stores single precision
DIRECTION_TOLERANCE = 1e-3  # of a cosine; quaternions in NIfTI headers are that coarse near half turns
CHUNK = 1 << 20
FLOATS = {16: "f4", 64: "f8"}
"""NIfTI's codes of floating point types."""
TIFF = (".tif", ".tiff")


@dataclass(frozen=True)
class Header:
    """Size in voxels, spacing and origin in mm, direction cosines, in the order x, y, z."""

    size: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    direction: tuple[float, ...]

    @property
    def diagonal(self) -> float:
        """Distance in mm between the outer corners of the image."""
        return float(np.linalg.norm(np.multiply(self.size, self.spacing)))

    def differences(self, other: Header) -> list[str]:
        """In what the ``other`` differs from this, and by how much; [] if in nothing."""
        found = []
        if self.size != other.size:
            more = tuple(b - a for a, b in zip(self.size, other.size, strict=True))
            found.append(f"shape {other.size} instead of {self.size} voxels, by {more}")
        for name, unit, tolerance in (
            ("spacing", " mm", SPACING_TOLERANCE),
            ("origin", " mm", ORIGIN_TOLERANCE * min(self.spacing)),
            ("direction", "", DIRECTION_TOLERANCE),
        ):
            ours, theirs = getattr(self, name), getattr(other, name)
            by = float(np.abs(np.subtract(ours, theirs)).max())
            if not by <= tolerance:  # written so that NaN is a difference
                shown = [tuple(float(f"{value:.6g}") for value in values) for values in (theirs, ours)]
                found.append(f"{name} {shown[0]} instead of {shown[1]}{unit}, by up to {by:.4g}{unit}")
        return found


def read_header(file: Path, *twins: Path) -> Header:
    """Read the header of an image or label map.

    TIFF files hold no spacing in mm. It is read from ``CASE.json`` beside ``CASE.tif`` or ``CASE_0000.tif``, where
    nnU-Net's ``Tiff3DIO`` keeps it.

    Args:
        file: image or label map.
        twins: files on the same grid, whose ``CASE.json`` counts where a TIFF file has none of its own.

    Raises:
        ValueError: unreadable, not 3D with one value a voxel, or a TIFF file without spacing.
    """
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(file))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise _unreadable(file, error) from error
    if reader.GetDimension() != 3 or reader.GetNumberOfComponents() != 1:
        raise ValueError(
            f"{file} has {reader.GetDimension()} axes and {reader.GetNumberOfComponents()} value(s) a voxel; wanted a "
            "3D volume with one. 2D and 4D images cannot be used."
        )
    spacing = _tiff_spacing((file, *twins)) if file.suffix.lower() in TIFF else reader.GetSpacing()
    return Header(reader.GetSize(), spacing, reader.GetOrigin(), reader.GetDirection())


def _tiff_spacing(files: Sequence[Path]) -> tuple[float, ...]:
    """Spacing in the order x, y, z, of the first file that has a ``CASE.json``; there it is in that of array axes."""
    stems = [(file, re.sub(r"_\d{4}$", "", file.stem)) for file in files]
    beside = [file.with_name(f"{name}.json") for file, case in stems for name in dict.fromkeys((file.stem, case))]
    found = next((sidecar for sidecar in beside if sidecar.is_file()), None)
    wanted = 'wanted {"spacing": [z, y, x]} in mm, as nnU-Net keeps it'
    if found is None:
        raise ValueError(
            f"{files[0]} has no spacing, so nothing can be said in mm: TIFF files hold none, and there is no "
            f"{files[0].with_name(stems[0][1])}.json beside it; {wanted}. Write one for each case."
        )
    try:
        spacing = json.loads(found.read_text(encoding="utf-8"))["spacing"]
        z, y, x = (float(step) for step in spacing)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{found} is not what nnU-Net keeps beside a TIFF file ({error!r}); {wanted}.") from error
    if not all(0 < step < math.inf for step in (x, y, z)):
        raise ValueError(f"{found} has spacing {spacing}; {wanted}, each above 0.")
    return x, y, z


def read_array(file: Path) -> np.ndarray:
    """The values of an image or label map (D, H, W), axes z, y, x, in the type they are stored in.

    Raises:
        ValueError: unreadable, or as :func:`refuse_damaged`.
    """
    refuse_damaged(file)
    try:
        return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
    except RuntimeError as error:
        raise _unreadable(file, error) from error


def read_labels(file: Path) -> np.ndarray:
    """The label map (D, H, W), axes z, y, x, as int32.

    Raises:
        ValueError: as :func:`read_array`, or values that are not whole numbers.
    """
    array = read_array(file)
    if not np.issubdtype(array.dtype, np.integer):
        wrong = array[~(np.isfinite(array) & (array == np.rint(array)))]
        if wrong.size:
            raise ValueError(
                f"{file} holds {wrong.size} values that are no labels, such as {wrong[0]}; wanted whole numbers. "
                "Is it an image, or a label map that was resampled with interpolation?"
            )
    return array.astype(np.int32)


def refuse_damaged(file: Path) -> None:
    """Read a NIfTI file to its end; formats whose readers complain by themselves are left to them.

    SimpleITK takes what a truncated NIfTI file lacks as zeros, and NaN and infinity in it as 0, without a word.

    Raises:
        ValueError: it is truncated or damaged, or holds values that are not finite.
    """
    if not file.name.endswith((".nii", ".nii.gz")):
        return
    try:
        with cast(BinaryIO, gzip.open(file) if file.suffix == ".gz" else open(file, "rb")) as stream:
            missing, bad = _read_through(stream)
    except (EOFError, zlib.error, OSError) as error:
        raise ValueError(f"{file} cannot be read, it is truncated or damaged: {error}") from error
    if missing:
        raise ValueError(f"{file} cannot be read, it is truncated: its last {missing} bytes are missing.")
    if bad:
        raise ValueError(f"{file} holds {bad} NaN or infinite values, which would be read as 0. Mend the file.")


def _read_through(stream: BinaryIO) -> tuple[int, int]:
    """Number of bytes that a NIfTI-1 file lacks, and of its values that are not finite.

    Header fields: https://nifti.nimh.nih.gov/pub/dist/src/niftilib/nifti1.h
    """
    start = stream.read(348)
    order = {struct.pack(f"{sign}i", 348): sign for sign in "<>"}.get(start[:4])
    left, kind, bad = 0, None, 0
    if order and start[344:347] == b"n+1":
        axes, *sizes = struct.unpack_from(f"{order}8h", start, 40)
        code, bits = struct.unpack_from(f"{order}2h", start, 70)
        (offset,) = struct.unpack_from(f"{order}f", start, 108)
        left = max(math.prod(sizes[: max(axes, 0)]), 0) * bits // 8
        kind = f"{order}{FLOATS[code]}" if code in FLOATS else None
        stream.read(int(offset) - len(start) if len(start) < offset < 1 << 30 else 0)
    while chunk := stream.read(CHUNK):
        if kind:
            values = np.frombuffer(chunk[:left], kind, len(chunk[:left]) // int(kind[-1]))
            bad += values.size - int(np.isfinite(values).sum())
        left = max(left - len(chunk), 0)
    return left, bad


def _unreadable(file: Path, error: RuntimeError) -> ValueError:
    return ValueError(
        f"{file} cannot be read: {str(error).strip().splitlines()[-1]}"
    )  # the line that says what is wrong
