"""A small dataset with two folds: as an export of invented checkpoints, and as one of real, untrained networks."""

import pytest

from nnunet_diffrefine.paths import export_folder, fold_folder, model_folder, preprocessed_dataset
from nnunet_diffrefine.stage_one.fingerprint import file_sha256, preprocessing_sha256, splits_sha256
from nnunet_diffrefine.stage_one.manifest import FoldRecord, ForegroundRecord, Manifest, ModelRecord
from nnunet_diffrefine.stage_one.store import PriorStore
from tests.stage_one.tiny import (
    DATASET,
    DATASET_JSON,
    SPLITS,
    STAGE_ONE,
    PaperExport,
    soft_sphere,
    tiny_plans,
    write_checkpoint,
    write_image,
    write_json,
)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """nnU-Net's three folders with plans, splits and dataset.json of the tiny dataset, and its model folder."""
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
        (tmp_path / name).mkdir()
    base, model = preprocessed_dataset(DATASET), model_folder(DATASET, STAGE_ONE)
    write_json(base / "nnUNetPlans.json", tiny_plans())
    write_json(base / "splits_final.json", SPLITS)
    for folder in (base, model):
        write_json(folder / "dataset.json", DATASET_JSON)
    write_json(model / "plans.json", tiny_plans())
    return tmp_path


@pytest.fixture
def paper(folders):
    folder = export_folder(DATASET, STAGE_ONE)
    folder.mkdir(parents=True)
    manifest = Manifest(
        dataset=DATASET,
        stage_one=ModelRecord("nnUNetTrainer", "nnUNetPlans", "3d_fullres", "nnUNetTrainer", {}, [0, 1, 2], 0.5),
        data_identifier="nnUNetPlans_3d_fullres",
        preprocessing_sha256=preprocessing_sha256(tiny_plans(), "3d_fullres"),
        splits_sha256=splits_sha256(SPLITS),
        foreground=ForegroundRecord.from_dataset_json(DATASET_JSON),
        nnunetv2="2.8.1",
    )
    for fold, split in enumerate(SPLITS):
        checkpoint = fold_folder(DATASET, STAGE_ONE, fold) / "checkpoint_final.pth"
        checkpoint.parent.mkdir(parents=True)
        checkpoint.write_bytes(f"weights of fold {fold}".encode())
        record = FoldRecord(checkpoint.name, file_sha256(checkpoint), checkpoint.stat().st_size)
        manifest = manifest.with_fold(fold, record)
        for name in split["val"]:
            manifest = manifest.with_case(name, PriorStore(folder).write(name, soft_sphere(), fold))
    manifest.write(folder)
    models = model_folder(DATASET, STAGE_ONE)
    return PaperExport(manifest, folder, models, SPLITS, tiny_plans(), DATASET_JSON)


@pytest.fixture
def models(folders):
    """The same dataset with preprocessed images and one small network a fold, initialised at random, never trained."""
    base = preprocessed_dataset(DATASET) / "nnUNetPlans_3d_fullres"
    base.mkdir()
    for number, case in enumerate(case for split in SPLITS for case in split["val"]):
        write_image(base / case, seed=number)
    for fold in range(len(SPLITS)):
        write_checkpoint(fold, seed=fold)
    return folders
