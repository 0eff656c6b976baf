"""Shared fixtures: whole runs through nnU-Net's commands, made once a session."""

from __future__ import annotations

import pytest
from workspace import Workspace

from nnunet_diffrefine.demo.phantom import PhantomSettings, write_dataset

SMALL = PhantomSettings(shape=(24, 28, 24))


@pytest.fixture(scope="session")
def region_run(tmp_path_factory) -> Workspace:
    """Regions, PlainConvUNet: stage one that exports itself, both refiner folds, ready to predict."""
    workspace = Workspace(tmp_path_factory.mktemp("regions"), "Dataset501_Regions")
    write_dataset(workspace.raw, 6, seed=1, settings=SMALL, test_cases=1)
    workspace.plan([4, 8, 12], [24, 24, 24])
    workspace.together(*(workspace.train(f, "DiffRefineStageOneTrainer_tiny", "--npz") for f in (0, 1)))
    workspace.together(*(workspace.train(f, "DiffRefineTrainer_tiny", "--npz") for f in (0, 1)))
    return workspace


@pytest.fixture(scope="session")
def label_run(tmp_path_factory) -> Workspace:
    """Labels, ResidualEncoderUNet: stage one by a stock-like trainer, trained but not exported."""
    workspace = Workspace(tmp_path_factory.mktemp("labels"), "Dataset502_Labels")
    write_dataset(workspace.raw, 4, seed=2, settings=SMALL, regions=False)
    workspace.plan([4, 8, 12], [24, 24, 24], planner="nnUNetPlannerResEncM", plans="nnUNetResEncUNetMPlans")
    workspace.together(*(workspace.train(f, "nnUNetTrainer_tiny") for f in (0, 1)))
    return workspace
