"""The refiner of the benchmarks: the default trainer with stage one's budget."""

import os

import torch

from nnunet_diffrefine.training.trainer import DiffRefineTrainer


class DiffRefineTrainer_bench1200(DiffRefineTrainer):
    """12 epochs of 100 steps, as nnUNetTrainer_bench1200."""

    length = {"num_epochs": 12, "num_iterations_per_epoch": 100, "num_val_iterations_per_epoch": 10, "save_every": 2}

    def on_train_start(self):
        if self.device.type == "cpu" and "DIFFREFINE_BENCH_THREADS" in os.environ:
            torch.set_num_threads(int(os.environ["DIFFREFINE_BENCH_THREADS"]))
        super().on_train_start()


class DiffRefineTrainer_bench240(DiffRefineTrainer_bench1200):
    """12 epochs of 20 steps, as nnUNetTrainer_bench240."""

    length = {"num_epochs": 12, "num_iterations_per_epoch": 20, "num_val_iterations_per_epoch": 2, "save_every": 2}
