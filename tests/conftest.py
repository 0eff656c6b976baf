"""Shared fixtures: whole runs through nnU-Net's commands, made once."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from filelock import FileLock
from workspace import Workspace

from nnunet_diffrefine.demo.phantom import PhantomSettings, make_case, write_dataset

SMALL = PhantomSettings(shape=(24, 28, 24))

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads would take the core from the other processes
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the long ones."""
    items.sort(key=lambda item: item.get_closest_marker("nnunet") is None)


@pytest.fixture(scope="session")
def region_run(tmp_path_factory, worker_id) -> Workspace:
    """Regions, PlainConvUNet: stage one that exports itself, both refiner folds, ready to predict.

    Made once for all processes of the tests; each has its own copy.
    """
    own = tmp_path_factory.mktemp("regions")
    common = tmp_path_factory.getbasetemp() if worker_id == "master" else tmp_path_factory.getbasetemp().parent
    made, dataset = common / "regions_of_all", "Dataset501_Regions"
    with FileLock(common / "regions.lock"):
        if not (common / "regions.done").exists():
            made.mkdir()
            train_regions(Workspace(made, dataset))
            (common / "regions.done").touch()
    shutil.copytree(made, own, dirs_exist_ok=True)
    return Workspace(own, dataset)


def train_regions(workspace: Workspace) -> None:
    """Stage one and refiner, two folds each."""
    write_dataset(workspace.raw, 6, seed=1, settings=SMALL, test_cases=1)
    workspace.plan([4, 8, 12], [24, 24, 24])
    workspace.together(*(workspace.train(f, "DiffRefineStageOneTrainer_tiny", "--npz") for f in (0, 1)))
    workspace.together(*(workspace.train(f, "DiffRefineTrainer_tiny", "--npz") for f in (0, 1)))


@pytest.fixture(scope="session")
def label_run(tmp_path_factory) -> Workspace:
    """Labels, ResidualEncoderUNet: stage one by a stock trainer, trained but not exported.

    Among the six cases: one without foreground, one smaller than the patch, one several patches large.
    """
    workspace = Workspace(tmp_path_factory.mktemp("labels"), "Dataset502_Labels")
    write_dataset(workspace.raw, 6, seed=2, settings=SMALL, regions=False)
    images, labels = make_case(2, SMALL)
    replace_case(workspace.raw, "phantom_001", images, np.zeros_like(labels))
    replace_case(workspace.raw, "phantom_002", *make_case(3, PhantomSettings(shape=(14, 16, 14))))
    replace_case(workspace.raw, "phantom_003", *make_case(4, PhantomSettings(shape=(44, 52, 44))))
    workspace.plan([4, 8, 12], [24, 24, 24], planner="nnUNetPlannerResEncM", plans="nnUNetResEncUNetMPlans")
    workspace.together(*(workspace.train(f, "nnUNetTrainer_tiny") for f in (0, 1)))
    return workspace


def replace_case(raw: Path, case: str, images: np.ndarray, labels: np.ndarray) -> None:
    for channel, image in enumerate(images):
        sitk.WriteImage(sitk.GetImageFromArray(image), str(raw / "imagesTr" / f"{case}_{channel:04d}.nii.gz"))
    sitk.WriteImage(sitk.GetImageFromArray(labels), str(raw / "labelsTr" / f"{case}.nii.gz"))
