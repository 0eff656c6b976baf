"""Cases in folders of images and predictions, their headers, and files that appear whole or not at all."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

SPACING_TOLERANCE = 1e-4  # mm
ORIGIN_TOLERANCE = 1e-2  # of a voxel; NIfTI stores single precision
DIRECTION_TOLERANCE = 1e-3  # of a cosine; quaternions in NIfTI headers are that coarse near half turns


@dataclass(frozen=True)
class CaseFiles:
    """Input files of a case.

    Attributes:
        name: of the case, without channel and file ending.
        images: one a channel.
        labels: the prediction's label map.
        probabilities: the prediction's npz, or None where there are only labels.
    """

    name: str
    images: tuple[Path, ...]
    labels: Path
    probabilities: Path | None


def find_cases(images: Path, predictions: Path, ending: str, channels: int) -> list[CaseFiles]:
    """The cases of both folders, sorted.

    Raises:
        ValueError: a folder is missing or empty, a case is in one of them only, a channel or an npz is missing.
    """
    for flag, folder in (("-i", images), ("-s", predictions)):
        if not folder.is_dir():
            raise ValueError(f"{flag} is {folder}, which is no folder.")
    pattern = re.compile(rf"(.+)_(\d{{4}}){re.escape(ending)}")
    found: dict[str, set[int]] = {}
    for match in filter(None, (pattern.fullmatch(file.name) for file in images.iterdir())):
        found.setdefault(match[1], set()).add(int(match[2]))
    predicted = {f.name.removesuffix(ending) for f in predictions.iterdir() if f.name.endswith(ending)}
    _require_pairs(set(found), predicted, images, predictions, ending)
    if wrong := sorted(case for case, has in found.items() if has != set(range(channels))):
        has = sorted(found[wrong[0]])
        raise ValueError(
            f"The model needs {channels} channel(s), _0000 to _{channels - 1:04d}, but {len(wrong)} case(s) in "
            f"{images} have others: {listed(wrong)}. {wrong[0]} has {has}."
        )
    soft = {f.name.removesuffix(".npz") for f in predictions.glob("*.npz")} & set(found)
    if soft and (without := sorted(set(found) - soft)):
        raise ValueError(f"{predictions} has probabilities (.npz) of some cases but not of: {listed(without)}. "
                         "Predict these again with --save_probabilities, or take all .npz away.")  # fmt: skip
    return [
        CaseFiles(
            case,
            tuple(images / f"{case}_{channel:04d}{ending}" for channel in range(channels)),
            predictions / f"{case}{ending}",
            predictions / f"{case}.npz" if case in soft else None,
        )
        for case in sorted(found)
    ]


def _require_pairs(found: set[str], predicted: set[str], images: Path, predictions: Path, ending: str) -> None:
    if not found:
        raise ValueError(f"{images} has no images named CASE_0000{ending}, as nnU-Net wants them.")
    if only := sorted(found - predicted):
        raise ValueError(f"{len(only)} case(s) have an image but no prediction CASE{ending} in {predictions}: "
                         f"{listed(only)}.")  # fmt: skip
    if only := sorted(predicted - found):
        raise ValueError(f"{len(only)} prediction(s) have no image CASE_0000{ending} in {images}: {listed(only)}.")


def listed(names: Sequence[str], most: int = 10) -> str:
    """Names for a message, at most ``most`` of them."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# Geometry


@dataclass(frozen=True)
class Header:
    """Size in voxels, spacing and origin in mm, direction cosines, in the order x, y, z."""

    size: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    direction: tuple[float, ...]

    def differences(self, other: Header) -> list[str]:
        """In what the ``other`` differs from this, and by how much; [] if in nothing."""
        found = []
        if self.size != other.size:
            by = tuple(b - a for a, b in zip(self.size, other.size, strict=True))
            found.append(f"shape {other.size} instead of {self.size} voxels, by {by}")
        for name, unit, tolerance in (
            ("spacing", " mm", SPACING_TOLERANCE),
            ("origin", " mm", ORIGIN_TOLERANCE * min(self.spacing)),
            ("direction", "", DIRECTION_TOLERANCE),
        ):
            ours, theirs = getattr(self, name), getattr(other, name)
            by_ = float(np.abs(np.subtract(ours, theirs)).max())
            if not by_ <= tolerance:  # written so that NaN is a difference
                shown = [tuple(float(f"{value:.6g}") for value in values) for values in (theirs, ours)]
                found.append(f"{name} {shown[0]} instead of {shown[1]}{unit}, by up to {by_:.4g}{unit}")
        return found


def read_header(file: Path) -> Header:
    """Read the header of an image or label map.

    Raises:
        ValueError: unreadable, or not 3D with one value a voxel.
    """
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(file))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise ValueError(f"{file} cannot be read: {str(error).strip().splitlines()[-1]}") from error
    if reader.GetDimension() != 3 or reader.GetNumberOfComponents() != 1:
        raise ValueError(
            f"{file} has {reader.GetDimension()} axes and {reader.GetNumberOfComponents()} value(s) a voxel; wanted a "
            "3D volume with one. 2D and 4D images cannot be refined."
        )
    return Header(reader.GetSize(), reader.GetSpacing(), reader.GetOrigin(), reader.GetDirection())


def refuse_damaged(file: Path) -> None:
    """Decompress to the end: readers take what a truncated NIfTI file lacks as zeros, without a word.

    Raises:
        ValueError: it is truncated or damaged.
    """
    if file.suffix != ".gz":
        return
    try:
        with gzip.open(file) as stream:
            while stream.read(1 << 20):
                pass
    except (EOFError, zlib.error, OSError) as error:
        raise ValueError(f"{file} is truncated or damaged: {error}") from error


# Writing


class OutputFolder:
    """Files that appear under their final name only once they are complete.

    They are written into a hidden folder inside and moved, so a process may be killed at any moment.

    Args:
        folder: made if it is not there.
        part: name of the process, where several share the folder.

    Raises:
        ValueError: nothing can be written there.
    """

    def __init__(self, folder: Path, part: str = "") -> None:
        self.folder = folder
        self.partial = folder / f".partial{part}"

    def begin(self) -> None:
        """Make the folders; what a killed process left half done is removed."""
        try:
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)
            (self.partial / "probe").touch()
        except OSError as error:
            raise ValueError(f"Nothing can be written into {self.folder}: {error}. Choose another -o.") from error

    def end(self) -> None:
        """Remove the hidden folder."""
        shutil.rmtree(self.partial, ignore_errors=True)

    def write(self, name: str, write: Callable[[Path], Any]) -> None:
        """Let ``write`` make a file, then give it its ``name`` (which may have a folder in it).

        Raises:
            OSError: it could not be written completely.
        """
        final, temporary = self.folder / name, self.partial / Path(name).name
        try:
            write(temporary)
        except (OSError, RuntimeError) as error:
            temporary.unlink(missing_ok=True)
            raise OSError(f"{final} could not be written; is the disk full? {error}") from error
        final.parent.mkdir(exist_ok=True)
        os.replace(temporary, final)

    def write_json(self, name: str, values: Any) -> None:  # noqa: ANN401 (anything JSON can hold)
        """Write a JSON file."""
        self.write(name, lambda file: file.write_text(json.dumps(values, indent=2, default=str)))
