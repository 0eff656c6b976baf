"""What background processes do with a case: read and preprocess it, and export and write what became of it."""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch

from nnunet_diffrefine.batch import Foreground
from nnunet_diffrefine.image_files import read_header
from nnunet_diffrefine.inference.files import CaseFiles, OutputFolder
from nnunet_diffrefine.inference.geometry import Geometry, corrected
from nnunet_diffrefine.inference.prediction import read_labels, read_prediction
from nnunet_diffrefine.inference.quality import Judge, case_file
from nnunet_diffrefine.inference.region import RegionSettings, doubtful_region

MAPS = ("uncertainty", "error_map")
"""Folders of the maps, so that the output folder itself holds nothing but nnU-Net's files."""


@dataclass(frozen=True)
class CaseWork:
    """What is the same for all cases.

    Attributes:
        geometry: of the model.
        foreground: meaning of the R channels.
        region: what is refined.
        soften: of label maps, see :func:`read_prediction`.
        output: where results go.
        save_probabilities: write nnU-Net's npz and pkl.
        maps: those of :data:`MAPS` that are wanted.
        judge: of the results.
    """

    geometry: Geometry
    foreground: Foreground
    region: RegionSettings
    soften: float
    output: OutputFolder
    save_probabilities: bool
    maps: tuple[str, ...]
    judge: Judge

    @property
    def ending(self) -> str:
        """File ending of images and label maps."""
        return str(self.geometry.dataset_json["file_ending"])

    def products(self, case: str) -> list[str]:
        """Names of all files of a finished case; the label map, written last, comes last."""
        soft = [f"{case}.npz", f"{case}.pkl"] if self.save_probabilities else []
        maps = (f"{name}/{case}{self.ending}" for name in self.maps)
        return [*maps, *soft, case_file(case), f"{case}{self.ending}"]

    def is_done(self, case: str) -> bool:
        """Whether every file of the case is there; files appear whole or not at all."""
        return all((self.output.folder / name).is_file() for name in self.products(case))


@dataclass(frozen=True)
class Prepared:
    """A case in preprocessed geometry.

    Attributes:
        case: its files.
        image: (C, D, H, W), normalised.
        prior: foreground probabilities (R, D, H, W).
        region: bool (D, H, W).
        properties: nnU-Net's.
    """

    case: CaseFiles
    image: np.ndarray
    prior: np.ndarray
    region: np.ndarray
    properties: dict[str, Any]


@dataclass(frozen=True)
class CaseResult:
    """What was done with a case.

    Attributes:
        case: name.
        windows: visited.
        all_windows: that nnU-Net would visit.
        region: share of the preprocessed voxels that were doubtful.
        changed: share of the original voxels whose label changed.
    """

    case: str
    windows: int
    all_windows: int
    region: float
    changed: float


def prepare(work: CaseWork, case: CaseFiles) -> Prepared:
    """Read, preprocess and find the doubtful region.

    Raises:
        ValueError: the image has values that are not finite, or see :func:`read_prediction`.
    """
    image, properties = work.geometry.preprocessed(case.images)
    if not np.isfinite(image).all():
        raise ValueError(f"The image of case {case.name} ({case.images[0].parent}) has NaN or infinite values.")
    prediction = read_prediction(case, work.geometry, work.soften)
    prior = work.geometry.forward(prediction.foreground, properties, image.shape[1:])
    region = doubtful_region(torch.from_numpy(prior), work.foreground, work.region).numpy()
    return Prepared(case, image, prior, region, properties)


@dataclass(frozen=True)
class Finished:
    """What the network made of a case, as arrays of preprocessed geometry.

    Attributes:
        case: its files.
        properties: nnU-Net's.
        prior: foreground probabilities (R, D, H, W).
        logits: refined (H, D, H, W), or None where nothing changed.
        maps: name of a map -> (D, H, W).
        dice: predicted Dice by class name.
    """

    case: CaseFiles
    properties: dict[str, Any]
    prior: np.ndarray
    logits: np.ndarray | None
    maps: dict[str, np.ndarray]
    dice: dict[str, float | None]


def finish(work: CaseWork, done: Finished) -> float:
    """Bring a case back to original geometry and write it; the share of voxels whose label changed."""
    geometry, name = work.geometry, done.case.name
    given, _ = read_labels(done.case.labels, geometry)
    labels, probabilities = given, None
    if work.save_probabilities:
        probabilities = read_prediction(done.case, geometry, work.soften).heads(work.foreground.exclusive)
    if done.logits is not None:
        before = work.foreground.logits(torch.from_numpy(done.prior)[None])[0].numpy()
        labels, probabilities = corrected(geometry, done.properties, before, done.logits, labels, probabilities)
    names = iter(work.products(name))
    for kind in work.maps:
        values = geometry.backward(done.maps[kind], done.properties)
        work.output.write(next(names), lambda file: write_map(values, (done.case.images[0], done.case.labels), file))  # noqa: B023
    if probabilities is not None:
        soft = probabilities
        work.output.write(next(names), lambda file: np.savez_compressed(file, probabilities=soft))
        work.output.write(next(names), lambda file: file.write_bytes(pickle.dumps(done.properties)))
    masks = {of: np.isin(labels, group) for of, group in zip(work.foreground.names, geometry.groups, strict=True)}
    voxel_ml = math.prod(done.properties["spacing"]) / 1000
    quality = work.judge.case(name, done.dice, masks, labels != given, voxel_ml)
    work.output.write(next(names), lambda file: file.write_text(quality.json()))
    work.output.write(next(names), lambda file: _write_labels(labels, done.properties, geometry, file))
    return quality.changed_share


def write_map(values: np.ndarray, like: Sequence[Path], file: Path) -> None:
    """Write a map (Z, Y, X) as 32-bit floats with the header of files on one grid, and read it back.

    Raises:
        OSError: the file is not what was written.
    """
    header = read_header(*like)
    image = sitk.GetImageFromArray(values.astype(np.float32))
    image.SetSpacing(header.spacing)
    image.SetOrigin(header.origin)
    image.SetDirection(header.direction)
    sitk.WriteImage(image, str(file), True)
    _require_same(sitk.GetArrayFromImage(sitk.ReadImage(str(file))), sitk.GetArrayFromImage(image), file)


def _write_labels(labels: np.ndarray, properties: dict[str, Any], geometry: Geometry, file: Path) -> None:
    geometry.reader.write_seg(labels, str(file), properties)
    _require_same(geometry.reader.read_seg(str(file))[0][0], labels, file)


def _require_same(read: np.ndarray, written: np.ndarray, file: Path) -> None:
    # Writers of images do not always notice a full disk.
    if not np.array_equal(read, written):
        raise OSError(f"{file} is incomplete after writing.")
