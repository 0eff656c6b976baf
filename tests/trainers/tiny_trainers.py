"""Trainers that take two steps, for whole runs through nnU-Net's commands in the tests."""

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_diffrefine.methods import METHODS
from nnunet_diffrefine.stage_one.trainer import DiffRefineStageOneTrainer
from nnunet_diffrefine.training.trainer import DiffRefineTrainer
from nnunet_diffrefine.training.trainer_recoseg import ReCoSegTrainer
from nnunet_diffrefine.training.trainer_synthesis import ReCoSegSynthesisTrainer


def _shorten(trainer):
    trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 1, 2, 1


class nnUNetTrainer_tiny(nnUNetTrainer):
    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):
        super().__init__(plans, configuration, fold, dataset_json, device)
        _shorten(self)


class DiffRefineStageOneTrainer_tiny(DiffRefineStageOneTrainer):
    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):
        super().__init__(plans, configuration, fold, dataset_json, device)
        _shorten(self)


class DiffRefineTrainer_tiny(DiffRefineTrainer):
    length = {"num_epochs": 1, "num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 1}


for _method in METHODS.values():  # DiffRefineTrainer_DMCIE_tiny and so on
    _content = {"__module__": __name__, "method": _method.name}
    globals()[f"{_method.trainer}_tiny"] = type(f"{_method.trainer}_tiny", (DiffRefineTrainer_tiny,), _content)


class DiffRefineTrainer_tiny_long(DiffRefineTrainer):
    """Several short epochs with a checkpoint after each, to be interrupted."""

    length = {"num_epochs": 10, "num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 1, "save_every": 1}


class ReCoSegSynthesisTrainer_tiny(ReCoSegSynthesisTrainer):
    length = {"num_epochs": 1, "num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 1}


class ReCoSegTrainer_tiny(ReCoSegTrainer):
    length = {"num_epochs": 1, "num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 1}
