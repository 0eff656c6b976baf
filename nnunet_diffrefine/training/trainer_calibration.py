"""Thresholds that turn error evidence into flips, chosen for the final Dice on cases that no network trained on.

A share of a fold's training cases is kept out of training. Their priors are out-of-fold, as all are, and the refiner
has not seen them, nor are they among the cases that the fold reports: the threshold is cross-fitted by construction,
and one fold alone can be trained, calibrated and used.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from nnunet_diffrefine.data import PriorDataset
from nnunet_diffrefine.inference.volume import GivenPrior, references, volume_predictor, whole
from nnunet_diffrefine.training.thresholds import ThresholdChoice

if TYPE_CHECKING:
    from torch import Tensor

    from nnunet_diffrefine.batch import Foreground
    from nnunet_diffrefine.networks.refinement import Refiner
    from nnunet_diffrefine.training.trainer import DiffRefineTrainer
    from nnunet_diffrefine.training.trainer_base import BaseTrainer

SEED = 12345
NEVER = 1.0
CANDIDATES = (NEVER, 0.999, 0.995, 0.99, 0.98, 0.97, *(round(0.05 * k, 2) for k in range(19, 0, -1)))
"""Probabilities from which on an error is mended, the most cautious first."""


def held_out(cases: Sequence[str], share: float, fold: int) -> set[str]:
    """The training cases of a fold that are kept for calibration: always the same, at least one if the share is not 0.

    Args:
        cases: names of the fold's training cases.
        share: in [0, 1).
        fold: of the cross-validation.
    """
    if share == 0 or len(cases) < 2:
        return set()
    number = min(max(round(share * len(cases)), 1), len(cases) - 1)
    chosen = np.random.default_rng(SEED + fold).choice(sorted(cases), number, replace=False)
    return {str(case) for case in chosen}


def flip_choice(method: Refiner, foreground: Foreground) -> ThresholdChoice:
    """Choice of the thresholds for flips; its voxels (2R, *S) are the logits of the errors, then the prior."""

    def decide(voxels: Tensor, thresholds: Tensor) -> Tensor:
        evidence, prior = voxels.chunk(2, 1)
        return foreground.decide(method.decide(evidence, prior, thresholds.logit()))

    return ThresholdChoice(decide, foreground.channels, CANDIDATES)


def calibrate(trainer: DiffRefineTrainer, cases: Sequence[str]) -> None:
    """Set the thresholds of the trainer's network from the held-out cases, and log them."""
    network, foreground = trainer.refinement, trainer.foreground
    data = PriorDataset(trainer.dataset_class(trainer.preprocessed_dataset_folder, list(cases)), trainer.store)
    predictor = volume_predictor(
        GivenPrior(network, evidence=True),
        trainer.plans_manager,
        trainer.configuration_manager,
        trainer.dataset_json,
        type(trainer).__name__,
        trainer.device,
    )
    choice = flip_choice(network.method, foreground)
    for case in cases:
        stacked, segmentation, _, _ = data.load_case(case)
        x = whole(stacked)
        evidence = predictor.predict_sliding_window_return_logits(x)[-foreground.channels :].float().cpu()
        reference, valid = references(np.asarray(segmentation[:]), trainer.label_manager)
        choice.add(torch.cat((evidence, x[-foreground.channels :])), reference, valid)
    chosen = choice.best()
    network.thresholds.copy_(torch.tensor(chosen).logit())
    before, after = (choice.dice(t) for t in ([NEVER] * foreground.channels, chosen))
    for name, threshold, one, two in zip(foreground.names, chosen, before, after, strict=True):
        trainer.print_to_log_file(
            f"Threshold of '{name}' from {len(cases)} held-out cases: {threshold:g}; "
            f"their Dice: stage one {one:.4f}, refined {two:.4f}"
        )


def hand_to_best_checkpoint(trainer: BaseTrainer, names: Sequence[str] = ("thresholds",)) -> None:
    """Write the network's buffers of these names into the best checkpoint too, atomically: it was saved before.

    All ranks get the first one's thresholds: each has chosen its own, and devices differ in the last bits.
    """
    network: Any = trainer.network.module if trainer.is_ddp else trainer.network
    if trainer.is_ddp:
        dist.broadcast(network.thresholds, 0)
    file = Path(trainer.output_folder) / "checkpoint_best.pth"
    if trainer.local_rank != 0 or trainer.disable_checkpointing or not file.is_file():
        return
    checkpoint = torch.load(file, map_location="cpu", weights_only=False)
    checkpoint["network_weights"].update({name: getattr(network, name).cpu() for name in names})
    temporary = file.with_suffix(".pth.tmp")
    torch.save(checkpoint, temporary)
    os.replace(temporary, file)
