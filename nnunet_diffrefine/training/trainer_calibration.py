"""Thresholds that turn error evidence into flips, chosen for the final Dice on cases that no network trained on.

A share of a fold's training cases is kept out of training. Their priors are out-of-fold, as all are, and the refiner
has not seen them, nor are they among the cases that the fold reports: the threshold is cross-fitted by construction,
and one fold alone can be trained, calibrated and used.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from nnunet_diffrefine.data import PriorDataset
from nnunet_diffrefine.inference.volume import GivenPrior, references, volume_predictor, whole

if TYPE_CHECKING:
    from nnunet_diffrefine.training.trainer import DiffRefineTrainer

CANDIDATES = (*(round(0.05 * k, 2) for k in range(1, 20)), 0.97, 0.98, 0.99, 0.995, 0.999, 1.0)
"""Probabilities from which on an error is mended; 1 never mends any."""
SEED = 12345


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

    def scored() -> Iterable[np.ndarray]:
        for case in cases:
            stacked, segmentation, _, _ = data.load_case(case)
            x = whole(stacked)
            evidence = predictor.predict_sliding_window_return_logits(x)[-foreground.channels :].float().cpu()
            prior = x[None, -foreground.channels :]
            hard = foreground.decide(foreground.logits(prior))[0] > 0
            yield dice_of_candidates(evidence, hard, *references(np.asarray(segmentation[:]), trainer.label_manager))

    dice = np.mean(np.stack(list(scored())), 0)
    chosen = best_candidates(dice)
    network.thresholds.copy_(torch.tensor([CANDIDATES[k] for k in chosen]).logit())
    for name, row, k in zip(foreground.names, dice, chosen, strict=True):
        trainer.print_to_log_file(
            f"Threshold of '{name}' from {len(cases)} held-out cases: {CANDIDATES[k]:g}; "
            f"their Dice: stage one {row[-1]:.4f}, refined {row[k]:.4f}"
        )


def hand_to_best_checkpoint(trainer: DiffRefineTrainer) -> None:
    """Write the final thresholds into the best checkpoint too, atomically: it was saved before there were any."""
    file = Path(trainer.output_folder) / "checkpoint_best.pth"
    if trainer.local_rank != 0 or trainer.disable_checkpointing or not file.is_file():
        return
    checkpoint = torch.load(file, map_location="cpu", weights_only=False)
    checkpoint["network_weights"]["thresholds"] = trainer.refinement.thresholds.cpu()
    temporary = file.with_suffix(".pth.tmp")
    torch.save(checkpoint, temporary)
    os.replace(temporary, file)


def dice_of_candidates(evidence: Tensor, hard: Tensor, reference: Tensor, valid: Tensor) -> np.ndarray:
    """Dice (R, K) of a case after flipping with each of the K candidates.

    Both masks empty counts 1, so that every candidate is judged on the same cases and false alarms cost.

    Args:
        evidence: logits of the errors, (R, D, H, W).
        hard: stage one's decision, bool, (R, D, H, W).
        reference: bool, (R, D, H, W).
        valid: bool, (1, D, H, W).
    """
    rows = []
    for threshold in torch.tensor(CANDIDATES).logit().tolist():
        mask = (hard ^ (evidence > threshold)) & valid
        truth = reference & valid
        overlap, total = (mask & truth).flatten(1).sum(1), (mask.long() + truth.long()).flatten(1).sum(1)
        rows.append(torch.where(total > 0, 2 * overlap / total, 1.0).numpy())
    return np.stack(rows, 1)


def best_candidates(dice: np.ndarray) -> list[int]:
    """Index of the best candidate of each class, (R, K) -> R; of equal ones the most cautious."""
    last = dice.shape[1] - 1
    return [last - int(np.argmax(row[::-1])) for row in dice]
