"""Everything that must hold before a refiner fold may train: settings, stage one, out-of-fold priors."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nnunet_diffrefine.config import BLOCK, RefineConfig, StageOneConfig
from nnunet_diffrefine.errors.maps import Parents, nesting_from_labels
from nnunet_diffrefine.paths import (
    MANIFEST,
    StageOneId,
    exports_folder,
    fold_folder,
    model_folder,
    splits_file,
)
from nnunet_diffrefine.plans import GATE, Resolved, merge, settings, with_block, with_gate
from nnunet_diffrefine.stage_one.fingerprint import resolve_configuration
from nnunet_diffrefine.stage_one.leak import open_export
from nnunet_diffrefine.stage_one.manifest import Manifest, ModelRecord
from nnunet_diffrefine.stage_one.mending import export_command
from nnunet_diffrefine.stage_one.origin import origin_of
from nnunet_diffrefine.stage_one.splits import read_splits
from nnunet_diffrefine.stage_one.store import PriorStore


@dataclass(frozen=True)
class Prepared:
    """What a trainer needs, all checked.

    Attributes:
        plans: plans with the resolved block.
        config: settings.
        resolved: record that goes into the model folder.
        store: stage one's out-of-fold predictions.
        checkpoint: stage one's checkpoint of this fold.
        origin: fingerprints of that and of the fold's split.
    """

    plans: dict[str, Any]
    config: RefineConfig
    resolved: Resolved
    store: PriorStore
    checkpoint: Path
    origin: dict[str, str]


def prepare(
    trainer: str, method: str, plans: dict[str, Any], configuration: str, fold: int | str, dataset_json: dict[str, Any]
) -> Prepared:
    """Resolve settings and stage one, and check that every prior is out-of-fold, before anything is written.

    Args:
        trainer: class name of the refiner's trainer.
        method: name of its method.
        plans: nnU-Net's plans.
        configuration: name of the configuration to train.
        fold: fold to train.
        dataset_json: nnU-Net's dataset description.

    Raises:
        NotImplementedError: a 2D or cascade configuration, or a stage one that cannot run in this one's windows.
        ValueError: the plans have no such configuration.
        ConfigError: a setting that cannot be used.
        RuntimeError: no export, several to choose from, fold ``all``, or a leak (:class:`LeakError`).
    """
    dataset = plans["dataset_name"]
    settled = resolve_configuration(plans, configuration)
    _refuse_unsupported(settled, configuration)
    config = settings(settled, method)
    own = StageOneId(trainer, plans["plans_name"], configuration)
    stage_one = find_export(dataset, config.stage_one, own, method)
    splits = read_splits(dataset, stage_one)
    _refuse_fold(dataset, len(splits), fold)
    manifest, store = open_export(dataset, stage_one, plans, configuration, dataset_json)
    refuse_other_windows(settled["patch_size"], manifest.stage_one)
    foreground = replace(manifest.foreground.foreground, parents=_parents(manifest, dataset_json))
    resolved = Resolved(asdict(foreground), asdict(manifest.stage_one))
    checkpoint = _checkpoint(dataset, stage_one, manifest, int(fold))
    own_folder = model_folder(dataset, own)
    plans = with_block(plans, configuration, config, resolved)
    plans = refuse_mixed_settings(own_folder, fold, plans, configuration, RefineConfig().to_dict())
    _refuse_read_only(own_folder)
    return Prepared(plans, config, resolved, store, checkpoint, origin_of(manifest, splits, int(fold)))


def find_export(dataset: str, wanted: StageOneConfig, own: StageOneId, method: str) -> StageOneId:
    """The export to refine: the one the settings name, else the only one there is for these plans, or at all.

    Args:
        dataset: full dataset name.
        wanted: names, or ``auto``.
        own: the refiner.
        method: of the refiner.

    Raises:
        RuntimeError: none fits, or several do.
    """
    root = exports_folder(dataset)
    found, fitting = exported(root, wanted, own)
    if not fitting:
        default = StageOneId("nnUNetTrainer", own.plans, own.configuration)
        named = {key: getattr(wanted, key) for key in ID_KEYS if getattr(wanted, key) != "auto"}
        meant = "".join(f", stage_one.{key}={value}" for key, value in named.items())
        there = f" Exports there are: {', '.join(i.name for i in found)}." if found else ""
        raise RuntimeError(
            f"No out-of-fold predictions of stage one in {root}{meant}.{there} Export them with\n"
            f"  {export_command(dataset, replace(default, **named))}"
        )
    if len(fitting) > 1:
        choice = " ".join(f"stage_one.{key}={getattr(fitting[0], key)}" for key in ID_KEYS)
        raise RuntimeError(
            f"Several stage ones are exported for {dataset}: {', '.join(i.name for i in fitting)}. Choose one with\n"
            f"  nnUNetv2_diffrefine plan -d {dataset} -c {own.configuration} -p {own.plans} -m {method} -o NEW_PLANS "
            f"--set {choice}\nand train with -p NEW_PLANS."
        )
    return fitting[0]


ID_KEYS = ("trainer", "plans", "configuration")


def exported(root: Path, wanted: object, own: StageOneId) -> tuple[list[StageOneId], list[StageOneId]]:
    """All exports in a folder, and those that the settings allow: the ones of our own plans, where there are any."""
    found = [StageOneId.from_name(file.parent.name) for file in sorted(root.glob(f"*__*__*/{MANIFEST}"))]
    fitting = [one for one in found if all(getattr(wanted, key) in ("auto", getattr(one, key)) for key in ID_KEYS)]
    same = [one for one in fitting if (one.plans, one.configuration) == (own.plans, own.configuration)]
    return found, same or fitting


def refuse_mixed_settings(
    folder: Path, fold: int | str, plans: dict[str, Any], configuration: str, defaults: dict[str, Any]
) -> dict[str, Any]:
    """Refuse to train a fold into a model folder whose other folds, or its own past, have other settings.

    nnU-Net keeps one ``plans.json`` a model folder, so folds of different settings cannot share it. A fold that is
    trained anew may change them; one that is continued (``--c``) may not. The gate is no setting of a training but
    measured on trained folds. Settings that the folder's version of this package did not have count as ``defaults``.

    Returns:
        The plans with the gate of the folds that stay.

    Raises:
        RuntimeError: a trained fold that stays was made with other settings.
    """
    trained = {f.parent.name for f in folder.glob("fold_*/checkpoint_*.pth")}
    others = trained if plans.get("continue_training") else trained - {f"fold_{fold}"}
    file = folder / "plans.json"
    if not others or not file.is_file():
        return plans
    before = json.loads(file.read_text())["configurations"].get(configuration, {}).get(BLOCK)
    if before is None:
        return plans
    if differing := differing_settings(before, plans["configurations"][configuration][BLOCK], defaults):
        raise RuntimeError(
            f"{folder} holds {', '.join(sorted(others))} trained with other diffrefine settings "
            f"({', '.join(differing)}). Train this fold with the same settings, or write the new ones under another "
            "plans name (nnUNetv2_diffrefine plan -d DATASET -o NEW_PLANS) and train with -p NEW_PLANS."
        )
    return with_gate(plans, configuration, before[GATE]) if GATE in before else plans


def differing_settings(before: dict[str, Any], now: dict[str, Any], defaults: dict[str, Any]) -> list[str]:
    """Names of the settings in which two blocks differ, gate aside; what ``before`` lacks counts as ``defaults``."""
    had, has = json.loads(json.dumps([merge(defaults, before), now]))
    return sorted(key for key in {*had, *has} - {GATE} if had.get(key) != has.get(key))


def _checkpoint(dataset: str, stage_one: StageOneId, manifest: Manifest, fold: int) -> Path:
    if fold not in manifest.folds:
        raise RuntimeError(
            f"Fold {fold} of {stage_one.name} is not exported. Export it: {export_command(dataset, stage_one, [fold])}"
        )
    return fold_folder(dataset, stage_one, fold) / manifest.folds[fold].checkpoint


def _parents(manifest: Manifest, dataset_json: dict[str, Any]) -> Parents:
    if manifest.foreground.exclusive:
        return ()
    return nesting_from_labels([dataset_json["labels"][name] for name in manifest.foreground.names])


def _refuse_unsupported(configuration: dict[str, Any], name: str) -> None:
    if len(configuration["patch_size"]) != 3:
        raise NotImplementedError(f"Configuration '{name}' is 2D; the refiner works in 3D. Use 3d_fullres.")
    if configuration.get("previous_stage"):
        raise NotImplementedError(
            f"Configuration '{name}' is a cascade stage, which cannot be refined. Use 3d_fullres."
        )


def refuse_other_windows(patch: Sequence[int], model: ModelRecord) -> None:
    """An exported model runs inside this training's windows, so its strides must divide their sides, where known.

    Raises:
        NotImplementedError: they do not.
    """
    strides = model.architecture.get("arch_kwargs", {}).get("strides")
    if not strides:
        return
    each = [[stride] * len(patch) if isinstance(stride, int) else stride for stride in strides]
    products = [math.prod(axis) for axis in zip(*each, strict=True)]
    if len(products) != len(patch) or any(size % product for size, product in zip(patch, products, strict=True)):
        raise NotImplementedError(
            f"{model.stage_one.name}, which was exported, divides its windows by {products}, which does not fit "
            f"windows of {list(patch)}. Train both on the same plans and configuration "
            f"(-p {model.plans}, {model.configuration})."
        )


def _refuse_read_only(folder: Path) -> None:
    existing = next(f for f in (folder, *folder.parents) if f.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise RuntimeError(
            f"Cannot write the model to {folder}: {existing} is not a folder this user may write to. "
            "Mend its permissions, or set nnUNet_results to a folder that is writable."
        )


def _refuse_fold(dataset: str, number: int, fold: int | str) -> None:
    folds = range(number)
    if fold == "all":
        raise RuntimeError(
            "Fold 'all' cannot be refined: a model trained on all cases has no out-of-fold prediction of any of them. "
            f"Train folds 0..{folds[-1]} instead and predict with -f {' '.join(map(str, folds))}."
        )
    if int(fold) not in folds:
        raise RuntimeError(f"Fold {fold} is not in {splits_file(dataset)}, which defines folds 0..{folds[-1]}.")
