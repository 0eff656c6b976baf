"""ReCoSeg's two trainers with the budgets of the benchmarks; the segmentation as stage one of the benchmarks."""

import torch
from nnunetv2.training.nnUNetTrainer.variants.optimizer.nnUNetTrainerAdam import nnUNetTrainerAdam1en3

from nnunet_diffrefine.networks.precision import mixed_precision
from nnunet_diffrefine.training.trainer_recoseg import ReCoSegTrainer
from nnunet_diffrefine.training.trainer_synthesis import ReCoSegSynthesisTrainer


def length(steps):
    """nnU-Net's attributes for so many steps in 12 epochs."""
    return {
        "num_epochs": 12,
        "num_iterations_per_epoch": steps // 12,
        "num_val_iterations_per_epoch": max(steps // 120, 2),
    }


class ReCoSegSynthesisTrainer_bench600(ReCoSegSynthesisTrainer):
    """12 epochs of 50 steps."""

    length = length(600)


class ReCoSegTrainer_bench600(ReCoSegTrainer):
    """12 epochs of 50 steps, nnU-Net's AdamW, bf16 on CPUs that have it."""

    length = length(600)

    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.initial_lr = 1e-3

    configure_optimizers = nnUNetTrainerAdam1en3.configure_optimizers

    def train_step(self, batch):
        with mixed_precision(self.device):
            return super().train_step(batch)


for _steps in (240, 480, 1200):
    for _base in (ReCoSegSynthesisTrainer_bench600, ReCoSegTrainer_bench600):
        _name = f"{_base.__name__.removesuffix('600')}{_steps}"
        _content = {"__module__": __name__, "__doc__": f"12 epochs of {_steps // 12} steps.", "length": length(_steps)}
        globals()[_name] = type(_name, (_base,), _content)
