"""One dataset in a folder of its own: where nnU-Net puts what, and the arguments of its commands."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from nnunet_diffrefine.config import BLOCK
from nnunet_diffrefine.demo.small_plans import CONFIGURATION, shrink
from nnunet_diffrefine.paths import SPLITS, StageOneId
from nnunet_diffrefine.stage_one.manifest import write_atomically


@dataclass(frozen=True)
class WorkingFolder:
    """nnU-Net's three folders, side by side, for one dataset and its small plans.

    Attributes:
        plans: plans identifier of all trainings.
        folder: holds nnUNet_raw, nnUNet_preprocessed and nnUNet_results.
        dataset: folder name of the dataset, DatasetXXX_NAME.
    """

    plans: ClassVar[str]
    folder: Path
    dataset: str

    @property
    def number(self) -> str:
        """The dataset's number, as nnU-Net's commands take it."""
        return str(int(self.dataset[7:10]))

    @property
    def raw(self) -> Path:
        """The raw dataset."""
        return self.folder / "nnUNet_raw" / self.dataset

    @property
    def preprocessed(self) -> Path:
        """The preprocessed dataset."""
        return self.folder / "nnUNet_preprocessed" / self.dataset

    def model(self, trainer: str) -> Path:
        """The model folder of a trainer."""
        identity = StageOneId(trainer, self.plans, CONFIGURATION)
        return self.folder / "nnUNet_results" / self.dataset / identity.name

    def options(self, trainer: str) -> list[str]:
        """What names a trainer's model in the commands that predict or export."""
        return ["-d", self.number, "-c", CONFIGURATION, "-tr", trainer, "-p", self.plans]

    def train(self, fold: int, trainer: str, *options: str) -> list[str]:
        """Command that trains one fold."""
        return ["nnUNetv2_train", self.number, CONFIGURATION, str(fold), "-tr", trainer, "-p", self.plans, *options]

    def write_small_plans(
        self,
        planned: str,
        features: list[int],
        patch: list[int],
        folds: int,
        refiner: Mapping[str, Any] | None = None,
    ) -> None:
        """Cut preprocessed plans down, batch size 2, and deal the cases out to the folds.

        Args:
            planned: plans identifier that nnU-Net wrote.
            features: channels per stage, finest first; stages beyond the planned ones are dropped.
            patch: patch size in voxels; the planned one where that is smaller.
            folds: number of folds.
            refiner: settings of the refiner that differ from their defaults.

        Raises:
            RuntimeError: fewer cases than folds.
        """
        plans = json.loads((self.preprocessed / f"{planned}.json").read_text())
        configuration = plans["configurations"][CONFIGURATION]
        features = features[: configuration["architecture"]["arch_kwargs"]["n_stages"]]
        patch = [min(sizes) for sizes in zip(patch, configuration["patch_size"], strict=True)]
        small = shrink(plans, self.plans, features, 2, patch)
        if refiner:
            small["configurations"][CONFIGURATION][BLOCK] = refiner
        write_json(self.preprocessed / f"{self.plans}.json", small)
        data = self.preprocessed / configuration["data_identifier"]
        cases = sorted(f.name.removesuffix("_seg.b2nd") for f in data.glob("*_seg.b2nd"))
        if len(cases) < folds:
            raise RuntimeError(f"{self.dataset} has {len(cases)} training cases; {folds} folds need at least {folds}.")
        held_out = [cases[k::folds] for k in range(folds)]
        splits = [{"train": sorted(set(cases) - set(val)), "val": val} for val in held_out]
        write_json(self.preprocessed / SPLITS, splits)


def write_json(file: Path, content: object) -> None:
    """Write a file atomically."""
    write_atomically(file, json.dumps(content, indent=2).encode())
