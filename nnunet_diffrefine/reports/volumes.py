"""The files of each case for pictures and calibration, checked before any work and read in patient orientation."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_diffrefine.evaluation.classes import Classes, read_classes
from nnunet_diffrefine.image_files import Header, read_array, read_header, read_labels
from nnunet_diffrefine.reports.confidence import find_probabilities

SHOWN = 5


@dataclass(frozen=True)
class Folders:
    """Folders of images and maps, files named by case; None is not given.

    Args:
        references: label maps (``-gt``).
        stage_one: label maps of the baseline, with or without ``CASE.npz`` (``-s``).
        dataset_json: nnU-Net's, for channels, classes, ignore label and file ending.
        images: nnU-Net's images, ``CASE_0000`` and so on (``-i``).
        refined: label maps of the other system (``-r``).
        error_maps: a 3D image a case: probability in [0, 1] that stage one is wrong in any class there.
        uncertainty: a 3D image a case: spread, 0 or more.
    """

    references: Path
    stage_one: Path
    dataset_json: Path
    images: Path | None = None
    refined: Path | None = None
    error_maps: Path | None = None
    uncertainty: Path | None = None

    @property
    def pictures(self) -> bool:
        """Whether pictures of cases can be drawn."""
        return self.images is not None and self.refined is not None


@dataclass(frozen=True)
class CaseFiles:
    """A case's files and their common header, that of the reference; probabilities are stage one's."""

    header: Header
    images: tuple[Path, ...]
    reference: Path
    stage_one: Path
    refined: Path | None
    error_map: Path | None
    uncertainty: Path | None
    probabilities: Path | None = None


@dataclass(frozen=True)
class Volumes:
    """What the folders hold: the data set's channels and classes, and the files of each case."""

    channels: tuple[str, ...]
    classes: Classes
    cases: dict[str, CaseFiles]


def find_volumes(folders: Folders, cases: Iterable[str]) -> Volumes:
    """Find the files of all cases and compare their headers; further files in the folders are skipped.

    Raises:
        ValueError: cases without a file, files that are no 3D images, or not on their reference's grid.
        OSError: a folder or ``dataset.json`` is missing.
    """
    cases = sorted(cases)
    classes = read_classes(folders.dataset_json)
    channels = _channels(folders.dataset_json)
    ending = classes.file_ending
    found = {
        "-gt": _pick(folders.references, "-gt", cases, ending),
        "-s": _pick(folders.stage_one, "-s", cases, ending),
        "-r": _pick(folders.refined, "-r", cases, ending),
        "--error_maps": _pick(folders.error_maps, "--error_maps", cases, ending),
        "--uncertainty": _pick(folders.uncertainty, "--uncertainty", cases, ending),
    }
    if folders.error_maps is not None:
        found["npz"] = find_probabilities(folders.stage_one, cases, folders.dataset_json)
    images = [_pick(folders.images, "-i", cases, f"_{c:04d}{ending}") for c in range(len(channels))]
    files = {}
    for case in cases:
        shown = tuple(channel[case] for channel in images if channel)
        reference, stage_one = found["-gt"][case], found["-s"][case]
        rest = (found.get(key, {}).get(case) for key in ("-r", "--error_maps", "--uncertainty", "npz"))
        header = read_header(reference, stage_one)
        files[case] = CaseFiles(header, shown, reference, stage_one, *rest)
    _refuse_other_grids(files)
    return Volumes(channels, classes, files)


def _channels(dataset_json: Path) -> tuple[str, ...]:
    names = json.loads(Path(dataset_json).read_text(encoding="utf-8")).get("channel_names")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{dataset_json} lacks channel_names; wanted nnU-Net's dataset.json (version 2).")
    return tuple(str(names[key]) for key in sorted(names, key=int))


def _pick(folder: Path | None, option: str, cases: Sequence[str], ending: str) -> dict[str, Path]:
    """The file of each case. Names are looked up in a listing: they come from a table and must not lead elsewhere."""
    if folder is None:
        return {}
    if not folder.is_dir():
        raise FileNotFoundError(f"{option} {folder} is not a folder.")
    there = {file.name: file for file in folder.iterdir() if file.is_file()}
    if missing := [case for case in cases if f"{case}{ending}" not in there]:
        raise ValueError(
            f"{option} {folder} lacks CASE{ending} for {len(missing)} of {len(cases)} cases of the tables: "
            f"{_listed(missing)}."
        )
    return {case: there[f"{case}{ending}"] for case in cases}


def _refuse_other_grids(cases: dict[str, CaseFiles]) -> None:
    faults = []
    for case in cases.values():
        twins = (case.reference, case.stage_one)  # maps of TIFF datasets have no CASE.json of their own
        for file in (*case.images, case.stage_one, case.refined, case.error_map, case.uncertainty):
            if file is not None and (differences := case.header.differences(read_header(file, *twins))):
                faults.append(f"{file}: {'; '.join(differences)}")
    if faults:
        raise ValueError(
            f"{len(faults)} files do not lie on their reference's grid, having\n  " + "\n  ".join(faults[:SHOWN])
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def read_image(file: Path) -> np.ndarray:
    """A channel (D, H, W) as float32; what is not finite becomes the smallest finite value.

    Raises:
        ValueError: unreadable or damaged.
    """
    image = read_array(file).astype(np.float32)
    finite = np.isfinite(image)
    return image if finite.all() else np.where(finite, image, image[finite].min(initial=0))


def read_map(file: Path, largest: float = np.inf) -> np.ndarray:
    """An error map or uncertainty (D, H, W) as float32, values from 0 to ``largest``.

    Raises:
        ValueError: unreadable or damaged, or values outside the range, NaN among them.
    """
    values = read_array(file).astype(np.float32)
    wrong = ~((values >= 0) & (values <= largest + 1e-4))  # written so that NaN is wrong; rounding of stored maps
    if wrong.any():
        raise ValueError(
            f"{file} holds {int(wrong.sum())} values such as {values[wrong][0]:g}; wanted "
            + (f"0 to {largest:g}." if np.isfinite(largest) else "0 or more.")
        )
    return np.minimum(values, np.float32(largest))


def read_masks(file: Path, classes: Classes) -> dict[str, np.ndarray]:
    """The boolean mask (D, H, W) of each class.

    Raises:
        ValueError: unreadable or damaged, or no label map.
    """
    return classes.masks(read_labels(file))


def ignored(reference: Path, classes: Classes) -> np.ndarray | None:
    """Where the reference carries the ignore label, (D, H, W); None if the data set has none."""
    return None if classes.ignore is None else read_labels(reference) == classes.ignore


def wrong_voxels(
    reference: dict[str, np.ndarray], prediction: dict[str, np.ndarray], ignore: np.ndarray | None = None
) -> np.ndarray:
    """Where the masks of any class differ (D, H, W), ignored voxels left out."""
    wrong = np.any([mask ^ prediction[name] for name, mask in reference.items()], axis=0)
    return wrong if ignore is None else wrong & ~ignore


def to_lps(array: np.ndarray, header: Header) -> tuple[np.ndarray, tuple[float, float, float]]:
    """Turn a volume (D, H, W) so that its axes run to superior, posterior and left, as nearly as they can.

    Returns:
        The volume and its spacing in mm, in the order of the axes. Row and column of an axial slice then run as
        radiologists view them: anterior above, the patient's right on the left.
    """
    image = sitk.GetImageFromArray(array.astype(np.uint8) if array.dtype == bool else array)
    image.SetSpacing(header.spacing)
    image.SetDirection(header.direction)
    turned = sitk.DICOMOrient(image, "LPS")
    x, y, z = turned.GetSpacing()
    return sitk.GetArrayFromImage(turned).astype(array.dtype), (z, y, x)
