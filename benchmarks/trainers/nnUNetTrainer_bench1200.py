"""Stage one of the benchmarks and its controls: nnU-Net's own trainer, few steps, bf16 autocast on the CPU."""

import os

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class nnUNetTrainer_bench1200(nnUNetTrainer):
    """12 epochs of 100 steps; everything else as nnU-Net does it.

    ``DIFFREFINE_BENCH_THREADS`` sets the number of torch threads, so that several folds can share a machine.
    """

    steps_per_epoch = 100

    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch = 12, self.steps_per_epoch
        self.num_val_iterations_per_epoch, self.save_every = max(self.steps_per_epoch // 10, 2), 2
        if device.type == "cpu" and "DIFFREFINE_BENCH_THREADS" in os.environ:
            torch.set_num_threads(int(os.environ["DIFFREFINE_BENCH_THREADS"]))

    def train_step(self, batch):
        if self.device.type != "cpu":
            return super().train_step(batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().train_step(batch)


class nnUNetTrainer_bench1200_on(nnUNetTrainer_bench1200):
    """The control "stage one trained on for the same extra budget": start it with ``-pretrained_weights``."""


class nnUNetTrainer_bench1200_second(nnUNetTrainer_bench1200):
    """The control "a second network of the same size and budget": another random initialisation."""


for _steps in (60, 240, 600):
    for _suffix in ("", "_on", "_second"):
        _base = globals()[f"nnUNetTrainer_bench1200{_suffix}"]
        _name, _content = f"nnUNetTrainer_bench{_steps}{_suffix}", {"__module__": __name__, "__doc__": _base.__doc__}
        globals()[_name] = type(_name, (_base,), {**_content, "steps_per_epoch": _steps // 12})
