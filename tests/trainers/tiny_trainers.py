"""Trainers that take two steps, for whole runs through nnU-Net's commands in the tests."""

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_diffrefine.stage_one.trainer import DiffRefineStageOneTrainer
from nnunet_diffrefine.training.trainer import DiffRefineTrainer


def _shorten(trainer, epochs=1):
    trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = epochs, 2, 1


class nnUNetTrainer_tiny(nnUNetTrainer):
    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):
        super().__init__(plans, configuration, fold, dataset_json, device)
        _shorten(self)


class DiffRefineStageOneTrainer_tiny(DiffRefineStageOneTrainer):
    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):
        super().__init__(plans, configuration, fold, dataset_json, device)
        _shorten(self)


class DiffRefineTrainer_tiny(DiffRefineTrainer):
    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):
        super().__init__(plans, configuration, fold, dataset_json, device)
        _shorten(self)


class DiffRefineTrainer_tiny_long(DiffRefineTrainer):
    """Many short epochs with a checkpoint after each, to be interrupted."""

    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):
        super().__init__(plans, configuration, fold, dataset_json, device)
        _shorten(self, epochs=6)
        self.save_every = 1
