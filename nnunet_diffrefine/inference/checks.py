"""Bad input, refused before any work: arguments, folders, headers, and the content of predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from nnunet_diffrefine.image_files import read_header, refuse_damaged
from nnunet_diffrefine.inference.case_work import CaseWork
from nnunet_diffrefine.inference.files import CaseFiles, listed
from nnunet_diffrefine.inference.geometry import Geometry
from nnunet_diffrefine.inference.model import Model
from nnunet_diffrefine.inference.prediction import read_prediction
from nnunet_diffrefine.inference.request import Request

RECORD = "apply.json"
"""What the results of a folder were made with."""


def check_request(request: Request) -> None:
    """Refuse arguments that cannot be used, whatever the data.

    Raises:
        ValueError: says which.
    """
    if request.num_parts < 1 or not 0 <= request.part_id < request.num_parts:
        raise ValueError(f"-part_id is {request.part_id} of -num_parts {request.num_parts}; it must be from 0 to "
                         f"{max(request.num_parts, 1) - 1}.")  # fmt: skip
    for flag, value in (("-npp", request.npp), ("-nps", request.nps), ("--soften", request.soften)):
        if value < 0:
            raise ValueError(f"{flag} is {value}; it must be 0 or more.")
    if not request.folds or len(set(request.folds)) < len(request.folds):
        raise ValueError(f"-f is {list(request.folds)}; name every fold once.")
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if not available[request.device]:
        raise ValueError(f"-device is '{request.device}', but PyTorch finds no such device. Use -device cpu.")
    output, inputs = request.output.resolve(), {"-i": request.images, "-s": request.predictions}
    for flag, folder in inputs.items():
        if folder.resolve() == output:
            raise ValueError(f"-o is the folder of {flag}, {folder}; its files would be overwritten. Choose another.")
    if request.images.resolve() == request.predictions.resolve():
        raise ValueError(f"-i and -s are the same folder, {request.images}; images and predictions lie apart.")


def check_spread(request: Request, model: Model) -> None:
    """Uncertainty needs two predictions.

    Raises:
        ValueError: there is one.
    """
    if request.save_uncertainty and len(request.folds) * model.method.seeds < 2:
        raise ValueError("--save_uncertainty is the spread over samples and folds, and there is one of each (a "
                         "deterministic method draws one sample). Give more folds (-f) or --samples.")  # fmt: skip


def check_maps(work: CaseWork) -> None:
    """Maps are written with the header of the image, which readers that turn images do not keep.

    Raises:
        ValueError: the model's reader is such a one.
    """
    reader = type(work.geometry.reader).__name__
    if work.maps and "Reorient" in reader:
        raise ValueError(f"Maps cannot be saved with this dataset's reader {reader}, which turns images.")


def check_record(work: CaseWork, record: dict[str, Any]) -> None:
    """A folder that holds results was begun with the same settings, whether it is continued or done again.

    What an older version did not record is unknown, and not compared.

    Raises:
        ValueError: it was not, or nothing says with what.
    """
    folder, file = work.output.folder, work.output.folder / RECORD
    if not file.is_file():
        if strange := sorted(f.name for f in folder.glob(f"*{work.ending}")):
            raise ValueError(f"{folder} (-o) holds {len(strange)} label map(s) but no {RECORD}, so they are of "
                             f"something else: {listed(strange)}. Choose a new or empty -o.")  # fmt: skip
        return
    try:
        earlier = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}). Choose another -o.") from error
    if other := [key for key, value in record.items() if earlier.get(key, value) != value]:
        shown = "; ".join(f"{key} was {earlier[key]}, is now {record[key]}" for key in other)
        raise ValueError(f"{folder} (-o) was begun with other settings: {shown}. Use the same, or another -o.")


def check_headers(case: CaseFiles) -> None:
    """Image channels and prediction lie on one grid.

    Raises:
        ValueError: they do not; says in what and by how much.
    """
    first = read_header(case.images[0], case.labels)
    for file in (*case.images[1:], case.labels):
        if found := first.differences(read_header(file, case.labels, case.images[0])):
            raise ValueError(f"{file} does not lie on the grid of {case.images[0]}: {'; '.join(found)}.")


def check_dataset(predictions: Path, dataset_json: dict[str, Any]) -> None:
    """The ``dataset.json`` that nnU-Net leaves beside predictions has the model's labels.

    Raises:
        ValueError: it has others.
    """
    file = predictions / "dataset.json"
    if not file.is_file():
        return
    theirs, ours = json.loads(file.read_text()).get("labels"), dataset_json["labels"]
    if theirs != ours:
        raise ValueError(f"{predictions} holds predictions of another dataset: labels {theirs}; the model has {ours}.")


def check_content(case: CaseFiles, geometry: Geometry) -> None:
    """Images are whole; labels and probabilities are such as :func:`read_prediction` can use.

    Raises:
        ValueError: they are not.
    """
    for file in case.images:
        refuse_damaged(file)
    read_prediction(case, geometry)
