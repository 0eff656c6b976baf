"""The refiners of the benchmarks: every method's trainer with stage one's budget of 1,200 steps, or with fewer."""

import os

import torch

from nnunet_diffrefine.methods import METHODS
from nnunet_diffrefine.training.trainer import DiffRefineTrainer


class DiffRefineTrainer_bench1200(DiffRefineTrainer):
    """12 epochs of 100 steps, as nnUNetTrainer_bench1200."""

    length = {"num_epochs": 12, "num_iterations_per_epoch": 100, "num_val_iterations_per_epoch": 10, "save_every": 2}

    def on_train_start(self):
        if self.device.type == "cpu" and "DIFFREFINE_BENCH_THREADS" in os.environ:
            torch.set_num_threads(int(os.environ["DIFFREFINE_BENCH_THREADS"]))
        super().on_train_start()


def _variant(name, base, **attributes):
    globals()[name] = type(name, (base,), {"__module__": __name__, "__doc__": base.__doc__, **attributes})


for _steps in (60, 240, 480, 600):  # DiffRefineTrainer_bench240 and so on: 12 epochs of a twelfth
    _length = {**DiffRefineTrainer_bench1200.length, "num_iterations_per_epoch": _steps // 12}
    _length["num_val_iterations_per_epoch"] = max(_steps // 120, 2)
    _variant(f"DiffRefineTrainer_bench{_steps}", DiffRefineTrainer_bench1200, length=_length)

for _steps in (60, 240, 480, 600, 1200):  # DiffRefineTrainer_DMCIE_bench1200 and so on
    for _method in METHODS.values():
        _base = globals()[f"DiffRefineTrainer_bench{_steps}"]
        _variant(f"{_method.trainer}_bench{_steps}", _base, method=_method.name)
