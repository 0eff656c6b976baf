"""The main job from raw images to a table: every step a user takes, with short trainings."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from nnunet_diffrefine.demo.phantom import PhantomSettings, write_dataset
from nnunet_diffrefine.demo.small_plans import CONFIGURATION, shrink
from nnunet_diffrefine.demo.steps import Step
from nnunet_diffrefine.paths import StageOneId

PLANS = "nnUNetPlansDemo"
STAGE_ONE = "DiffRefineStageOneTrainer_demo"
REFINER = "DiffRefineTrainer_demo"
FEATURES = [8, 16, 32, 64]
LARGEST_PATCH = 64
FOLDS = 2
PHANTOM = PhantomSettings(shape=(40, 48, 40))  # one window each: mirrored prediction of many would take most time


@dataclass(frozen=True)
class Demo:
    """A demo run: where, on what, with which device.

    Attributes:
        folder: working folder; holds nnU-Net's three folders, logs, table and figure.
        dataset: folder name of the dataset, DatasetXXX_NAME.
        source: a user's raw dataset, or None for the phantom.
        device: ``cpu``, ``cuda`` or ``mps``.
        cases: training cases of the phantom.
    """

    folder: Path
    dataset: str
    source: Path | None
    device: str
    cases: int = 16

    @property
    def raw(self) -> Path:
        """The raw dataset inside the working folder."""
        return self.folder / "nnUNet_raw" / self.dataset

    @property
    def preprocessed(self) -> Path:
        """The preprocessed dataset."""
        return self.folder / "nnUNet_preprocessed" / self.dataset

    def model(self, trainer: str) -> Path:
        """The model folder of a trainer."""
        identity = StageOneId(trainer, PLANS, CONFIGURATION)
        return self.folder / "nnUNet_results" / self.dataset / identity.name

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
        plans = json.loads((self.preprocessed / "nnUNetPlans.json").read_text())
        planned = plans["configurations"][CONFIGURATION]
        stages = min(len(FEATURES), planned["architecture"]["arch_kwargs"]["n_stages"])
        patch = [min(size, LARGEST_PATCH) for size in planned["patch_size"]]
        _write_json(self.preprocessed / f"{PLANS}.json", shrink(plans, PLANS, FEATURES[:stages], 2, patch))
        data = self.preprocessed / planned["data_identifier"]
        cases = sorted(f.name.removesuffix("_seg.b2nd") for f in data.glob("*_seg.b2nd"))
        if len(cases) < FOLDS:
            raise RuntimeError(f"{self.dataset} has {len(cases)} training cases; the demo needs at least {FOLDS}.")
        held_out = [cases[k::FOLDS] for k in range(FOLDS)]
        splits = [{"train": sorted(set(cases) - set(val)), "val": val} for val in held_out]
        _write_json(self.preprocessed / "splits_final.json", splits)

    def steps(self) -> list[Step]:
        """All steps in order; each can be interrupted and continued."""
        number = str(int(self.dataset[7:10]))
        train = ["nnUNetv2_train", number, CONFIGURATION]
        common = ["-p", PLANS, "-device", self.device, "--npz", "--c"]
        model = ["-d", number, "-c", CONFIGURATION, "-p", PLANS]
        plan = ["nnUNetv2_plan_and_preprocess", "-d", number, "-c", CONFIGURATION, "-np", "2", "-npfp", "2"]
        export = ["nnUNetv2_diffrefine", "export", *model, "-tr", STAGE_ONE, "-device", self.device]
        best = ["nnUNetv2_find_best_configuration", number, "-c", CONFIGURATION, "-p", PLANS]
        folds = [str(fold) for fold in range(FOLDS)]
        return [
            Step("dataset", self.prepare_raw),
            Step("plan and preprocess", [*plan, "--verify_dataset_integrity"]),
            Step("small plans", self.prepare_plans),
            *(Step(f"train stage one, fold {f}", [*train, f, "-tr", STAGE_ONE, *common]) for f in folds),
            Step("export out-of-fold predictions", export),
            *(Step(f"train refiner, fold {f}", [*train, f, "-tr", REFINER, *common]) for f in folds),
            *self._predictions(model, folds),
            Step("compare models", [*best, "-tr", STAGE_ONE, REFINER, "-f", *folds]),
        ]

    def _predictions(self, model: list[str], folds: list[str]) -> list[Step]:
        if not (self.raw / "imagesTs").is_dir() and self.source is not None:
            return []
        images, out = str(self.raw / "imagesTs"), str(self.folder / "predictions")
        options = ["-tr", REFINER, "-f", *folds, "-device", self.device, "-npp", "0", "-nps", "0"]
        return [Step("predict new cases", ["nnUNetv2_predict", "-i", images, "-o", out, *model, *options])]

    def clean(self) -> None:
        """Delete all but the table, the figure, the logs and the predictions."""
        for part in ("raw", "preprocessed", "results"):
            shutil.rmtree(self.folder / f"nnUNet_{part}", ignore_errors=True)


def _write_json(file: Path, content: object) -> None:
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2))
    os.replace(temporary, file)
