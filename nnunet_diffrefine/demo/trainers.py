"""Very short trainings for the demo and for trying things out on a CPU."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from nnunet_diffrefine.stage_one.trainer import DiffRefineStageOneTrainer
from nnunet_diffrefine.training.trainer import DiffRefineTrainer, mixed_precision

LENGTH = {"num_epochs": 8, "num_iterations_per_epoch": 25, "num_val_iterations_per_epoch": 5}


class DiffRefineStageOneTrainer_demo(DiffRefineStageOneTrainer):
    """Stage one for 200 steps; bf16 on CPUs that have it."""

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 (nnU-Net's signature)
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        for name, value in LENGTH.items():
            setattr(self, name, value)

    def train_step(self, batch: dict) -> dict:
        """nnU-Net's step; it has mixed precision on CUDA itself."""
        context: AbstractContextManager = nullcontext() if self.device.type == "cuda" else mixed_precision(self.device)
        with context:
            return super().train_step(batch)


class DiffRefineTrainer_demo(DiffRefineTrainer):
    """The refiner for as many steps."""

    length = LENGTH
