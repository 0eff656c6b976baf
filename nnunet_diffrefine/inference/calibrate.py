"""``calibrate``: every trained fold refines its own validation cases, from out-of-fold priors; then what that teaches.

A validation case was seen neither by the refiner fold nor by the stage-one model behind its exported prior. Each case
runs through :func:`refine_volume`, as in ``apply``, with the gate open.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from tqdm import tqdm

from nnunet_diffrefine import __version__
from nnunet_diffrefine.calibration.measure import measure
from nnunet_diffrefine.calibration.record import Record, record_of
from nnunet_diffrefine.calibration.voxels import CaseVoxels, gather, load, save
from nnunet_diffrefine.config import BLOCK
from nnunet_diffrefine.data import PriorDataset
from nnunet_diffrefine.inference.decided import put_down, read_record
from nnunet_diffrefine.inference.model import Model, load_model, read_checkpoint, trained_folds
from nnunet_diffrefine.inference.refine import RefineOptions, refine_volume
from nnunet_diffrefine.inference.region import RegionSettings, doubtful_region
from nnunet_diffrefine.inference.volume import references, whole
from nnunet_diffrefine.networks.gate import Gate
from nnunet_diffrefine.networks.refinement import RefinementNetwork
from nnunet_diffrefine.paths import StageOneId, calibration_folder, model_folder, preprocessed_dataset
from nnunet_diffrefine.plans import read_block
from nnunet_diffrefine.stage_one.fingerprint import file_sha256
from nnunet_diffrefine.stage_one.leak import open_export
from nnunet_diffrefine.stage_one.manifest import Manifest
from nnunet_diffrefine.stage_one.origin import ORIGIN, check_origin, check_validated, origin_of
from nnunet_diffrefine.stage_one.splits import read_splits


@dataclass(frozen=True)
class CalibrationRequest:
    """Arguments of the command; see ``nnUNetv2_diffrefine calibrate --help``."""

    dataset: str
    refiner: StageOneId
    folds: Sequence[int] | None = None
    checkpoint: str = "checkpoint_final.pth"
    region: Mapping[str, Any] | None = None
    device: str = "cuda"
    progress: bool = True


@dataclass(frozen=True)
class Plan:
    """What is to be done, all checked.

    Attributes:
        model: its gate open.
        folds: to calibrate on.
        cases: of each fold.
        manifest: of the export of priors.
        data: preprocessed cases with priors.
        region: what counts as doubtful.
        checkpoints: SHA-256 of each fold's.
        references: SHA-256 of each case's preprocessed segmentation.
        store: folder of what is kept of the cases.
    """

    model: Model
    folds: Sequence[int]
    cases: Mapping[int, list[str]]
    manifest: Manifest
    data: PriorDataset
    region: RegionSettings
    checkpoints: Mapping[int, str]
    references: Mapping[str, str]
    store: Path

    @property
    def all_cases(self) -> list[tuple[int, str]]:
        """Fold and name of every case."""
        return [(fold, case) for fold in self.folds for case in self.cases[fold]]

    def made_from(self, fold: int, case: str) -> dict[str, Any]:
        """All that a stored case depends on."""
        return {
            "format": 3, "checkpoint": self.checkpoints[fold], "prior": self.manifest.cases[case].sha256,
            "region": asdict(self.region), "sampling": asdict(self.model.network.sampling),
            "reference": self.references[case],
        }  # fmt: skip

    def file(self, case: str) -> Path:
        """Where a case is stored."""
        return self.store / f"{case}.npz"

    def stored(self) -> Iterator[CaseVoxels]:
        """The stored cases, one in memory at a time.

        Raises:
            RuntimeError: one has gone since it was written.
        """
        for fold, case in self.all_cases:
            voxels = load(self.file(case), self.made_from(fold, case))
            if voxels is None:
                raise RuntimeError(f"{self.file(case)} was changed during the calibration. Start it again.")
            yield voxels


def calibrate(request: CalibrationRequest) -> Record:
    """Calibrate a refiner, write ``refinement.json`` and the gate in the model folder's ``plans.json``.

    Decisions that a user made earlier (``--set``) stay.

    Raises:
        ValueError: bad arguments (``ConfigError``: settings).
        RuntimeError: no model, no export, one that is not out-of-fold (``LeakError``), or a damaged file.
    """
    plan = checked(request)
    earlier = read_record(request.dataset, request.refiner)
    plan.store.mkdir(parents=True, exist_ok=True)
    _refine_all(plan, request)
    foreground = plan.model.network.foreground
    made_from = {
        "version": __version__, "folds": list(plan.folds), "cases": len(plan.all_cases),
        "checkpoint": request.checkpoint,
        "checkpoints": {str(fold): sha256 for fold, sha256 in plan.checkpoints.items()},
        "region": asdict(plan.region), "sampling": asdict(plan.model.network.sampling),
    }  # fmt: skip
    measured = measure(plan.stored, [f for f, _ in plan.all_cases], foreground, plan.model.method.flips)
    record = record_of(measured, foreground.names, made_from)
    if earlier is not None:
        kept = {name: c.decision for name, c in earlier.classes.items() if c.by == "user" and name in record.classes}
        record = record.decided(kept)
    put_down(record, plan.model.folder, plan.model.configuration)
    return record


def checked(request: CalibrationRequest) -> Plan:
    """Check everything before work; raises as :func:`calibrate` does."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if not available[request.device]:
        raise ValueError(f"-device is '{request.device}', but PyTorch finds no such device. Use -device cpu.")
    dataset = maybe_convert_to_dataset_name(request.dataset)
    folder = model_folder(dataset, request.refiner)
    folds = sorted(set(request.folds if request.folds is not None else trained_folds(folder, request.checkpoint)))
    if not folds:
        raise RuntimeError(f"{folder} has no trained fold with a {request.checkpoint}. Train one: nnUNetv2_train "
                           f"{dataset} {request.refiner.configuration} 0 -tr {request.refiner.trainer}")  # fmt: skip
    region = RegionSettings(**(request.region or {}))
    model = load_model(dataset, request.refiner, folds, request.checkpoint, {}, torch.device(request.device))
    model.network.gate = Gate(model.network.foreground)
    if model.network.sampling.min_foreground == 0:  # of methods that do not look at the prior
        region = replace(region, everywhere=True)
    record = read_block(model.settings.configuration)[1].stage_one
    stage_one = StageOneId(record["trainer"], record["plans"], record["configuration"])
    manifest, priors = open_export(dataset, stage_one, model.plans, model.configuration, model.dataset_json)
    cases = _validation_cases(dataset, stage_one, folds)
    _refuse_other_origin(dataset, request, model, manifest, cases)
    data = PriorDataset(_dataset(dataset, model.settings.data_identifier, cases), priors)
    checkpoints = {fold: file_sha256(folder / f"fold_{fold}" / request.checkpoint) for fold in folds}
    store = calibration_folder(dataset, request.refiner)
    hashes = {case: _reference_sha256(data, case) for of_fold in cases.values() for case in of_fold}
    return Plan(model, folds, cases, manifest, data, region, checkpoints, hashes, store)


def _reference_sha256(data: PriorDataset, case: str) -> str:
    segmentation = np.ascontiguousarray(data.dataset.load_case(case)[1][:])
    return hashlib.sha256(repr(segmentation.shape).encode() + segmentation.tobytes()).hexdigest()


def _validation_cases(dataset: str, stage_one: StageOneId, folds: Sequence[int]) -> dict[int, list[str]]:
    splits = read_splits(dataset, stage_one)
    if strange := [fold for fold in folds if fold >= len(splits)]:
        raise RuntimeError(f"Fold(s) {strange} are not in splits_final.json of {dataset}, which has {len(splits)}.")
    cases = {fold: sorted(splits[fold]["val"]) for fold in folds}
    if empty := [fold for fold in folds if not cases[fold]]:
        raise RuntimeError(f"Fold(s) {empty} have no validation cases in splits_final.json of {dataset}, so nothing "
                           "can be measured on them. Leave them out (-f).")  # fmt: skip
    return cases


def _refuse_other_origin(
    dataset: str, request: CalibrationRequest, model: Model, manifest: Manifest, cases: Mapping[int, list[str]]
) -> None:
    """Each fold must contain the exported stage one, and must not have been trained on the cases that it refines now.

    A checkpoint that does not record its split is judged by nnU-Net's validation of the fold, where that has run.
    """
    splits = read_splits(dataset, manifest.stage_one.stage_one)
    for fold in cases:
        at = model.folder / f"fold_{fold}"
        recorded = read_checkpoint(at / request.checkpoint)[BLOCK].get(ORIGIN, {})
        check_origin(recorded, origin_of(manifest, splits, fold), dataset, request.refiner, fold)
        if "split" not in recorded:
            summary, ending = at / "validation" / "summary.json", model.dataset_json["file_ending"]
            check_validated(summary, ending, cases[fold], dataset, request.refiner, fold)


def _dataset(dataset: str, identifier: str, cases: Mapping[int, list[str]]) -> Any:  # noqa: ANN401 (nnU-Net's)
    folder = preprocessed_dataset(dataset) / identifier
    names = [case for of_fold in cases.values() for case in of_fold]
    if not folder.is_dir():
        raise RuntimeError(f"{folder} does not exist. Preprocess: nnUNetv2_preprocess -d {dataset}")
    kind = infer_dataset_class(str(folder))
    if missing := sorted(set(names) - set(kind.get_identifiers(str(folder)))):
        raise RuntimeError(f"{len(missing)} validation case(s) are not in {folder}, e.g. {missing[0]}. Preprocess "
                           f"again: nnUNetv2_preprocess -d {dataset}")  # fmt: skip
    return kind(str(folder), names)


def _refine_all(plan: Plan, request: CalibrationRequest) -> None:
    """Refine and store the cases that are not stored yet."""
    todo = {
        fold: [c for c in plan.cases[fold] if load(plan.file(c), plan.made_from(fold, c)) is None]
        for fold in plan.folds
    }
    total, left = len(plan.all_cases), sum(map(len, todo.values()))
    quiet = not request.progress or not left
    with tqdm(total=total, initial=total - left, desc="calibrate", unit="case", disable=quiet) as bar:
        for fold, network in zip(plan.folds, plan.model.folds(), strict=True):
            for case in todo[fold]:
                bar.set_postfix_str(f"fold {fold}, {case}", refresh=False)
                voxels = refined_case(plan, network, fold, case, torch.device(request.device))
                save(voxels, plan.made_from(fold, case), plan.file(case))
                bar.update()


def refined_case(plan: Plan, network: RefinementNetwork, fold: int, case: str, device: torch.device) -> CaseVoxels:
    """Refine a case with its fold's network, and keep what calibration needs of it."""
    stacked, segmentation, _, _ = plan.data.load_case(case)
    x, foreground = whole(stacked), network.foreground
    image, prior = x[: -foreground.channels], x[-foreground.channels :]
    reference, valid = references(np.asarray(segmentation[:]), plan.model.labels)
    region = doubtful_region(prior, foreground, plan.region)
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):  # as apply does
        refined = refine_volume([network], image, prior, region, plan.model.patch, RefineOptions(device))
    volumes = {"logits": refined.logits, "prior": prior, "region": region, "reference": reference, "valid": valid[0]}
    return gather(case, fold, foreground, volumes)
