"""Stage one of the benchmarks and its controls: nnU-Net's own trainer, few steps, bf16 autocast on the CPU."""

import os
from pathlib import Path

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.optimizer.nnUNetTrainerAdam import nnUNetTrainerAdam1en3

from nnunet_diffrefine.training.trainer_base import network_weights


class nnUNetTrainer_bench1200(nnUNetTrainer):
    """12 epochs of 100 steps; everything else as nnU-Net does it.

    ``DIFFREFINE_BENCH_THREADS`` sets the number of torch threads, so that several folds can share a machine.
    """

    steps_per_epoch = 100
    rate = 1.0
    """Of nnU-Net's learning rate."""
    continues = False
    """Start from the checkpoint that ``DIFFREFINE_BENCH_START`` names, the output layers too: ``-pretrained_weights``
    leaves those out."""

    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch = 12, self.steps_per_epoch
        self.initial_lr *= self.rate
        self.num_val_iterations_per_epoch, self.save_every = max(self.steps_per_epoch // 10, 2), 2
        if device.type == "cpu" and "DIFFREFINE_BENCH_THREADS" in os.environ:
            torch.set_num_threads(int(os.environ["DIFFREFINE_BENCH_THREADS"]))

    def initialize(self):
        super().initialize()
        if self.continues:
            self.network.load_state_dict(network_weights(Path(os.environ["DIFFREFINE_BENCH_START"])))

    def train_step(self, batch):
        if self.device.type != "cpu":
            return super().train_step(batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().train_step(batch)


class nnUNetTrainerAdam_bench1200(nnUNetTrainer_bench1200, nnUNetTrainerAdam1en3):
    """The same with nnU-Net's AdamW, which converges in fewer steps than its SGD with momentum 0.99."""


def _variant(name, base, **attributes):
    globals()[name] = type(name, (base,), {"__module__": __name__, "__doc__": base.__doc__, **attributes})


for _base in (nnUNetTrainer_bench1200, nnUNetTrainerAdam_bench1200):
    for _steps in (60, 240, 480, 600, 1200, 2400, 3600):
        _name = f"{_base.__name__.removesuffix('1200')}{_steps}"
        if _steps != 1200:
            _variant(_name, _base, steps_per_epoch=_steps // 12)
        # The controls. "on": trained on for an extra budget, at stage one's rate or at a tenth of it; "second": another
        # random start.
        _variant(f"{_name}_on", globals()[_name], continues=True)
        _variant(f"{_name}_on_tenth", globals()[_name], continues=True, rate=0.1)
        _variant(f"{_name}_second", globals()[_name])
