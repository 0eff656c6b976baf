"""Hits and misses of validation patches, added up over an epoch and over ranks."""

from __future__ import annotations

import numpy as np
import torch.distributed as dist
from nnunetv2.training.loss.dice import get_tp_fp_fn_tn
from nnunetv2.utilities.collate_outputs import collate_outputs
from torch import Tensor

from nnunet_diffrefine.batch import Foreground, RefineBatch

COUNTS = ("tp_hard", "fp_hard", "fn_hard")


def hits(foreground: Foreground, logits: Tensor, batch: RefineBatch, prefix: str = "") -> dict[str, np.ndarray]:
    """True positives, false positives and false negatives (R,) of decided logits (B, H, *S), under nnU-Net's names."""
    decided = foreground.decide(logits)
    counts = get_tp_fp_fn_tn(decided, batch.reference, axes=(0, 2, 3, 4), mask=batch.valid)
    return {f"{prefix}{name}": value.cpu().numpy() for name, value in zip(COUNTS, counts, strict=False)}


def pooled_dice(outputs: list[dict], prefix: str, distributed: bool) -> float:
    """Mean over the classes of the Dice of all patches of an epoch together, on all ranks; NaN classes left out."""
    collated = collate_outputs(outputs)
    counts = np.stack([np.sum(collated[f"{prefix}{name}"], 0) for name in COUNTS])
    if distributed:
        everyone: list = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, counts)
        counts = np.sum(everyone, 0)
    tp, fp, fn = counts
    with np.errstate(invalid="ignore"):
        return float(np.nanmean(2 * tp / (2 * tp + fp + fn)))
