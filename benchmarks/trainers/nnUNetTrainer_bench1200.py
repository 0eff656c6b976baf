"""Stage one of the benchmarks: nnU-Net's own trainer, 1,200 steps, bf16 autocast on the CPU."""

import os

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class nnUNetTrainer_bench1200(nnUNetTrainer):
    """12 epochs of 100 steps; everything else as nnU-Net does it.

    ``DIFFREFINE_BENCH_THREADS`` sets the number of torch threads, so that several folds can share a machine.
    """

    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 12, 100, 10
        self.save_every = 2
        if device.type == "cpu" and "DIFFREFINE_BENCH_THREADS" in os.environ:
            torch.set_num_threads(int(os.environ["DIFFREFINE_BENCH_THREADS"]))

    def train_step(self, batch):
        if self.device.type != "cpu":
            return super().train_step(batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().train_step(batch)


class nnUNetTrainer_bench2400(nnUNetTrainer_bench1200):
    """The control "stage one trained on for the same extra budget": 2,400 steps in one go."""

    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = 24


class nnUNetTrainer_bench1200_second(nnUNetTrainer_bench1200):
    """The control "a second network of the same size and budget": another random initialisation."""
