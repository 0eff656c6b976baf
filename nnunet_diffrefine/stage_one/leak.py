"""The leak check: a refiner only trains on priors whose model never saw the case, or it refuses to start.

A prior predicted by a model that trained on the case has too few errors, and of another kind than at test time; a
refiner learns nothing useful from it, and its cross-validation looks better than it is. What remains is the
second-order leak of all stacking: the model that predicted case i was trained on the references of the other folds'
cases, as in nnU-Net's own cascade.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nnunet_diffrefine.paths import StageOneId, export_folder, model_folder, splits_file
from nnunet_diffrefine.stage_one.fingerprint import file_sha256, preprocessing_sha256, splits_sha256
from nnunet_diffrefine.stage_one.manifest import ForegroundRecord, Manifest
from nnunet_diffrefine.stage_one.mending import export_command, listed, train_commands
from nnunet_diffrefine.stage_one.splits import FOLD_ALL, LeakError, Splits, check_splits, read_splits
from nnunet_diffrefine.stage_one.store import PriorStore


def open_export(
    dataset: str,
    stage_one: StageOneId,
    plans: Mapping[str, Any],
    configuration: str,
    dataset_json: Mapping[str, Any],
    folder: Path | None = None,
) -> tuple[Manifest, PriorStore]:
    """Read and check the export of ``stage_one`` for a refiner on ``plans`` and ``configuration``.

    ``folder`` is the export's; None for that of priors.

    Raises:
        LeakError: the export must not be used.
        RuntimeError: there is none, or its manifest or the splits are broken.
    """
    folder = folder or export_folder(dataset, stage_one)
    manifest = Manifest.read(folder)
    splits, models = read_splits(dataset, stage_one), model_folder(dataset, stage_one)
    check_out_of_fold(manifest, folder, splits, models, plans, configuration, dataset_json)
    return manifest, PriorStore(folder)


def check_out_of_fold(
    manifest: Manifest,
    folder: Path,
    splits: Splits,
    model_folder: Path,
    plans: Mapping[str, Any],
    configuration: str,
    dataset_json: Mapping[str, Any],
) -> None:
    """Refuse an export unless every case of the splits has one intact prior by a model that never trained on it.

    Args:
        manifest: of the export.
        folder: of the export.
        splits: the present content of nnU-Net's ``splits_final.json``.
        model_folder: of stage one, with one ``fold_k`` a fold.
        plans: plans of the refiner; other plans than stage one's are fine if they preprocess alike.
        configuration: of the refiner.
        dataset_json: the dataset's.

    Raises:
        LeakError: one kind of fault, for all cases it concerns. Causes come before their consequences.
    """
    _check_fold_all(manifest, len(splits))
    _check_sources(manifest, splits, plans, configuration, dataset_json)
    check_splits(manifest.dataset, manifest.stage_one.stage_one, splits)
    _check_folds(manifest, splits)
    _check_cases(manifest, splits)
    _check_checkpoints(manifest, model_folder)
    _check_files(manifest, PriorStore(folder))


def _export(manifest: Manifest, folds: Iterable[int | str] = ()) -> str:
    return (
        f"Export again: {export_command(manifest.dataset, manifest.stage_one.stage_one, sorted(set(folds), key=str))}"
    )


def _check_fold_all(manifest: Manifest, folds: int) -> None:
    if "all" in manifest.folds or any(case.fold == "all" for case in manifest.cases.values()):
        one = manifest.stage_one.stage_one
        train = train_commands(manifest.dataset, one, range(folds))
        raise LeakError(f"{FOLD_ALL}: {train}; then {export_command(manifest.dataset, one)}")


def _check_sources(
    manifest: Manifest,
    splits: Splits,
    plans: Mapping[str, Any],
    configuration: str,
    dataset_json: Mapping[str, Any],
) -> None:
    """Splits, preprocessing and labels are those of the export."""
    one = manifest.stage_one.stage_one
    train = train_commands(manifest.dataset, one, range(len(splits)))
    if manifest.splits_sha256 != splits_sha256(splits):
        raise LeakError(
            f"{splits_file(manifest.dataset).name} changed since the export of {one.name}; folds trained under the "
            f"old splits may have seen the cases they would now predict. Restore it, or train again: {train}; then "
            f"{export_command(manifest.dataset, one)}"
        )
    if manifest.preprocessing_sha256 != preprocessing_sha256(plans, configuration):
        raise LeakError(
            f"{one.name} was exported from data that were preprocessed otherwise than configuration '{configuration}' "
            f"of the refiner's plans now says (spacing, normalisation, resampling, ...), so the priors do not fit its "
            f"images. Refine with plans that preprocess alike, or train again: {train}; then "
            f"{export_command(manifest.dataset, one)}"
        )
    labels = ForegroundRecord.from_dataset_json(dataset_json)
    if manifest.foreground != labels:
        raise LeakError(
            f"The export of {one.name} has {_classes(manifest.foreground)}, dataset.json has {_classes(labels)}. "
            f"Restore dataset.json, or train again: {train}; then {export_command(manifest.dataset, one)}"
        )


def _classes(labels: ForegroundRecord) -> str:
    kind, values = ("classes", labels.labels) if labels.exclusive else ("regions", labels.regions)
    each = ", ".join(f"{name}={value}" for name, value in zip(labels.names, values or [], strict=False))
    return f"{len(labels.names)} {kind} ({each}; ignore={labels.ignore_label})"


def _check_folds(manifest: Manifest, splits: Splits) -> None:
    exported = {case.fold for case in manifest.cases.values()} & manifest.folds.keys()
    if missing := [fold for fold, split in enumerate(splits) if split["val"] and fold not in exported]:
        raise LeakError(
            f"Fold(s) {listed(missing)} of {manifest.stage_one.stage_one.name} are not exported, but a refiner needs "
            f"the priors of all folds. {_export(manifest, missing)}"
        )


def _check_cases(manifest: Manifest, splits: Splits) -> None:
    """The exported cases are those of the splits, each predicted by the fold that held it out, with all classes."""
    owner = {case: fold for fold, split in enumerate(splits) for case in split["val"]}
    if strangers := manifest.cases.keys() - owner.keys():
        raise LeakError(
            f"The export has case(s) {listed(strangers)} that are in no fold's validation set, so they cannot be "
            f"out-of-fold. Delete the export's manifest.json. {_export(manifest)}"
        )
    if missing := owner.keys() - manifest.cases.keys():
        folds = {owner[case] for case in missing}
        raise LeakError(f"Case(s) {listed(missing)} of the splits are not exported. {_export(manifest, folds)}")
    if trained := {name for name, case in manifest.cases.items() if case.fold != owner[name]}:
        folds = {owner[case] for case in trained}
        raise LeakError(
            f"Case(s) {listed(trained)} were predicted by another fold than the one that held them out, so by one "
            f"that trained on them. {_export(manifest, folds)}"
        )
    channels = len(manifest.channels)
    if odd := {name for name, case in manifest.cases.items() if case.shape[0] != channels}:
        folds = {owner[case] for case in odd}
        raise LeakError(
            f"Prior(s) of case(s) {listed(odd)} do not have {channels} channels, one for each of "
            f"{', '.join(manifest.channels)}. Delete the export's manifest.json. {_export(manifest, folds)}"
        )


def _check_checkpoints(manifest: Manifest, model_folder: Path) -> None:
    """The checkpoints on disk are those that predicted; each is read once."""
    paths = {fold: model_folder / f"fold_{fold}" / record.checkpoint for fold, record in manifest.folds.items()}
    one = manifest.stage_one.stage_one
    if missing := [fold for fold, path in paths.items() if not path.is_file()]:
        raise LeakError(
            f"The checkpoint(s) of fold(s) {listed(missing)} are gone from {model_folder}; a refiner contains its "
            f"stage one. Train: {train_commands(manifest.dataset, one, missing)}; then "
            f"{export_command(manifest.dataset, one, missing)}"
        )
    replaced = [
        fold
        for fold, record in manifest.folds.items()
        if paths[fold].stat().st_size != record.bytes or file_sha256(paths[fold]) != record.sha256
    ]
    if replaced:
        raise LeakError(
            f"The checkpoint(s) of fold(s) {listed(replaced)} in {model_folder} were replaced since the export, so the "
            f"priors are another network's. {_export(manifest, replaced)}"
        )


def _check_files(manifest: Manifest, store: PriorStore) -> None:
    faults = {name: store.fault(name, record) for name, record in manifest.cases.items()}
    for fault in ("missing", "truncated", "altered"):
        if cases := [name for name, found in faults.items() if found == fault]:
            folds = {manifest.cases[name].fold for name in cases}
            raise LeakError(
                f"Prior(s) of case(s) {listed(cases)} in {store.folder} are {fault}. {_export(manifest, folds)}"
            )
