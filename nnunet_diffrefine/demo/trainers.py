"""Very short trainings for the demo and for trying things out on a CPU."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from nnunet_diffrefine.networks.precision import mixed_precision
from nnunet_diffrefine.stage_one.trainer import DiffRefineStageOneTrainer
from nnunet_diffrefine.training.optimisation import WarmupCosine
from nnunet_diffrefine.training.trainer import DiffRefineTrainer

LENGTH = {"num_epochs": 6, "num_iterations_per_epoch": 30, "num_val_iterations_per_epoch": 4}


class DiffRefineStageOneTrainer_demo(DiffRefineStageOneTrainer):
    """Stage one for 180 steps with AdamW; bf16 on CPUs that have it.

    nnU-Net's SGD averages its gradients over about 100 steps (momentum 0.99), too slow for a short training.
    """

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

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, WarmupCosine]:
        """AdamW at nnU-Net's rate of 0.01; cosine, without warm-up: nnU-Net sets the rate once an epoch."""
        optimizer = torch.optim.AdamW(self.network.parameters(), self.initial_lr, betas=(0.9, 0.99))
        return optimizer, WarmupCosine(optimizer, self.initial_lr, self.num_epochs, warmup=0)

    def train_step(self, batch: dict) -> dict:
        """nnU-Net's step; it has mixed precision on CUDA itself."""
        context: AbstractContextManager = nullcontext() if self.device.type == "cuda" else mixed_precision(self.device)
        with context:
            return super().train_step(batch)


class DiffRefineTrainer_demo(DiffRefineTrainer):
    """The refiner for as many steps."""

    length = LENGTH
