"""What is refused as a model, and that a checkpoint is opened without running code from it."""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from nnunet_diffrefine.config import ConfigError, RefineConfig
from nnunet_diffrefine.inference.model import load_model, read_checkpoint, with_sampling
from nnunet_diffrefine.paths import StageOneId
from nnunet_diffrefine.plans import Resolved, read_block, with_block
from tests.builders import LABELS
from tests.inference.small import dataset_of, plans_of

IDENTITY = StageOneId("DiffRefineTrainer", "nnUNetPlans", "3d_fullres")
DATASET = "Dataset777_Small"
CPU = torch.device("cpu")


def resolved_plans() -> dict:
    stage_one = {
        "trainer": "t",
        "plans": "p",
        "configuration": "c",
        "builder": "b",
        "architecture": {},
        "mirror_axes": [],
    }
    return with_block(plans_of(), "3d_fullres", RefineConfig(), Resolved(asdict(LABELS), stage_one))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model folder whose checkpoints say what they should, but hold no network."""
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    folder = tmp_path / DATASET / IDENTITY.name
    (folder / "fold_0").mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(resolved_plans()))
    (folder / "dataset.json").write_text(json.dumps(dataset_of("labels")))
    checkpoint(folder / "fold_0" / "checkpoint_final.pth")
    return folder


def checkpoint(file, **changes) -> None:
    """As nnU-Net writes them: tensors, plans, and logs that hold NumPy's numbers."""
    content = {
        "network_weights": {"w": torch.zeros(2)}, "trainer_name": IDENTITY.trainer,
        "init_args": {"configuration": "3d_fullres", "fold": 0, "plans": plans_of(), "device": CPU},
        "logging": {"train_losses": [np.float32(0.5), np.float64(0.25)]}, "_best_ema": np.float64(0.1),
        "diffrefine": {},
    }  # fmt: skip
    torch.save({key: value for key, value in (content | changes).items() if value is not None}, file)


def load(dataset=DATASET, identity=IDENTITY, folds=(0,), **sampling):
    return load_model(dataset, identity, folds, "checkpoint_final.pth", sampling, CPU)


class TestCheckpoint:
    def test_logs_of_nnunet_are_read(self, folder):
        content = read_checkpoint(folder / "fold_0" / "checkpoint_final.pth")
        assert content["_best_ema"] == 0.1
        assert torch.equal(content["network_weights"]["w"], torch.zeros(2))

    def test_code_is_not_run(self, folder, tmp_path):
        mark = tmp_path / "ran"

        class Evil:
            def __reduce__(self):
                return os.mkdir, (str(mark),)

        file = folder / "fold_0" / "checkpoint_final.pth"
        checkpoint(file, extra=Evil())
        with pytest.raises(RuntimeError, match="was not loaded, because what else is in it might run code"):
            load()
        assert not mark.exists()
        pickle.loads(pickle.dumps(Evil()))  # the control: it would have
        assert mark.exists()

    def test_truncated(self, folder):
        file = folder / "fold_0" / "checkpoint_final.pth"
        file.write_bytes(file.read_bytes()[:200])
        with pytest.raises(RuntimeError, match=r"checkpoint_final.pth is damaged"):
            load()

    def test_of_a_stock_trainer(self, folder):
        checkpoint(folder / "fold_0" / "checkpoint_final.pth", diffrefine=None)
        with pytest.raises(RuntimeError, match="no checkpoint of a refiner of this package .* lacks diffrefine"):
            load()

    @pytest.mark.parametrize(
        ("changes", "shown"),
        [
            ({"trainer_name": "DiffRefineTrainer_Other"}, "DiffRefineTrainer_Other"),
            ({"init_args": {"configuration": "3d_fullres", "fold": 3}}, "3"),
            ({"init_args": {"configuration": "3d_lowres", "fold": 0}}, "3d_lowres"),
        ],
        ids=["trainer", "fold", "configuration"],
    )
    def test_copied_from_elsewhere(self, folder, changes, shown):
        checkpoint(folder / "fold_0" / "checkpoint_final.pth", **changes)
        with pytest.raises(RuntimeError, match=rf"says it is .*{shown}.*; wanted .* copied from elsewhere"):
            load()


class TestFolder:
    def test_no_such_model(self, folder):
        with pytest.raises(RuntimeError, match="There is no trained model .*DiffRefineTrainer_Other"):
            load(identity=replace(IDENTITY, trainer="DiffRefineTrainer_Other"))

    def test_of_another_dataset(self, folder):
        other = folder.parent.parent / "Dataset778_Other" / IDENTITY.name
        other.parent.mkdir()
        folder.rename(other)
        with pytest.raises(RuntimeError, match="is a model of Dataset777_Small, not of Dataset778_Other"):
            load("Dataset778_Other")

    def test_fold_missing(self, folder):
        with pytest.raises(
            RuntimeError, match=r"Fold\(s\) 1 4 \(-f\) have no checkpoint_final.pth .* trained folds: -f 0"
        ):
            load(folds=(0, 1, 4))

    def test_plans_of_no_refiner(self, folder):
        (folder / "plans.json").write_text(json.dumps(plans_of()))
        with pytest.raises(ConfigError, match="do not belong to a trained refiner"):
            load()

    def test_plans_of_a_method_that_takes_no_predictions(self, folder):
        plans = resolved_plans()
        plans["configurations"]["3d_fullres"]["diffrefine"] = {"method": "recoseg", "keep_target": True}
        (folder / "plans.json").write_text(json.dumps(plans))
        with pytest.raises(ConfigError, match="'recoseg', which takes no predictions"):
            load_model(DATASET, IDENTITY, [0], "checkpoint_final.pth", {}, CPU)


class TestSampling:
    def test_given_settings_replace_the_models_own(self):
        plans = with_sampling(resolved_plans(), "3d_fullres", {"steps": 5, "samples": None, "seed": 9})
        config, _ = read_block(plans["configurations"]["3d_fullres"])
        assert (config.sampling.steps, config.sampling.samples, config.sampling.seed) == (5, 1, 9)

    def test_more_steps_than_there_are(self):
        with pytest.raises(ConfigError, match="sampling.steps"):
            with_sampling(resolved_plans(), "3d_fullres", {"steps": 11})
