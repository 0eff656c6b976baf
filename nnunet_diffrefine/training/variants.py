"""Variants of the trainer: shorter ones, named as nnU-Net names them, and other methods."""

from nnunet_diffrefine.training.trainer import DiffRefineTrainer


class DiffRefineTrainer_5epochs(DiffRefineTrainer):
    """Five epochs, to see that it runs."""

    length = {"num_epochs": 5}


class DiffRefineTrainer_50epochs(DiffRefineTrainer):
    """Fifty epochs."""

    length = {"num_epochs": 50}


class DiffRefineTrainer_250epochs(DiffRefineTrainer):
    """A quarter of nnU-Net's default length."""

    length = {"num_epochs": 250}


class DiffRefineTrainer_MaskDiffusion(DiffRefineTrainer):
    """Gaussian diffusion of the mask instead of the bridge (method ``mask_diffusion``)."""

    method = "mask_diffusion"
