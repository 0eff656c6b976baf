"""A refiner that never was trained, its out-of-fold priors and its validation cases, ready to be calibrated.

The image shows the reference. The refiner copies its first class from there and never finds the second, so that
refinement helps the one and harms the other.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from torch import Tensor, nn

from nnunet_diffrefine.batch import Foreground
from nnunet_diffrefine.config import RefineConfig
from nnunet_diffrefine.inference.calibrate import CalibrationRequest
from nnunet_diffrefine.inference.model import Model
from nnunet_diffrefine.networks.gate import Gate
from nnunet_diffrefine.paths import StageOneId, fold_folder, model_folder, preprocessed_dataset
from nnunet_diffrefine.plans import Resolved, read_block, with_block
from nnunet_diffrefine.stage_one.store import PriorStore
from tests.inference.small import network_with
from tests.stage_one.tiny import DATASET, DATASET_JSON, SPLITS, STAGE_ONE, tiny_plans, write_json

REFINER = StageOneId("DiffRefineTrainer", "nnUNetPlans", "3d_fullres")
FOREGROUND = Foreground(("core", "rim"), exclusive=True)
SHAPE = (16, 16, 16)
REGION = {"margin": 2}
CASES = [case for split in SPLITS for case in split["val"]]


class Copies(nn.Module):
    """Class 1 from the image, class 2 nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        shown = (x[:, :1] == 1).float()
        return self.scale * torch.cat((2 - 4 * shown, 4 * shown - 2, torch.full_like(shown, -4)), 1)


def reference(case: str) -> np.ndarray:
    """Labels (D, H, W): a ball in a shell, of another size in every case."""
    centre = 7 + np.random.default_rng(CASES.index(case)).uniform(0, 1, 3)
    radius = np.sqrt(((np.indices(SHAPE).transpose(1, 2, 3, 0) - centre) ** 2).sum(-1))
    size = 3 + 0.3 * CASES.index(case)
    return np.where(radius < size, 1, np.where(radius < size + 2, 2, 0)).astype(np.int8)


def prior(case: str) -> np.ndarray:
    """Probabilities (2, D, H, W): the reference, moved by one voxel, with noise."""
    moved = np.roll(reference(case), 1, axis=1 + CASES.index(case) % 2)
    noise = np.random.default_rng(100 + CASES.index(case)).uniform(0, 0.1, (2, *SHAPE))
    return np.stack([0.8 * (moved == label) + noise[label - 1] for label in (1, 2)]).astype(np.float32)


@dataclass
class Calibrated:
    """The folders, and how to make and change what is in them.

    Attributes:
        folder: the refiner's model folder.
        export: folder of the priors.
    """

    export: Path
    folder: Path = field(default_factory=lambda: model_folder(DATASET, REFINER))

    def write(self, manifest) -> None:
        """Preprocessed cases, priors, and a model folder of two folds."""
        base = preprocessed_dataset(DATASET) / "nnUNetPlans_3d_fullres"
        base.mkdir(exist_ok=True)
        for fold, split in enumerate(SPLITS):
            for case in split["val"]:
                labels = reference(case)[None]
                image = labels.astype(np.float32)
                nnUNetDatasetBlosc2.save_case(
                    image, labels, {}, str(base / case), chunks=image.shape, blocks=image.shape
                )
                manifest = manifest.with_case(case, PriorStore(self.export).write(case, prior(case), fold))
            self.checkpoint(fold).parent.mkdir(parents=True)
            self.checkpoint(fold).write_bytes(f"refiner of fold {fold}".encode())
        manifest.write(self.export)
        stage_one = {**asdict(STAGE_ONE), "builder": "nnUNetTrainer", "architecture": {}, "mirror_axes": []}
        resolved = Resolved(asdict(FOREGROUND), stage_one)
        write_json(self.folder / "plans.json", with_block(tiny_plans(), "3d_fullres", RefineConfig(), resolved))
        write_json(self.folder / "dataset.json", DATASET_JSON)

    def checkpoint(self, fold: int) -> Path:
        return fold_folder(DATASET, REFINER, fold) / "checkpoint_final.pth"

    def plans(self) -> dict:
        return json.loads((self.folder / "plans.json").read_text())

    def gate(self) -> dict:
        return self.plans()["configurations"]["3d_fullres"]["diffrefine"]["gate"]

    def load(self, dataset, identity, folds, *_) -> Model:
        """Stands in for ``load_model``, which wants trained networks."""
        network = network_with(Copies(), FOREGROUND)
        network.stage_one = nn.Identity()
        config, _ = read_block(self.plans()["configurations"]["3d_fullres"])
        network.gate = Gate.from_settings(config.gate, FOREGROUND)
        states = [network.state_dict()] * len(folds)
        return Model(network, states, self.plans(), "3d_fullres", DATASET_JSON, self.folder)

    def request(self, **changes) -> CalibrationRequest:
        values = {"dataset": DATASET, "refiner": REFINER, "region": REGION, "device": "cpu", "progress": False}
        return CalibrationRequest(**{**values, **changes})
