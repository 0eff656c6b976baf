"""The main job from raw images to a table: every step a user takes, with short trainings."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from nnunet_diffrefine.demo.phantom import PhantomSettings, write_dataset
from nnunet_diffrefine.demo.small_plans import CONFIGURATION
from nnunet_diffrefine.demo.steps import Step
from nnunet_diffrefine.demo.working_folder import WorkingFolder

STAGE_ONE = "DiffRefineStageOneTrainer_demo"
REFINER = "DiffRefineTrainer_demo"
FEATURES = [16, 32, 64]
LARGEST_PATCH = [64, 64, 64]
FOLDS = 2
# One window each, because mirrored prediction of many would take most of the time. Every tumour enhances: with eight
# cases a fold the Dice of empty references, 0 for a single voxel, would outweigh all else.
PHANTOM = PhantomSettings(shape=(40, 48, 40), enhancing=1.0)
# So short a training wants a higher rate than the default.
SETTINGS = {"training": {"learning_rate": 0.002}}


@dataclass(frozen=True)
class Demo(WorkingFolder):
    """A demo run: where, on what, with which device.

    Attributes:
        folder: working folder; holds nnU-Net's three folders, logs, table and figure.
        dataset: folder name of the dataset, DatasetXXX_NAME.
        source: a user's raw dataset, or None for the phantom.
        device: ``cpu``, ``cuda`` or ``mps``.
        cases: training cases of the phantom.
    """

    plans = "nnUNetPlansDemo"
    source: Path | None
    device: str
    cases: int = 16

    def prepare_raw(self) -> None:
        """Write the phantom, or link the user's dataset."""
        if self.source is None:
            write_dataset(self.raw, self.cases, seed=0, settings=PHANTOM, test_cases=2)
            return
        self.raw.parent.mkdir(parents=True, exist_ok=True)
        if not self.raw.exists():
            self.raw.symlink_to(self.source.resolve(), target_is_directory=True)

    def prepare_plans(self) -> None:
        """Cut the planned network down and split the cases into two folds."""
        self.write_small_plans("nnUNetPlans", FEATURES, LARGEST_PATCH, FOLDS, SETTINGS)

    def steps(self) -> list[Step]:
        """All steps in order; each can be interrupted and continued."""
        device = ["-device", self.device]
        train = [*device, "--npz", "--c"]
        plan = ["nnUNetv2_plan_and_preprocess", "-d", self.number, "-c", CONFIGURATION, "-np", "2", "-npfp", "2"]
        export = ["nnUNetv2_diffrefine", "export", *self.options(STAGE_ONE), *device]
        best = ["nnUNetv2_find_best_configuration", self.number, "-c", CONFIGURATION, "-p", self.plans]
        folds = range(FOLDS)
        return [
            Step("dataset", self.prepare_raw),
            Step("plan and preprocess", [*plan, "--verify_dataset_integrity"]),
            Step("small plans", self.prepare_plans),
            *(Step(f"train stage one, fold {f}", self.train(f, STAGE_ONE, *train)) for f in folds),
            Step("export out-of-fold predictions", export),
            *(Step(f"train refiner, fold {f}", self.train(f, REFINER, *train)) for f in folds),
            *self._predictions(*device),
            Step("compare models", [*best, "-tr", STAGE_ONE, REFINER, "-f", *map(str, folds)]),
        ]

    def _predictions(self, *options: str) -> list[Step]:
        if not (self.raw / "imagesTs").is_dir() and self.source is not None:
            return []
        images, out = str(self.raw / "imagesTs"), str(self.folder / "predictions")
        where = ["-i", images, "-o", out, "-f", *map(str, range(FOLDS)), "-npp", "0", "-nps", "0"]
        return [Step("predict new cases", ["nnUNetv2_predict", *self.options(REFINER), *where, *options])]

    def clean(self) -> None:
        """Delete all but the table, the figure, the logs and the predictions."""
        for part in ("raw", "preprocessed", "results"):
            shutil.rmtree(self.folder / f"nnUNet_{part}", ignore_errors=True)
