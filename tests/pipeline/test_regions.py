"""Regions, from stage one to a prediction on another machine, through nnU-Net's own commands."""

from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from validation_tables import assert_same_dice
from workspace import CONFIGURATION, TINY, Workspace

STAGE_ONE, REFINER = "DiffRefineStageOneTrainer_tiny", "DiffRefineTrainer_tiny"
pytestmark = pytest.mark.nnunet


def read(file) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def predict(workspace: Workspace, out: str, *options: str, images=None) -> dict[str, np.ndarray]:
    target = workspace.folder / out
    workspace.run(*workspace.predict(REFINER, images or workspace.raw / "imagesTs", target, *options))
    return {f.name: read(f) for f in sorted(target.glob("*.nii.gz"))}


def test_stage_one_trainer_exports_every_case_out_of_fold(region_run):
    folder = region_run.preprocessed / "diffrefine" / region_run.model(STAGE_ONE).name
    manifest = json.loads((folder / "manifest.json").read_text())
    splits = json.loads((region_run.preprocessed / "splits_final.json").read_text())
    assert {case: record["fold"] for case, record in manifest["cases"].items()} == {
        case: fold for fold, split in enumerate(splits) for case in split["val"]
    }


def test_model_folder_looks_like_nnunets_and_records_its_settings(region_run):
    model = region_run.model(REFINER)
    plans = json.loads((model / "plans.json").read_text())
    block = plans["configurations"][CONFIGURATION]["diffrefine"]
    assert block["method"] == "bridge"
    assert block["resolved"]["stage_one"]["trainer"] == STAGE_ONE
    assert block["resolved"]["foreground"]["names"] == ["whole_tumor", "tumor_core", "enhancing_tumor"]
    wanted = {"checkpoint_final.pth", "checkpoint_best.pth", "progress.png", "refinement.png", "debug.json"}
    for fold in (0, 1):
        assert wanted <= {f.name for f in (model / f"fold_{fold}").iterdir()}
        assert (model / f"fold_{fold}" / "validation" / "summary.json").is_file()
        assert not list((model / f"fold_{fold}").rglob("*.tmp*"))


def test_a_finished_fold_is_evaluated(region_run):
    assert_same_dice(region_run.model(REFINER))


def test_curves_compare_stage_one_and_refined(region_run):
    with (region_run.model(REFINER) / "fold_0" / "refinement.csv").open() as file:
        (row,) = csv.DictReader(file)
    change = float(row["refined_dice"]) - float(row["stage_one_dice"])
    assert float(row["change"]) == pytest.approx(change)


def test_checkpoint_holds_averaged_weights_for_inference_and_raw_ones_to_resume(region_run):
    checkpoint = torch.load(region_run.model(REFINER) / "fold_0" / "checkpoint_final.pth", weights_only=False)
    weights, extra = checkpoint["network_weights"], checkpoint["diffrefine"]
    for name, value in extra["ema"].items():
        if name.startswith("module."):
            assert torch.equal(weights[f"denoiser.{name.removeprefix('module.')}"], value)
    assert any(not torch.equal(weights[f"denoiser.{name}"], value) for name, value in extra["denoiser"].items())
    stage_one = torch.load(region_run.model(STAGE_ONE) / "fold_0" / "checkpoint_final.pth", weights_only=False)
    for name, value in stage_one["network_weights"].items():
        assert torch.equal(weights[f"stage_one.{name}"], value)


def test_prediction_of_a_validation_case_is_its_validation(region_run, tmp_path):
    """What users get is what summary.json reports."""
    split = json.loads((region_run.preprocessed / "splits_final.json").read_text())[0]
    case = split["val"][0]
    for file in (region_run.raw / "imagesTr").glob(f"{case}_*.nii.gz"):
        shutil.copy(file, tmp_path)
    predicted = predict(region_run, "again", "-f", "0", images=tmp_path)
    validated = read(region_run.model(REFINER) / "fold_0" / "validation" / f"{case}.nii.gz")
    np.testing.assert_array_equal(predicted[f"{case}.nii.gz"], validated)


def test_zip_predicts_the_same_on_a_machine_with_nothing_else(region_run, tmp_path):
    """The model zip holds stage one; neither data nor stage one's folder is needed."""
    here = predict(region_run, "here", "-f", "0", "1")
    archive = tmp_path / "model.zip"
    region_run.run("nnUNetv2_export_model_to_zip", *region_run.options(REFINER), "-o", archive, "-f", "0", "1")
    other = Workspace(tmp_path / "other", region_run.dataset)
    for part in ("raw", "preprocessed", "results"):
        (other.folder / f"nnUNet_{part}").mkdir(parents=True)
    other.run("nnUNetv2_install_pretrained_model_from_zip", archive)
    there = predict(other, "there", "-f", "0", "1", images=region_run.raw / "imagesTs")
    assert here.keys() == there.keys()
    for name, labels in here.items():
        np.testing.assert_array_equal(labels, there[name])


def test_find_best_configuration_compares_stage_one_and_refiner(region_run):
    models = [region_run.number, "-c", CONFIGURATION, "-p", TINY, "-tr", STAGE_ONE, REFINER]
    output = region_run.run("nnUNetv2_find_best_configuration", *models, "-f", "0", "1")
    assert region_run.model(REFINER).name in output
    assert region_run.model(STAGE_ONE).name in output


def test_without_the_variable_nnunet_says_where_it_looked(region_run):
    lost = Workspace(region_run.folder, region_run.dataset, {"nnUNet_extTrainer": ""})
    command = lost.predict(REFINER, lost.raw / "imagesTs", lost.folder / "lost", "-f", "0")
    output = lost.run(*command, fails=True)
    assert f"Could not find requested nnunet trainer {REFINER}" in output
    assert "nnUNet_extTrainer" in output
