"""nnU-Net's splits, as out-of-fold priors need them: every case held out by exactly one fold."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_diffrefine.paths import StageOneId, splits_file
from nnunet_diffrefine.stage_one.mending import export_command, listed, train_commands

Splits = Sequence[Mapping[str, Sequence[str]]]

FOLD_ALL = (
    "Fold 'all' trains on every case, so none of its predictions is out-of-fold and a refiner would learn from errors "
    "that are too small. Train and export the folds of the cross-validation instead"
)


class LeakError(RuntimeError):
    """Priors that are not, or cannot be shown to be, out-of-fold; the message says what mends it."""


def read_json(path: Path, mend: str) -> Any:  # noqa: ANN401 (whatever the file holds)
    """Read a JSON file.

    Raises:
        RuntimeError: it is missing or broken; the message ends with ``mend``.
    """
    if not path.is_file():
        raise RuntimeError(f"{path} does not exist. {mend}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RuntimeError(f"{path} is no valid JSON ({error}). {mend}") from error


def read_splits(dataset: str, stage_one: StageOneId) -> list[dict[str, list[str]]]:
    """Read ``splits_final.json``.

    Raises:
        RuntimeError: it is missing, or not a list of folds with ``train`` and ``val``.
    """
    path = splits_file(dataset)
    mend = f"nnU-Net writes it when a fold is trained: {train_commands(dataset, stage_one, [0])}"
    splits = read_json(path, mend)
    if not (isinstance(splits, list) and splits and all(_is_fold(fold) for fold in splits)):
        raise RuntimeError(f"{path} is no list of folds, each with lists 'train' and 'val'. Restore it, or: {mend}")
    return splits


def _is_fold(fold: object) -> bool:
    return isinstance(fold, dict) and all(isinstance(fold.get(part), list) for part in ("train", "val"))


def check_splits(dataset: str, stage_one: StageOneId, splits: Splits) -> None:
    """Every case is in exactly one validation set, and no fold trains on a case it validates.

    Raises:
        LeakError: otherwise; the message lists the cases.
    """
    mend = (
        f"Give each case exactly one validation set in {splits_file(dataset)}, then train and export again: "
        f"{train_commands(dataset, stage_one, range(len(splits)))}; {export_command(dataset, stage_one)}"
    )
    if both := {case for fold in splits for case in set(fold["val"]).intersection(fold["train"])}:
        raise LeakError(f"Case(s) {listed(both)} are in the training and the validation set of the same fold. {mend}")
    held_out = Counter(case for fold in splits for case in set(fold["val"]))
    if twice := {case for case, folds in held_out.items() if folds > 1}:
        raise LeakError(
            f"Case(s) {listed(twice)} are in the validation sets of several folds, so it is unclear which fold's "
            f"prediction is meant. {mend}"
        )
    if never := {case for fold in splits for case in fold["train"]} - held_out.keys():
        raise LeakError(f"Case(s) {listed(never)} are in no fold's validation set, so no fold held them out. {mend}")
