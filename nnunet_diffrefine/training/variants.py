"""Shorter trainings, named as nnU-Net names them."""

from __future__ import annotations

import torch

from nnunet_diffrefine.training.trainer import DiffRefineTrainer


class _Epochs(DiffRefineTrainer):
    epochs: int

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 (nnU-Net's signature)
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = self.epochs


class DiffRefineTrainer_5epochs(_Epochs):
    """Five epochs: does it run?"""

    epochs = 5


class DiffRefineTrainer_50epochs(_Epochs):
    """Fifty epochs."""

    epochs = 50


class DiffRefineTrainer_250epochs(_Epochs):
    """A quarter of nnU-Net's default length."""

    epochs = 250


class DiffRefineTrainer_MaskDiffusion(DiffRefineTrainer):
    """Gaussian diffusion of the mask instead of the bridge (method ``mask_diffusion``)."""

    method = "mask_diffusion"
