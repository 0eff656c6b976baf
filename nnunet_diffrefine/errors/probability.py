"""From class probabilities to the probability that a decision is wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from nnunet_diffrefine.batch import Foreground


def error_of(p: Tensor, prior: Tensor, foreground: Foreground) -> Tensor:
    """Probability in [0, 1], (B, *S), that the prior's decision is wrong.

    Exclusive classes: one less the probability of the class that the prior decided. Regions: the largest difference
    between a region's probability and the prior's decision on it.

    Args:
        p: probabilities of the true classes or regions, (B, R, *S).
        prior: probabilities (B, R, *S).
        foreground: meaning of the R channels.
    """
    hard = foreground.decide(foreground.logits(prior))
    if not foreground.exclusive:
        return (p - hard).abs().amax(1)
    decided = torch.where(hard.amax(1) > 0, (p * hard).sum(1), 1 - p.sum(1))
    return (1 - decided).clamp(0, 1)
