"""``nnUNetv2_diffrefine apply`` on predictions of nnU-Net's own commands; killed, and continued."""

from __future__ import annotations

import json
import os
import signal
import time

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


def test_bad_input_is_one_line_and_no_traceback(predicted):
    output = predicted.run(*command(predicted, "stage_one"), fails=True)
    assert "nnUNetv2_diffrefine apply: -o is the folder of -s" in output
    assert "Traceback" not in output
    other = [argument if argument != REFINER else STAGE_ONE for argument in command(predicted, "other")]
    output = predicted.run(*other, fails=True)
    assert "do not belong to a trained refiner" in output
    assert not (predicted.folder / "other").exists()
