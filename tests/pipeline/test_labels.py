"""Labels, ResEnc plans, a stage one that was trained before this package was installed; faults between the steps."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest
import SimpleITK as sitk
import torch
from test_methods import trained
from validation_tables import assert_same_dice
from workspace import Workspace

STAGE_ONE, REFINER = "nnUNetTrainer_tiny", "DiffRefineTrainer_tiny"
pytestmark = pytest.mark.nnunet


def export(workspace: Workspace, *options: str) -> list[str]:
    return ["nnUNetv2_diffrefine", "export", *workspace.options(STAGE_ONE), "-device", "cpu", *options]


@pytest.fixture(scope="module")
def exported(label_run):
    """First refused without export, then exported by two processes at once."""
    refused = label_run.run(*label_run.train(0, REFINER), fails=True)
    assert "No out-of-fold predictions of stage one" in refused
    assert f"nnUNetv2_diffrefine export -d {label_run.dataset}" in refused
    assert not label_run.model(REFINER).exists()
    label_run.together(*(export(label_run, "-num_parts", "2", "-part_id", part) for part in ("0", "1")))
    return label_run


def test_exported_once_is_done(exported):
    folder = exported.preprocessed / "diffrefine" / exported.model(STAGE_ONE).name
    before = {f.name: f.stat().st_mtime_ns for f in folder.glob("*.b2nd")}
    exported.run(*export(exported))
    assert before == {f.name: f.stat().st_mtime_ns for f in folder.glob("*.b2nd")}
    assert len(before) == 6


def test_trains_with_empty_small_and_large_cases(exported):
    """Fold 0 validates on phantom_000, 002 (smaller than the patch), 004; fold 1 on 001 (empty), 003 (large), 005."""
    exported.together(*(exported.train(fold, REFINER) for fold in (0, 1)))
    for fold, cases in enumerate((("000", "002", "004"), ("001", "003", "005"))):
        folder = exported.model(REFINER) / f"fold_{fold}" / "validation"
        summary = json.loads((folder / "summary.json").read_text())
        assert len(summary["metric_per_case"]) == 3
        assert_same_dice(exported.model(REFINER), fold)
        for case in cases:
            predicted = sitk.ReadImage(str(folder / f"phantom_{case}.nii.gz"))
            reference = sitk.ReadImage(str(exported.raw / "labelsTr" / f"phantom_{case}.nii.gz"))
            assert predicted.GetSize() == reference.GetSize()
            assert predicted.GetSpacing() == reference.GetSpacing()


def test_methods_of_every_kind_train_and_predict(exported):
    """Absolute and three-way errors that calibrate, flips of a noised mask, fused steps; the residual encoder."""
    kinds = ["discrepancy_unet", "dmcie", "berdiff", "diff_unet"]
    images = sorted((exported.raw / "imagesTr").glob("phantom_000_*.nii.gz"))
    seen = trained(exported, images, kinds)
    for kind in kinds:
        assert seen[kind]["finite"]
        assert set(seen[kind]["labels"]) <= {0, 1, 2, 3}
        assert seen[kind]["held_out"] == int(kind in ("discrepancy_unet", "dmcie"))


def test_changed_splits_are_refused_before_anything_is_written(exported):
    file = exported.preprocessed / "splits_final.json"
    original = file.read_text()
    swapped = json.loads(original)[::-1]
    file.write_text(json.dumps(swapped))
    try:
        output = exported.run(*exported.train(1, "DiffRefineTrainer_5epochs"), fails=True)
    finally:
        file.write_text(original)
    assert "splits" in output
    assert not exported.model("DiffRefineTrainer_5epochs").exists()


def test_killed_training_continues_where_it_stopped(exported):
    trainer = "DiffRefineTrainer_tiny_long"
    folder = exported.model(trainer) / "fold_0"
    process = exported.start(*exported.train(0, trainer))
    deadline = time.time() + 300
    while not (folder / "checkpoint_latest.pth").exists() and time.time() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)  # its loader processes too
    process.communicate()
    done = torch.load(folder / "checkpoint_latest.pth", weights_only=False)["current_epoch"]
    assert 0 < done < 10
    log = exported.run(*exported.train(0, trainer, "--c"))
    assert f"Epoch {done}" in log
    assert f"Epoch {done - 1}\n" not in log
    rows = (folder / "refinement.csv").read_text().splitlines()[1:]
    assert [int(row.split(",")[0]) for row in rows] == list(range(10))


def test_truncated_checkpoint_is_named(exported):
    """Runs after the training above; --val needs the final checkpoint."""
    file = exported.model("DiffRefineTrainer_tiny_long") / "fold_0" / "checkpoint_final.pth"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    try:
        output = exported.run(*exported.train(0, "DiffRefineTrainer_tiny_long", "--val"), fails=True)
    finally:
        file.write_bytes(whole)
    assert str(file) in output
    assert "not a complete checkpoint" in output
