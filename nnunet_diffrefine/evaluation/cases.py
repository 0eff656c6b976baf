"""Which reference belongs to which prediction, and whether they can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunet_diffrefine.image_files import Header, read_header

SHOWN = 5


@dataclass(frozen=True)
class Case:
    """A reference, its prediction and their common header."""

    name: str
    reference: Path
    prediction: Path
    header: Header


@dataclass(frozen=True)
class Pairing:
    """The cases to evaluate, and the references that have no prediction."""

    cases: tuple[Case, ...]
    without_prediction: tuple[str, ...]


def pair_cases(reference_folder: Path, prediction_folder: Path, file_ending: str, chill: bool = False) -> Pairing:
    """Pair the label maps of two folders by name and compare their headers; files of another ending are skipped.

    Args:
        reference_folder: label maps, one a case.
        prediction_folder: label maps of the same names.
        file_ending: such as ``.nii.gz``.
        chill: allow references without a prediction, as ``--chill`` of nnUNetv2_evaluate_folder does.

    Raises:
        ValueError: unpaired cases, no case, a file that cannot be read, or geometries that differ.
        FileNotFoundError: a folder does not exist.
    """
    references = _label_maps(Path(reference_folder), file_ending)
    predictions = _label_maps(Path(prediction_folder), file_ending)
    missing = sorted(references.keys() - predictions.keys())
    _refuse_unpaired([] if chill else missing, sorted(predictions.keys() - references.keys()), references, predictions)
    if not predictions:
        raise ValueError(f"There is no *{file_ending} in {prediction_folder}; nothing to evaluate.")
    cases, faults = [], []
    for name in sorted(predictions):
        files = (references[name], predictions[name])
        ours, theirs = read_header(*files), read_header(*files[::-1])
        if found := ours.differences(theirs):
            faults.append(f"{name}: {'; '.join(found)}")
        cases.append(Case(name, references[name], predictions[name], ours))
    if faults:
        raise ValueError(
            f"{len(faults)} of {len(cases)} predictions do not lie on their reference's grid, having\n  "
            + _shown(faults, "\n  ")
            + "\nPredict in the geometry of the original images, or resample the prediction onto the reference."
        )
    return Pairing(tuple(cases), tuple(missing))


def _label_maps(folder: Path, file_ending: str) -> dict[str, Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder.")
    files = (f for f in folder.iterdir() if f.name.endswith(file_ending) and not f.name.startswith("."))
    return {file.name.removesuffix(file_ending): file for file in files if file.is_file()}


def _refuse_unpaired(missing: list[str], extra: list[str], references: dict, predictions: dict) -> None:
    if not missing and not extra:
        return
    parts = []
    if missing:
        parts.append(f"{len(missing)} of {len(references)} references have no prediction: {', '.join(missing)}.")
    if extra:
        parts.append(f"{len(extra)} of {len(predictions)} predictions have no reference: {', '.join(extra)}.")
    if missing and not extra:
        parts.append("--chill evaluates the predictions there are.")
    raise ValueError(" ".join(parts))


def _shown(items: Sequence[str], separator: str) -> str:
    more = f"{separator}and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return separator.join(items[:SHOWN]) + more
