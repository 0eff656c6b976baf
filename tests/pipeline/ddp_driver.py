"""One of two processes that train a refiner for an epoch on CPUs: ``ddp_driver.py RANK DATASET MEETING_FILE OUT``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from nnunetv2.run.run_training import get_trainer_from_args
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as nnunet
from tiny_trainers import DiffRefineTrainer_tiny
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from workspace import CONFIGURATION, TINY

HANGING = timedelta(seconds=60)  # what a collective may wait for the other rank


class DiffRefineTrainerTwoRanks(DiffRefineTrainer_tiny):
    """Stays on the CPU, where nnU-Net would set CUDA because there is a process group."""

    device = property(lambda self: torch.device("cpu"), lambda self, value: None)


def without_devices(network: nn.Module, device_ids: list[int]) -> DistributedDataParallel:
    """The wrapper that nnU-Net asks for; on CPUs it takes no device."""
    return DistributedDataParallel(network)


def weights(trainer: DiffRefineTrainer_tiny) -> dict[str, dict[str, Tensor]]:
    """Copies of the weights that are trained, averaged and frozen."""
    network = trainer.refinement
    parts = {"denoiser": network.denoiser, "ema": trainer.ema, "stage_one": network.stage_one}
    return {part: {k: v.clone() for k, v in module.state_dict().items()} for part, module in parts.items()}


def with_hits(counts: dict, hits: int) -> dict:
    """More hits than barely trained networks make, which may hit nothing: a Dice of zero would not tell ranks apart."""
    return counts | {name: value + hits for name, value in counts.items() if name.endswith("tp_hard")}


@torch.no_grad()
def validate(trainer: DiffRefineTrainer_tiny, batches: Iterator[dict]) -> list[dict]:
    """The validation half of an epoch; returns the counts that went into its Dice."""
    trainer.on_validation_epoch_start()
    steps = [trainer.validation_step(next(batches)) for _ in range(trainer.num_val_iterations_per_epoch)]
    counts = [with_hits(step, 100 * (trainer.local_rank + 1)) for step in steps]
    trainer.on_validation_epoch_end(counts)
    return counts


def train_epoch(trainer: DiffRefineTrainer_tiny) -> dict:
    """One epoch hook by hook, as nnU-Net's ``run_training`` goes through them, and what this rank saw on the way."""
    trainer.initialize()
    start = weights(trainer)
    training, validation = trainer.get_dataloaders()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    batches = [next(training) for _ in range(trainer.num_iterations_per_epoch)]
    losses = [trainer.train_step(batch) for batch in batches]
    trainer.on_train_epoch_end(losses)
    trained = weights(trainer)
    counts = validate(trainer, validation)
    trainer.on_epoch_end()
    return {
        "ddp": isinstance(trainer.network, DistributedDataParallel),
        "batch_sizes": [len(batch["data"]) for batch in batches],
        "planned_batch_size": trainer.configuration_manager.batch_size,
        "trainable": [name for name, p in trainer.refinement.denoiser.named_parameters() if p.requires_grad],
        "weights": {"start": start, "trained": trained, "end": weights(trainer)},
        "draws": trainer.generator.initial_seed(),
        "losses": [float(step["loss"]) for step in losses],
        "counts": counts,
        "curves": trainer.curves.columns,
        "logged": {key: trainer.logger.get_value(key, None) for key in ("train_losses", "val_losses", "mean_fg_dice")},
    }


def main(rank: int, dataset: str, meeting: Path, out: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)  # the ranks start from different weights and draw different patches
    np.random.seed(rank)
    nnunet.DDP = without_devices
    dist.init_process_group("gloo", meeting.as_uri(), HANGING, world_size=2, rank=rank)
    trainer = get_trainer_from_args(dataset, CONFIGURATION, 0, DiffRefineTrainerTwoRanks.__name__, TINY)
    torch.save(train_epoch(trainer), out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
