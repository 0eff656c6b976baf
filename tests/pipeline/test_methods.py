"""Every method through nnU-Net's trainer and predictor, on regions; those that flip calibrate themselves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from workspace import TRAINERS, Workspace

from nnunet_diffrefine.methods import METHODS
from nnunet_diffrefine.plans import preset

DRIVER = Path(__file__).with_name("methods_driver.py")
pytestmark = pytest.mark.nnunet


def trained(workspace: Workspace, images: list[Path], methods: list[str]) -> dict[str, dict]:
    """What the driver saw of each method; the results go to a folder beside the run's own."""
    paths = os.pathsep.join((str(TRAINERS), str(TRAINERS.parent), os.environ.get("PYTHONPATH", "")))
    env = {**workspace.env(), "nnUNet_n_proc_DA": "0", "PYTHONPATH": paths}
    command = [sys.executable, str(DRIVER), workspace.dataset, ",".join(map(str, images)), *methods]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    lines = [line.removeprefix("SEEN ") for line in done.stdout.splitlines() if line.startswith("SEEN ")]
    return {seen["method"]: seen for seen in map(json.loads, lines)}


@pytest.fixture(scope="module")
def seen(region_run) -> dict[str, dict]:
    return trained(region_run, sorted((region_run.raw / "imagesTs").glob("*.nii.gz")), list(METHODS))


@pytest.mark.parametrize("method", METHODS)
def test_it_trains_and_its_folder_predicts(seen, method):
    assert seen[method]["shape"] == [24, 28, 24]
    assert set(seen[method]["labels"]) <= {0, 1, 2, 3}
    assert seen[method]["finite"]


@pytest.mark.parametrize("method", METHODS)
def test_thresholds_come_from_cases_kept_out_of_training(seen, method):
    calibrates = preset(method).get("error", {}).get("calibration", 0) > 0
    assert (seen[method]["trained_on"], seen[method]["held_out"]) == ((2, 1) if calibrates else (3, 0))
    if calibrates:
        assert len(seen[method]["thresholds"]) == 3
    assert seen[method]["best_has_them"]
    flips = preset(method).get("error", {}).get("target", "mask") != "mask"
    assert (seen[method]["thresholds"] is not None) == flips
