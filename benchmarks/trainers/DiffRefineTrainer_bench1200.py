"""The refiner of the benchmarks: the default trainer with stage one's budget of 1,200 steps."""

import os

import torch

from nnunet_diffrefine.training.trainer import DiffRefineTrainer


class DiffRefineTrainer_bench1200(DiffRefineTrainer):
    """12 epochs of 100 steps, as nnUNetTrainer_bench1200."""

    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 12, 100, 10
        self.save_every = 2
        if device.type == "cpu" and "DIFFREFINE_BENCH_THREADS" in os.environ:
            torch.set_num_threads(int(os.environ["DIFFREFINE_BENCH_THREADS"]))
