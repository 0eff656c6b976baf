"""``nnUNetv2_diffrefine apply`` on predictions of nnU-Net's own commands; killed, and continued."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk
from workspace import Workspace

STAGE_ONE, REFINER = "DiffRefineStageOneTrainer_tiny", "DiffRefineTrainer_tiny"
MAPS = ("--save_error_map", "--save_uncertainty")
pytestmark = pytest.mark.nnunet


def read(file) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


@pytest.fixture(scope="module")
def predicted(region_run) -> Workspace:
    """Stage one's ensemble predictions of all images, with probabilities."""
    target = region_run.folder / "stage_one"
    images = region_run.raw / "imagesTr"
    region_run.run(*region_run.predict(STAGE_ONE, images, target, "-f", "0", "1", "--save_probabilities"))
    return region_run


def command(workspace: Workspace, out: str, *options: str) -> list[str]:
    where = ["-i", workspace.raw / "imagesTr", "-s", workspace.folder / "stage_one", "-o", workspace.folder / out]
    fixed = [*map(str, where), "-device", "cpu", "-f", "0", "1"]
    return ["nnUNetv2_diffrefine", "apply", *workspace.options(REFINER), *fixed, *options]


def contents(folder) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_results_are_nnunets_files_and_maps(predicted):
    output = predicted.run(*command(predicted, "applied", "--save_probabilities", "-npp", "1", "-nps", "1", *MAPS))
    assert "6 case(s) refined" in output
    out, before = predicted.folder / "applied", predicted.folder / "stage_one"
    for k in range(6):
        name = f"phantom_{k:03d}.nii.gz"
        assert sitk.ReadImage(str(out / name)).GetSpacing() == sitk.ReadImage(str(before / name)).GetSpacing()
        assert read(out / name).shape == read(before / name).shape
        p = np.load(out / f"phantom_{k:03d}.npz")["probabilities"]
        assert p.shape == (3, *read(before / name).shape)
        for kind in ("error_map", "uncertainty"):
            values = read(out / kind / name)
            assert 0 <= values.min() < values.max() <= 1
    record = json.loads((out / "apply.json").read_text())
    assert record["folds"] == [0, 1]


def test_killed_run_continues_to_the_same_bytes(predicted):
    """The files of the run above, written by two parts of which one is killed while it writes."""
    options = ["--save_probabilities", "-npp", "0", "-nps", "0", *MAPS, "-num_parts", "2", "-part_id"]
    out = predicted.folder / "killed"
    process = predicted.start(*command(predicted, "killed", *options, "0"))
    deadline = time.time() + 300
    while not list(out.glob("*.npz")) and process.poll() is None and time.time() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    half = {name: value for name, value in contents(out).items() if not name.startswith(".partial")}
    wanted = contents(predicted.folder / "applied")
    assert len(half) < len(wanted)
    assert all(read(out / name) is not None for name in half if name.endswith(".nii.gz"))
    predicted.together(*(command(predicted, "killed", *options, part, "--continue_prediction") for part in ("0", "1")))
    found = contents(out)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if name.endswith(".nii.gz") and found[name] != wanted[name]] == []


@pytest.fixture
def calibrated(predicted, tmp_path) -> Workspace:
    """A copy of the trained models, calibrated; the gate then is in the copy's plans alone."""
    shutil.copytree(predicted.model(REFINER).parent, tmp_path / predicted.model(REFINER).parent.name)
    copy = replace(predicted, extra={**predicted.extra, "nnUNet_results": str(tmp_path)})
    assert "6 out-of-fold cases" in copy.run(*calibrate(copy))
    return copy


def calibrate(workspace: Workspace, *options: str) -> list[str]:
    return ["nnUNetv2_diffrefine", "calibrate", *workspace.options(REFINER), "-device", "cpu", *options]


def test_calibrated_decisions_are_obeyed_by_apply_and_predict(calibrated):
    """All classes kept: apply gives back its input, and nnUNetv2_predict stage one's mask, to the voxel."""
    for sets, same in ((("--set", "all=keep"), True), (("--set", "all=refine"), False)):
        calibrated.run(*calibrate(calibrated, *sets))
        out = f"gate_{same}"
        calibrated.run(*command(calibrated, out, "--save_error_map", "-npp", "0", "-nps", "0"))
        folder, images = calibrated.folder / f"predicted_{same}", calibrated.raw / "imagesTr"
        calibrated.run(*calibrated.predict(REFINER, images, folder, "-f", "0", "1"))
        names = [f"phantom_{k:03d}.nii.gz" for k in range(6)]
        for found in (calibrated.folder / out, folder):
            equal = [np.array_equal(read(found / n), read(calibrated.folder / "stage_one" / n)) for n in names]
            assert all(equal) == same
        record = json.loads((calibrated.folder / out / "apply.json").read_text())
        assert bool(record["gate"]["unchanged"]) == same
        assert record["calibration"]["cases"] == 6
        rows = (calibrated.folder / out / "qc.csv").read_text().splitlines()
        assert len(rows) == 7
        assert "not calibrated" not in "".join(rows)


def test_bad_input_is_one_line_and_no_traceback(predicted):
    output = predicted.run(*command(predicted, "stage_one"), fails=True)
    assert "nnUNetv2_diffrefine apply: -o is the folder of -s" in output
    assert "Traceback" not in output
    other = [argument if argument != REFINER else STAGE_ONE for argument in command(predicted, "other")]
    output = predicted.run(*other, fails=True)
    assert "do not belong to a trained refiner" in output
    assert not (predicted.folder / "other").exists()
