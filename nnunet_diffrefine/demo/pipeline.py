"""The main job from raw images to a table: every step a user takes, with short trainings."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

from nnunet_diffrefine.demo.phantom import PhantomSettings, write_dataset
from nnunet_diffrefine.demo.small_plans import CONFIGURATION
from nnunet_diffrefine.demo.steps import Step
from nnunet_diffrefine.demo.working_folder import WorkingFolder, write_json

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
RECORD = "diffrefine_demo.json"
NNUNET_FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
WRITTEN = (*NNUNET_FOLDERS, "steps", "predictions", "table.md", "demo.png")


@dataclass(frozen=True)
class Demo(WorkingFolder):
    """A demo run: where, on what, with which device.

    Attributes:
        folder: working folder; holds nnU-Net's three folders, logs, table, figure and the record of the arguments.
        dataset: folder name of the dataset, DatasetXXX_NAME.
        source: a user's raw dataset, or None for the phantom.
        device: ``cpu``, ``cuda`` or ``mps``.
        cases: training cases of the phantom.
    """

    plans = "nnUNetPlansDemo"
    source: Path | None
    device: str
    cases: int = 16

    @property
    def arguments(self) -> dict[str, str | None]:
        """What decides the result, as on the command line; None where it has no say."""
        source, cases = (str(self.source), None) if self.source else (None, str(self.cases))
        return {"--dataset": source, "--cases": cases, "-device": self.device}

    def claim(self) -> None:
        """Record the arguments in the working folder, so that only a demo with the same ones continues there.

        Raises:
            ValueError: the folder holds what no demo recorded, a demo with other arguments, or another dataset of the
                same number; or there are fewer cases than folds. Nothing was written.
        """
        if self.source is None and self.cases < FOLDS:
            raise ValueError(f"--cases is {self.cases}; it must be at least {FOLDS}, the number of folds.")
        record = self.folder / RECORD
        if record.is_file():
            self._refuse_others(json.loads(record.read_text()))
        elif found := [name for name in WRITTEN if (self.folder / name).exists()]:
            raise ValueError(
                f"--dir {self.folder} holds {', '.join(found)} without a demo's {RECORD}: perhaps yours, so nothing is "
                "touched. Name a new folder: nnUNetv2_diffrefine demo --dir NEW_FOLDER"
            )
        same_number = f"{self.dataset[:10]}_*"
        there = [folder for name in NNUNET_FOLDERS for folder in (self.folder / name).glob(same_number)]
        if clash := [str(folder) for folder in there if folder.name != self.dataset]:
            raise ValueError(
                f"{self.dataset} has the number of {', '.join(clash)}; nnU-Net cannot tell them apart. "
                "Name a new folder: nnUNetv2_diffrefine demo --dir NEW_FOLDER"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(record, self.arguments)

    def _refuse_others(self, recorded: dict[str, str | None]) -> None:
        """Refuse a folder whose demo had other arguments."""
        own = self.arguments
        if other := [key for key in own if own[key] != recorded.get(key)]:
            differences = [f"{key} is {own[key] or 'none'}, was {recorded.get(key) or 'none'}" for key in other]
            options = [word for key, value in recorded.items() if value for word in (key, value)]
            command = shlex.join(["nnUNetv2_diffrefine", "demo", "--dir", str(self.folder), *options])
            raise ValueError(
                f"--dir {self.folder} holds a demo with other arguments: {'; '.join(differences)}. Continue that one: "
                f"{command}. For this one name a new folder with --dir."
            )

    def prepare_raw(self) -> None:
        """Write the phantom, or link the user's dataset."""
        if self.source is None:
            write_dataset(self.raw, self.cases, seed=0, settings=PHANTOM, test_cases=2)
            return
        self.raw.parent.mkdir(parents=True, exist_ok=True)
        if not self.raw.is_symlink():
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
        """Delete the demo's dataset and models; nnU-Net's folders only where nothing else is in them."""
        made = [self.preprocessed, self.folder / "nnUNet_results" / self.dataset]
        if self.raw.is_symlink():
            self.raw.unlink()
        elif self.source is None:
            made.append(self.raw)
        for folder in made:
            shutil.rmtree(folder, ignore_errors=True)
        for name in NNUNET_FOLDERS:
            with contextlib.suppress(OSError):  # not empty, or not there
                (self.folder / name).rmdir()
