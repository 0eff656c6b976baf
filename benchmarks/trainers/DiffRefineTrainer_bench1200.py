"""The refiner of the benchmarks: the default trainer with stage one's budget."""

import os

import torch

from nnunet_diffrefine.training.trainer import DiffRefineTrainer


class DiffRefineTrainer_bench1200(DiffRefineTrainer):
    """12 epochs of 100 steps, as nnUNetTrainer_bench1200."""

    steps_per_epoch = 100

    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch = 12, self.steps_per_epoch
        self.num_val_iterations_per_epoch, self.save_every = max(self.steps_per_epoch // 10, 2), 2
        if device.type == "cpu" and "DIFFREFINE_BENCH_THREADS" in os.environ:
            torch.set_num_threads(int(os.environ["DIFFREFINE_BENCH_THREADS"]))


class DiffRefineTrainer_bench240(DiffRefineTrainer_bench1200):
    """240 steps, as nnUNetTrainer_bench240."""

    steps_per_epoch = 20
