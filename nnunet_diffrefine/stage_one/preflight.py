"""Checks before any prediction: an export that could not finish, or would leak, stops here and says what mends it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nnunet_diffrefine.paths import StageOneId, fold_folder, model_folder, preprocessed_dataset, splits_file
from nnunet_diffrefine.stage_one.fingerprint import (
    file_sha256,
    preprocessing_sha256,
    resolve_configuration,
    splits_sha256,
)
from nnunet_diffrefine.stage_one.manifest import ChannelRecord, FoldRecord, ForegroundRecord, Manifest
from nnunet_diffrefine.stage_one.mending import export_command, listed, train_commands
from nnunet_diffrefine.stage_one.residual import synthesised_channel
from nnunet_diffrefine.stage_one.splits import FOLD_ALL, LeakError, check_splits, read_json, read_splits


@dataclass(frozen=True)
class Sources:
    """What an export is made from, as read from disk.

    Attributes:
        dataset: name of the dataset.
        stage_one: the trained model.
        plans: the model folder's plans.
        dataset_json: the model folder's ``dataset.json``.
        splits: nnU-Net's splits.
        checkpoint_name: file name of the checkpoints.
    """

    dataset: str
    stage_one: StageOneId
    plans: dict[str, Any]
    dataset_json: dict[str, Any]
    splits: list[dict[str, list[str]]]
    checkpoint_name: str

    @property
    def settings(self) -> dict[str, Any]:
        """The resolved configuration."""
        return resolve_configuration(self.plans, self.stage_one.configuration)

    @property
    def channel(self) -> ChannelRecord | None:
        """The synthesised channel, or None for a segmentation."""
        return synthesised_channel(self.settings)

    @property
    def data_folder(self) -> Path:
        """The folder of the preprocessed cases."""
        return preprocessed_dataset(self.dataset) / self.settings["data_identifier"]

    def checkpoint(self, fold: int) -> Path:
        """The checkpoint of a fold."""
        return fold_folder(self.dataset, self.stage_one, fold) / self.checkpoint_name


def read_sources(dataset: str, stage_one: StageOneId, checkpoint_name: str) -> Sources:
    """Read plans, ``dataset.json`` and splits, and check that they belong together and can be exported.

    Raises:
        ValueError: the configuration does not exist, is 2D, or is the second stage of a cascade.
        LeakError: the splits do not hold out each case exactly once.
        RuntimeError: a file is missing or broken, or the dataset was planned anew after the training.
    """
    base, model = preprocessed_dataset(dataset), model_folder(dataset, stage_one)
    plan = f"Plan and preprocess the dataset: nnUNetv2_plan_and_preprocess -d {dataset}"
    if not base.is_dir():
        raise RuntimeError(f"Dataset {dataset} is not preprocessed: {base} does not exist. {plan}")
    now = read_json(base / f"{stage_one.plans}.json", f"Check -p, or: {plan}")
    train = f"Train stage one: {train_commands(dataset, stage_one, ['FOLD'])}"
    if not (model / "plans.json").is_file():
        _check_configuration(now, stage_one)
    splits = read_splits(dataset, stage_one)
    check_splits(dataset, stage_one, splits)
    plans, then = read_json(model / "plans.json", train), read_json(model / "dataset.json", train)
    _check_configuration(plans, stage_one)
    retrain = f"Preprocess and train it again: {train_commands(dataset, stage_one, range(len(splits)))}"
    if preprocessing_sha256(plans, stage_one.configuration) != preprocessing_sha256(now, stage_one.configuration):
        raise RuntimeError(f"{stage_one.name} was trained on data preprocessed otherwise than {stage_one.plans}.json "
                           f"now says. {retrain}")  # fmt: skip
    labels = ForegroundRecord.from_dataset_json(read_json(base / "dataset.json", plan))
    if labels != ForegroundRecord.from_dataset_json(then):
        raise RuntimeError(
            f"{stage_one.name} was trained with other labels than {base / 'dataset.json'} has. {retrain}"
        )
    return Sources(dataset, stage_one, plans, then, splits, checkpoint_name)


def _check_configuration(plans: Mapping[str, Any], stage_one: StageOneId) -> None:
    settings = resolve_configuration(plans, stage_one.configuration)
    if settings.get("previous_stage"):
        raise ValueError(
            f"Configuration '{stage_one.configuration}' is the second stage of a cascade (previous_stage is "
            f"'{settings['previous_stage']}'). Export a configuration that needs no other: -c 3d_fullres."
        )
    if len(settings["patch_size"]) != 3 and synthesised_channel(settings) is None:
        raise ValueError(f"Configuration '{stage_one.configuration}' is 2D. Export a 3D one: -c 3d_fullres.")


def check_folds(sources: Sources, folds: Sequence[int | str] | None) -> list[int]:
    """The folds to export: the requested ones, or all of the splits; their checkpoint files must exist.

    Raises:
        ValueError: a fold is ``all`` or not in the splits.
        RuntimeError: a checkpoint is missing.
    """
    known = range(len(sources.splits))
    every = train_commands(sources.dataset, sources.stage_one, known)
    if folds and "all" in folds:
        raise ValueError(f"{FOLD_ALL}: {every}")
    chosen = sorted(set(map(int, folds or known)))
    if unknown := [fold for fold in chosen if fold not in known]:
        raise ValueError(f"Fold(s) {listed(unknown)} are not in {splits_file(sources.dataset)}, which has folds "
                         f"0 to {len(known) - 1}. nnU-Net trains such folds on a random split.")  # fmt: skip
    if untrained := [fold for fold in chosen if not sources.checkpoint(fold).is_file()]:
        raise RuntimeError(
            f"Fold(s) {listed(untrained)} of {sources.stage_one.name} have no {sources.checkpoint_name}. Train them: "
            f"{train_commands(sources.dataset, sources.stage_one, untrained)}"
        )
    return chosen


def check_checkpoint(sources: Sources, fold: int) -> tuple[FoldRecord, list[int] | None]:
    """Open a fold's checkpoint and compare what it says of itself; returns its record and mirroring axes.

    Raises:
        RuntimeError: it is damaged, or of another fold, configuration or trainer.
    """
    path, train = sources.checkpoint(fold), train_commands(sources.dataset, sources.stage_one, [fold])
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=False)
        of = checkpoint["init_args"]
        found = (of["fold"], of["configuration"], checkpoint["trainer_name"])
        axes = checkpoint.get("inference_allowed_mirroring_axes")
    except Exception as error:  # torch and pickle raise a dozen kinds for a damaged file
        raise RuntimeError(
            f"{path} cannot be opened ({type(error).__name__}: {error}); it may be truncated. Train the fold again: "
            f"{train}"
        ) from error
    wanted = (fold, sources.stage_one.configuration, sources.stage_one.trainer)
    if found != wanted:
        raise RuntimeError(f"{path} says it is (fold, configuration, trainer) {found}; wanted {wanted}. It was copied "
                           f"from elsewhere. Train the fold: {train}")  # fmt: skip
    record = FoldRecord(path.name, file_sha256(path), path.stat().st_size)
    return record, None if axes is None else [int(axis) for axis in axes]


def check_held_out(sources: Sources, fold: int, record: FoldRecord, earlier: Manifest | None) -> None:
    """The cases to predict must be among those the fold held out when it was trained.

    A checkpoint does not say which cases it saw. nnU-Net's own validation does (``validation/summary.json``); so does
    an earlier export of the same checkpoint.

    Raises:
        LeakError: the splits were changed after the training.
    """
    wanted = set(sources.splits[fold]["val"])
    if (held_out := _validated(sources, fold)) is None:
        if earlier is None or earlier.folds.get(fold) != record:
            return
        held_out = {name for name, case in earlier.cases.items() if case.fold == fold}
        if not held_out or earlier.splits_sha256 == splits_sha256(sources.splits):
            return
    if strangers := wanted - held_out:
        raise LeakError(
            f"Fold {fold} of {sources.stage_one.name} may have trained on {listed(strangers)}: the splits were changed "
            f"after its training. Train it again: {train_commands(sources.dataset, sources.stage_one, [fold])}; then "
            f"{export_command(sources.dataset, sources.stage_one, [fold])}"
        )


def _validated(sources: Sources, fold: int) -> set[str] | None:
    """The cases of nnU-Net's validation of a fold, or None where it has not run."""
    summary = sources.checkpoint(fold).parent / "validation" / "summary.json"
    ending = sources.dataset_json["file_ending"]
    try:
        cases = json.loads(summary.read_text(encoding="utf-8"))["metric_per_case"]
        return {re.split(r"[/\\]", case["prediction_file"])[-1].removesuffix(ending) for case in cases}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def check_preprocessed(sources: Sources, present: Iterable[str], cases: Iterable[str]) -> None:
    """Every case to predict must be among the preprocessed ones.

    Raises:
        RuntimeError: some are not.
    """
    if missing := set(cases) - set(present):
        one = sources.stage_one
        raise RuntimeError(
            f"Case(s) {listed(missing)} of the splits are not preprocessed in {sources.data_folder}. Preprocess: "
            f"nnUNetv2_preprocess -d {sources.dataset} -plans_name {one.plans} -c {one.configuration}"
        )
