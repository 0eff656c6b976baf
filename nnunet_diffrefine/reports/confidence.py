"""Stage one's own confidence, from the probabilities beside its label maps: what an error map has to beat."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from nnunet_diffrefine.evaluation.classes import Classes

TOLERANCE = 1e-3
"""Of probabilities, which may be stored in half precision."""


def find_probabilities(folder: Path, cases: Sequence[str], dataset_json: Path) -> dict[str, Path]:
    """nnU-Net's ``CASE.npz`` of each case; {} if there are none, or if the dataset's reader turns images.

    Raises:
        ValueError: only some of the cases have one.
    """
    reader = str(json.loads(Path(dataset_json).read_text(encoding="utf-8")).get("overwrite_image_reader_writer"))
    there = {file.name: file for file in folder.iterdir() if file.suffix == ".npz"}
    found = {case: there[f"{case}.npz"] for case in cases if f"{case}.npz" in there}
    if "Reorient" in reader or not found:
        return {}
    if missing := [case for case in cases if case not in found]:
        raise ValueError(
            f"-s {folder} has probabilities (.npz) of some cases, but not of {len(missing)} such as {missing[0]}; "
            "wanted all or none. Predict these again with --save_probabilities, or take all .npz away."
        )
    return found


def own_doubt(file: Path, masks: Mapping[str, np.ndarray], classes: Classes) -> np.ndarray:
    """Probability (D, H, W) that stage one is wrong, as it says itself: 1 less that of the class it decided for.

    Regions: the largest |probability - decision| of any.

    Args:
        file: nnU-Net's probabilities.
        masks: of each class (D, H, W), what stage one decided.
        classes: of the data set.

    Raises:
        ValueError: unreadable, or not probabilities of these classes on this grid.
    """
    shape = next(iter(masks.values())).shape
    if classes.regions:
        p = _read(file, (len(masks), *shape))
        return np.max([np.abs(p[i] - masks[c.name]) for i, c in enumerate(classes.evaluated)], axis=0)
    p = _read(file, (1 + len(masks), *shape))
    doubt = 1 - p[0]
    for channel, c in zip(p[1:], sorted(classes.evaluated, key=lambda c: c.values), strict=True):
        doubt[masks[c.name]] = 1 - channel[masks[c.name]]
    return doubt


def _read(file: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Probabilities of a shape (channels, D, H, W) as float32 in [0, 1]."""
    try:
        with np.load(file, allow_pickle=False) as content:
            p = content["probabilities"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} cannot be read as nnU-Net's probabilities: {error}. Predict it again.") from error
    if p.shape != shape:
        raise ValueError(f"{file} has shape {p.shape}; dataset.json and the label map beside it want {shape}.")
    low, high = float(p.min()), float(p.max())
    if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):  # written so that NaN is wrong
        raise ValueError(f"{file} holds values from {low:g} to {high:g}; wanted probabilities, from 0 to 1.")
    return p.astype(np.float32).clip(0, 1)
