"""ReCoSeg through nnU-Net's own commands: synthesis in two folds, segmentation on its residuals, prediction."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import SMALL
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import get_trainer_from_args
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as nnunet
from validation_tables import assert_same_dice
from workspace import CONFIGURATION, TINY, Workspace

from nnunet_diffrefine.demo.phantom import write_dataset
from nnunet_diffrefine.demo.small_plans import shrink
from nnunet_diffrefine.training.trainer_calibration import held_out

SYNTHESIS, RECOSEG = "ReCoSegSynthesisTrainer_tiny", "ReCoSegTrainer_tiny"
SLICES, CPU = "nnUNetPlansSlices", torch.device("cpu")
pytestmark = pytest.mark.nnunet


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Workspace:
    """Six cases in two folds; the segmentation is refused until both folds of the synthesis are there."""
    workspace = Workspace(tmp_path_factory.mktemp("recoseg"), "Dataset503_ReCoSeg")
    write_dataset(workspace.raw, 6, seed=3, settings=SMALL, test_cases=1)
    workspace.plan([4, 8, 12], [24, 24, 24])
    refused = workspace.run(*workspace.train(0, RECOSEG), fails=True)
    assert "No out-of-fold synthesis" in refused
    assert f"nnUNetv2_train {workspace.dataset} {CONFIGURATION} 1 -tr ReCoSegSynthesisTrainer -p {TINY}" in refused
    workspace.run(*workspace.train(0, SYNTHESIS))
    refused = workspace.run(*workspace.train(0, RECOSEG), fails=True)
    assert re.search(r"Fold\(s\) 1 of ReCoSegSynthesisTrainer_tiny\S+ are not exported", refused)
    assert not workspace.model(RECOSEG).exists()
    workspace.run(*workspace.train(1, SYNTHESIS))
    workspace.run(*workspace.train(0, RECOSEG))
    return workspace


def exported(run: Workspace) -> dict:
    folder = run.preprocessed / "diffrefine_synthesis" / run.model(SYNTHESIS).name
    return json.loads((folder / "manifest.json").read_text())


def predict(run: Workspace, trainer: str, images, out: str, fails: bool = False) -> str:
    where = ("-i", images, "-o", run.folder / out, "-d", run.number, "-c", CONFIGURATION, "-p", TINY)
    return run.run(
        "nnUNetv2_predict", *where, "-tr", trainer, "-f", "0", "-device", "cpu", "-npp", "0", "-nps", "0", fails=fails
    )


def test_every_synthesis_is_out_of_fold_and_its_range_is_stated(run):
    manifest = exported(run)
    splits = json.loads((run.preprocessed / "splits_final.json").read_text())
    owner = {case: fold for fold, split in enumerate(splits) for case in split["val"]}
    assert {case: record["fold"] for case, record in manifest["cases"].items()} == owner
    assert (manifest["channel"]["name"], manifest["channel"]["index"]) == ("T1ce", 1)
    assert manifest["channel"]["maximum"] == 8.0
    for record in manifest["cases"].values():
        assert record["shape"][0] == 2
        assert record["quantiles"] == sorted(record["quantiles"])
        assert 0 < record["quantiles"][-1] <= 8.0


def test_scale_and_thresholds_are_kept_with_the_model_and_come_from_training_cases(run):
    weights = torch.load(run.model(RECOSEG) / "fold_0" / "checkpoint_final.pth", weights_only=False)["network_weights"]
    split = json.loads((run.preprocessed / "splits_final.json").read_text())[0]
    assert bool(weights["calibrated"])
    assert weights["thresholds"].shape == (3,)
    kept_out = held_out(split["train"], 0.1, 0)
    assert len(kept_out) == 1
    quantiles = [exported(run)["cases"][case]["quantiles"][199] for case in split["train"] if case not in kept_out]
    assert float(weights["scale"]) == pytest.approx(np.median(quantiles))
    (log,) = (run.model(RECOSEG) / "fold_0").glob("training_log_*.txt")
    assert "chosen on 1 case(s) not trained on" in log.read_text()
    best = torch.load(run.model(RECOSEG) / "fold_0" / "checkpoint_best.pth", weights_only=False)["network_weights"]
    for name in ("thresholds", "calibrated"):
        assert torch.equal(best[name], weights[name])
    synthesis = torch.load(run.model(SYNTHESIS) / "fold_0" / "checkpoint_final.pth", weights_only=False)
    for name, value in synthesis["network_weights"].items():
        assert torch.equal(weights[f"synthesis.{name}"], value)


def test_the_model_folder_says_which_region_lies_in_which(run):
    plans = json.loads((run.model(RECOSEG) / "plans.json").read_text())
    foreground = plans["configurations"][CONFIGURATION]["diffrefine"]["resolved"]["foreground"]
    assert foreground["names"] == ["whole_tumor", "tumor_core", "enhancing_tumor"]
    assert foreground["parents"] == [None, 0, 1]


def test_a_finished_fold_is_evaluated(run):
    assert_same_dice(run.model(RECOSEG))


def test_prediction_needs_the_model_folder_alone_and_no_labels(run, tmp_path):
    """A validation case gives what summary.json was computed from; labels, syntheses and their models are away."""
    split = json.loads((run.preprocessed / "splits_final.json").read_text())[0]
    case = split["val"][0]
    for file in (run.raw / "imagesTr").glob(f"{case}_*.nii.gz"):
        shutil.copy(file, tmp_path)
    alone = Workspace(tmp_path / "alone", run.dataset)
    for part in ("raw", "preprocessed"):
        (alone.folder / f"nnUNet_{part}").mkdir(parents=True)
    (alone.folder / "nnUNet_raw" / run.dataset).mkdir()
    shutil.copytree(run.model(RECOSEG), alone.model(RECOSEG))
    predict(alone, RECOSEG, tmp_path, "out")
    files = (alone.folder / "out", run.model(RECOSEG) / "fold_0" / "validation")
    predicted, validated = (sitk.GetArrayFromImage(sitk.ReadImage(str(f / f"{case}.nii.gz"))) for f in files)
    np.testing.assert_array_equal(predicted, validated)


def test_a_synthesis_refuses_to_segment(run):
    output = predict(run, SYNTHESIS, run.raw / "imagesTs", "none", fails=True)
    assert "Predict with -tr ReCoSegTrainer" in output


def test_validating_and_exporting_again_read_the_checkpoint_and_draw_nothing(run):
    folder = run.preprocessed / "diffrefine_synthesis" / run.model(SYNTHESIS).name
    before = {file.name: file.stat().st_mtime_ns for file in folder.glob("*.b2nd")}
    run.run(*run.train(0, SYNTHESIS, "--val"))
    run.run("nnUNetv2_diffrefine", "export", "-d", run.number, "-c", CONFIGURATION, "-tr", SYNTHESIS, "-p", TINY,
            "-device", "cpu")  # fmt: skip
    assert before == {file.name: file.stat().st_mtime_ns for file in folder.glob("*.b2nd")}
    assert len(before) == 6


def write_plans_of_slices(run: Workspace) -> None:
    """nnU-Net's 2d configuration, cut down, on the data preprocessed for 3D: the spacing is the same."""
    plans = json.loads((run.preprocessed / "nnUNetPlans.json").read_text())
    data = plans["configurations"][CONFIGURATION]["data_identifier"]
    small = shrink(plans, SLICES, [4, 8, 12], 4, [24, 24], kept="2d")
    small["configurations"]["2d"]["data_identifier"] = data
    (run.preprocessed / f"{SLICES}.json").write_text(json.dumps(small))


def predicted(trainer, checkpoint: str, case: str, images) -> np.ndarray:
    """A case by the model folder alone."""
    predictor = nnUNetPredictor(device=CPU, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(trainer.output_folder_base, (0,), checkpoint)
    return predictor.predict_single_npy_array(*SimpleITKIO().read_images(sorted(images.glob(f"{case}_*.nii.gz"))))


def test_both_trainings_run_in_2d_and_what_was_validated_is_what_is_predicted(run, monkeypatch):
    """In this process; the best checkpoint, its thresholds taken away, is validated as by ``--val --val_best``."""
    for name, value in {**run.env(), "nnUNet_n_proc_DA": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(nnunet, "default_num_processes", 1)
    write_plans_of_slices(run)
    for fold in (0, 1):
        synthesis = get_trainer_from_args(run.dataset, "2d", fold, SYNTHESIS, SLICES, device=CPU)
        synthesis.run_training()
        synthesis.perform_actual_validation()
    trainer = get_trainer_from_args(run.dataset, "2d", 0, RECOSEG, SLICES, device=CPU)
    trainer.run_training()
    best = Path(trainer.output_folder) / "checkpoint_best.pth"
    checkpoint = torch.load(best, weights_only=False)
    assert bool(checkpoint["network_weights"]["calibrated"])
    checkpoint["network_weights"].update(calibrated=torch.tensor(False), thresholds=torch.tensor([0.1, 0.2, 0.3]))
    torch.save(checkpoint, best)
    trainer.load_checkpoint(str(best))
    trainer.perform_actual_validation()
    case = trainer.do_split()[1][0]
    validated = sitk.GetArrayFromImage(sitk.ReadImage(str(best.parent / "validation" / f"{case}.nii.gz")))
    np.testing.assert_array_equal(predicted(trainer, best.name, case, run.raw / "imagesTr"), validated)
    kept = torch.load(best, weights_only=False)["network_weights"]
    assert bool(kept["calibrated"])
    assert torch.equal(kept["thresholds"], trainer.recoseg.thresholds)
    assert all(bool(weights.isfinite().all()) for weights in kept.values())
